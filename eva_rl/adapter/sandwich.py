"""LoRA with a small matrix between its factors: W + s (diag(o) L M - K) R, where some of L, M, R and o are trained.

L (out, r) and R (r, in) come from the weight, its gradient, its inputs or nowhere. M (r, r) or its diagonal (r,) stands
between them, and o (out,) scales outputs. K (out, r) is what L M was at the start, where the start takes that out of W.
W itself stays.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from eva_rl.adapter import starts
from eva_rl.adapter.allocators import Idle
from eva_rl.adapter.eva.directions import random_rows
from eva_rl.adapter.eva.load import lora_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from eva_rl.adapter.eva import EvaSettings, LayerResult
    from eva_rl.adapter.eva.typed import LoraLayer


class Sandwich(nn.Module):
    """In the place of LoRA's B: its weight (out, r) is diag(o) L M - K.

    Args:
        left: L (out, r).
        middle: M (r, r), or its diagonal (r,).
        outputs: o (out,). None: ones.
        taken: K (out, r). None: zeros.
        trained: which of these are trained.
    """

    left: nn.Parameter
    middle: nn.Parameter
    outputs: nn.Parameter | None
    taken: nn.Parameter | None

    def __init__(
        self,
        left: Tensor,
        middle: Tensor,
        outputs: Tensor | None = None,
        taken: Tensor | None = None,
        trained: Collection[str] = ("middle", "outputs"),
    ):
        super().__init__()
        self.trained = frozenset(trained)
        for name, value in {"left": left, "middle": middle, "outputs": outputs, "taken": taken}.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().contiguous()))
        self.freeze()

    def freeze(self) -> None:
        """Leave trainable what is trained: peft makes all of it so when it turns adapters on."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.trained)

    @property
    def weight(self) -> Tensor:
        with torch.autocast(self.left.device.type, enabled=False):  # K would not cancel a product of fewer digits
            product = self.left * self.middle if self.middle.ndim == 1 else self.left @ self.middle  # (out, r)
        if self.outputs is not None:
            product = self.outputs[:, None] * product
        return product if self.taken is None else product - self.taken

    @property
    def kept(self) -> Tensor:
        """Which ranks (r,) do anything at all."""
        if self.middle.ndim > 1 or self.taken is not None:
            return torch.ones(self.left.shape[1], dtype=torch.bool, device=self.left.device)
        return self.middle != 0

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (..., out) of A x (..., r)."""
        return F.linear(x, self.weight)


def sandwich_of(layer: LoraLayer) -> Sandwich:
    """What stands in the place of this layer's B."""
    return cast("Sandwich", layer.lora_B["default"])


@dataclass
class SandwichConfig(LoraConfig):
    """LoRA whose B is a `Sandwich`."""

    diagonal: bool = False
    """Whether M is one, of r numbers."""
    outputs: bool = False
    """Whether outputs have scales of their own, too."""
    sides: bool = False
    """Whether L and R are trained, too."""
    landing: float | None = None
    """How strongly L and R are drawn to orthonormality (see `Landing`), or None for not at all."""
    step: float = 0.0
    """The rate of the first step of full fine-tuning, for `lora_sb`."""

    def put_on(self, peft_model: nn.Module) -> None:
        """Make every B a sandwich of zeros."""
        trained = ("left", "middle", "outputs") if self.sides else ("middle", "outputs")
        for _, layer in lora_layers(peft_model):
            left = torch.zeros_like(layer.lora_B["default"].weight)  # (out, r)
            rank = left.shape[1]
            middle = left.new_zeros(rank) if self.diagonal else left.new_zeros(rank, rank)
            outputs = left.new_ones(len(left)) if self.outputs else None
            layer.lora_B["default"] = Sandwich(left, middle, outputs, trained=trained)
        self.freeze(peft_model)

    def freeze(self, peft_model: nn.Module) -> None:
        """Leave trainable what is trained."""
        for _, layer in lora_layers(peft_model):
            layer.lora_A["default"].weight.requires_grad_(self.sides)
            sandwich_of(layer).freeze()

    def companion(self, peft_model: nn.Module) -> Landing | None:
        """What takes part in training."""
        return None if self.landing is None else Landing(peft_model, self.landing)


