"""IncreLoRA: few ranks at first, and more for the layers whose update matters (Zhang et al. 2023, arXiv 2308.12043)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eva_rl.adapter.allocators.build import Allocator, Idle, lora_pairs_at_zero
from eva_rl.errors import UserError

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig

    from eva_rl.adapter.eva.typed import LoraLayer
    from eva_rl.adapter.sandwich import Sandwich

RESERVE = 1e-5
"""The singular value of the rank that comes next, so that its A and B learn before it counts."""
SMOOTH = 0.85
"""How much of the averages of importance and of its uncertainty each step keeps."""


def increlora(
    steps: int, start: float = 0.25, since: float = 0.1, until: float = 0.5, room: int = 2, orthogonality: float = 0.1
) -> Allocator:
    """An allocator that makes the update s B diag(e) A, begins with a share of the adapter's ranks, and gives the rest away one by one.

    A layer's importance is sum |dW * G| / sqrt(size), dW being its update and G the loss's gradient in its weight, averaged over steps
    and multiplied by its averaged uncertainty. The scale s stays, where the authors' shrinks as ranks come.

    Args:
        steps: the number of training steps.
        start: the share of the ranks at first, at least one a layer.
        since, until: the shares of the steps between which ranks are given.
        room: a layer may get this many times its ranks.
        orthogonality: the factor with which the mean of ||A A^T - I||_F and ||B^T B - I||_F is added to the loss.

    Raises:
        UserError: if a setting makes no sense.
    """
    if not (0 < start <= 1 and 0 <= since < until <= 1 and room >= 1 and orthogonality >= 0):
        raise UserError(
            "allocator.config must have start in (0, 1], 0 <= since < until <= 1, room of at least 1 and orthogonality of at least 0, "
            f"got start={start}, since={since}, until={until}, room={room}, orthogonality={orthogonality}."
        )

    def ranks(model: nn.Module, config: LoraConfig) -> LoraConfig:
        config = copy.deepcopy(config)
        grown = room**0.5 if config.use_rslora else room  # so that the scale stays
        config.r, config.lora_alpha = room * config.r, grown * config.lora_alpha
        config.rank_pattern = {name: room * rank for name, rank in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {name: grown * alpha for name, alpha in (config.alpha_pattern or {}).items()}
        return config

    def put_on(peft_model: nn.Module) -> Growing:
        from eva_rl.adapter.sandwich import Sandwich

        layers = [layer for _, layer in lora_pairs_at_zero(peft_model, "increlora")]
        for layer in layers:
            b = torch.randn_like(layer.lora_B["default"].weight) * 0.02  # (out, r)
            layer.lora_B["default"] = Sandwich(b, b.new_zeros(b.shape[1]), trained=("left", "middle"))
        nominal = [layer.r["default"] // room for layer in layers]
        counts = [max(1, round(start * rank)) for rank in nominal]
        return Growing(layers, counts, sum(nominal), (round(since * steps), round(until * steps)), orthogonality)

    return Allocator(ranks=ranks, put_on=put_on)


class Growing(Idle):
    """Gives ranks while they train.

    Args:
        counts: the layers' ranks at first.
        target: the sum of ranks to be reached between the two steps of `span`.
    """

    def __init__(
        self, layers: list[LoraLayer], counts: list[int], target: int, span: tuple[int, int], orthogonality: float
    ):
        self.layers, self.counts, self.target, self.strength = layers, list(counts), target, orthogonality
        self.factors = [cast("Sandwich", layer.lora_B["default"]) for layer in layers]
        missing, time = target - sum(counts), max(1, span[1] - span[0])
        self.first, self.top = span[0], max(1, math.ceil(missing / time))  # ranks a round
        self.interval = max(1, time // max(1, math.ceil(missing / self.top)))
        self.gradients: list[Tensor | float] = [0.0] * len(layers)
        self.importance, self.uncertainty = torch.zeros(len(layers)), torch.zeros(len(layers))
        for number, layer in enumerate(layers):
            self._watch(number, layer)
        self._open()

    @property
    def complete(self) -> bool:
        """Whether all ranks are given."""
        return sum(self.counts) >= self.target

    def _watch(self, number: int, layer: nn.Module) -> None:
        """Have this layer's calls counted."""

        def read(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            self._read(number, inputs[0], y)

        layer.register_forward_hook(read)

    def _read(self, number: int, x: Tensor, y: Tensor) -> None:
        """Count a call's inputs (..., in) and gradients (..., out) in the gradient of W, (out, in)."""
        if self.complete or not y.requires_grad:
            return
        seen = x.detach().flatten(0, -2).float()

        def count(gradient: Tensor) -> None:
            self.gradients[number] = self.gradients[number] + gradient.detach().flatten(0, -2).float().T @ seen

        y.register_hook(count)

    @torch.no_grad()
    def _open(self) -> None:
        """Put the rank that comes next in reserve, and all others that are not given yet to zero."""
        for factor, count in zip(self.factors, self.counts, strict=True):
            gate = factor.middle
            gate[count + 1 :] = 0.0
            gate[count : count + 1] = 0.0 if self.complete else RESERVE

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the optimiser off the gates of ranks that are not given yet."""
        optimizer.register_step_pre_hook(lambda *_: self._shut())

    def _shut(self) -> None:
        for factor, count in zip(self.factors, self.counts, strict=True):
            gate = factor.middle
            if gate.grad is not None:
                gate.grad[count:] = 0.0

    def penalty(self) -> Tensor:
        """How far A's rows and B's columns that take part are from orthonormal."""
        norms = []
        for layer, factor, count in zip(self.layers, self.factors, self.counts, strict=True):
            for rows in (layer.lora_A["default"].weight[: count + 1], factor.left.T[: count + 1]):
                norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)))
        return self.strength * torch.stack(norms).mean()

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Each layer's importance at this step."""
        found = []
        for layer, gradient in zip(self.layers, self.gradients, strict=True):
            update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            found.append(float((update * gradient).abs().sum()) / update.numel() ** 0.5)
        return torch.tensor(found)

    def after_step(self, step: int) -> None:
        """Average the importances, and give ranks where it is time."""
        if self.complete:
            return
        now = self.scores()
        self.importance = SMOOTH * self.importance + (1 - SMOOTH) * now
        self.uncertainty = SMOOTH * self.uncertainty + (1 - SMOOTH) * (now - self.importance).abs()
        self.gradients = [0.0] * len(self.layers)
        if step > self.first and (step - self.first) % self.interval == 0:
            self._grow()

    def _grow(self) -> None:
        """One rank more for the layers that matter most and have room."""
        worth = (self.importance * self.uncertainty).tolist()
        with_room = [n for n, layer in enumerate(self.layers) if self.counts[n] < layer.r["default"]]
        chosen = sorted(with_room, key=lambda n: -worth[n])[: min(self.top, self.target - sum(self.counts))]
        for number in chosen:
            self.counts[number] += 1
        self._open()

    def state_dict(self) -> dict[str, Tensor]:
        """Ranks given, and what was averaged."""
        return {"counts": torch.tensor(self.counts), "importance": self.importance, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.counts = state["counts"].tolist()
        self.importance, self.uncertainty = state["importance"].cpu().clone(), state["uncertainty"].cpu().clone()