def _fill(layer: LoraLayer, left: Tensor, middle: Tensor, right: Tensor | None, takes: bool = False) -> None:
    """Start at L (out, r), M and R (r, in).

    If R is None, it is left as it is. With `takes`, the layer computes W all the same.
    """
    if right is not None:
        layer.lora_A["default"].weight.data = right.to(layer.lora_A["default"].weight).contiguous()
    old = sandwich_of(layer)
    old.left.data, old.middle.data = left.to(old.left).contiguous(), middle.to(old.middle).contiguous()
    if takes:
        old.taken = nn.Parameter(old.weight.detach().clone(), requires_grad=False)


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r (out, r), S_r (r,) and V_r^T (r, in) of a matrix (out, in)."""
    u, s, vt = torch.linalg.svd(matrix.float(), full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


@torch.no_grad()
def lora_xs(
    model: nn.Module, config: SandwichConfig, data: starts.TaskData
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """L = U_r and R = S_r V_r^T of W = U S V^T, and a tiny random M (Bałazy et al. 2024, arXiv 2405.17604)."""
    config.init_lora_weights = True
    peft_model, _ = starts.plain(model, config, data)
    for _, layer in lora_layers(model):
        left, s, vt = _svd(starts.oriented(layer, layer.get_base_layer().weight), layer.r["default"])
        _fill(layer, left, 1e-5 * torch.randn(len(s), len(s)), s[:, None] * vt)
    return peft_model, {}


@torch.no_grad()
def singular_values(
    model: nn.Module, config: SandwichConfig, data: starts.TaskData
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """L = U_r, R = V_r^T and M = diag(S_r) / s of W = U S V^T, the rest of which stays as it is.

    This is SVFit (arXiv 2409.05926), or with scales of the outputs OSoRA (arXiv 2505.14350).
    """
    config.init_lora_weights = True
    peft_model, _ = starts.plain(model, config, data)
    for _, layer in lora_layers(model):
        left, s, vt = _svd(starts.oriented(layer, layer.get_base_layer().weight), layer.r["default"])
        middle = s / layer.scaling["default"]
        _fill(layer, left, middle if config.diagonal else torch.diag(middle), vt, takes=True)
    return peft_model, {}


def lora_sb(
    model: nn.Module, config: SandwichConfig, data: starts.TaskData
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """L = U_r, M = diag(S_r) / s and R = V_r^T of AdamW's first step of full fine-tuning, -eta sign(G) = U S V^T (Ponkshe et al.
    2024, arXiv 2411.19557), eta being the config's `step`. s L M R is that step's best approximation of rank r.

    Raises:
        UserError: if there is no loss of a batch.
    """
    peft_model, layers, gradients = starts.with_gradients(model, config, data, "LoRA-SB")
    with torch.no_grad():
        for layer, gradient in zip(layers, gradients, strict=True):
            step = -config.step * starts.oriented(layer, gradient).sign()
            left, s, vt = _svd(step, layer.r["default"])
            _fill(layer, left, torch.diag(s / layer.scaling["default"]), vt)
    return peft_model, {}


@torch.no_grad()
def polar(model: nn.Module, config: SandwichConfig, data: starts.TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """L and R random and orthonormal, M zero (Lion et al. 2025, arXiv 2506.03133)."""
    config.init_lora_weights = True
    peft_model, _ = starts.plain(model, config, data)
    for _, layer in lora_layers(model):
        factor, right = sandwich_of(layer), layer.lora_A["default"].weight
        (out, rank), width = factor.left.shape, right.shape[1]
        _fill(layer, random_rows(rank, out).T, factor.middle, random_rows(rank, width))
    return peft_model, {}


def eva_xs(
    model: nn.Module, config: SandwichConfig, data: starts.TaskData, settings: EvaSettings | None = None
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """R = EVA's directions of the inputs, L = U_r of W = U S V^T as in LoRA-XS, and M zero: ours, of no paper."""
    peft_model, found = starts.eva(model, config, data, settings)
    config.put_on(peft_model)  # anew, as EVA may have given layers other ranks
    with torch.no_grad():
        for _, layer in lora_layers(model):
            factor = sandwich_of(layer)
            left, _, _ = _svd(starts.oriented(layer, layer.get_base_layer().weight), layer.r["default"])
            _fill(layer, left, factor.middle, None)
    return peft_model, found


class Landing(Idle):
    """Keeps the sides L and R nearly orthonormal while they train, without a projection.

    This is PoLAR's landing field (arXiv 2506.03133). The authors' code puts it where the gradient was. See
    `eva_rl.training.Companion`.
    """

    def __init__(self, peft_model: nn.Module, strength: float):
        self.strength = strength
        self.columns = [sandwich_of(layer).left for _, layer in lora_layers(peft_model)]  # (out, r)
        self.rows = [layer.lora_A["default"].weight for _, layer in lora_layers(peft_model)]  # (r, in)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the field in the place of the gradient before every step of the optimiser."""
        optimizer.register_step_pre_hook(lambda *_: self._land())

    @torch.no_grad()
    def _land(self) -> None:
        for p in self.columns:
            if p.grad is not None:
                p.grad.copy_(landing_field(p, p.grad, self.strength))
        for p in self.rows:
            if p.grad is not None:
                p.grad.copy_(landing_field(p.T, p.grad.T, self.strength).T)


def landing_field(x: Tensor, gradient: Tensor, strength: float) -> Tensor:
    """(G X^T - X G^T) X + strength X (X^T X - I) for X and G of (n, r): along the orthonormal matrices, and towards them.

    (G X^T) X is computed as G (X^T X), without a matrix of (n, n).
    """
    gram = x.T @ x  # (r, r)
    distance = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gradient @ gram - x @ (gradient.T @ x) + strength * x @ distance
