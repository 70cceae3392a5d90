"""FedSVD, with one client: B is trained, and A follows it now and then (Lee et al. 2025, arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from eva_rl.adapter.allocators import Idle
from eva_rl.adapter.eva.load import lora_layers


@dataclass
class FedSvdConfig(LoraConfig):
    """LoRA whose A is not trained, and becomes the right singular vectors of B A every so many steps."""

    every: int = 25

    def put_on(self, peft_model: nn.Module) -> None:
        """Freeze every A."""
        self.freeze(peft_model)

    def freeze(self, peft_model: nn.Module) -> None:
        """Leave trainable what is trained."""
        for _, layer in lora_layers(peft_model):
            layer.lora_A["default"].weight.requires_grad_(False)

    def companion(self, peft_model: nn.Module) -> Refactored:
        """What takes part in training."""
        return Refactored(peft_model, self.every)


class Refactored(Idle):
    """Renews A, and turns B and Adam's moments of it along, see `turn_moments`."""

    def __init__(self, peft_model: nn.Module, every: int):
        layers = lora_layers(peft_model)
        self.factors = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers}
        self.every = every
        self.optimizer: torch.optim.Optimizer | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember whose moments follow."""
        self.optimizer = optimizer

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Refactor B A after every so many steps."""
        if step % self.every:
            return
        for a, b in self.factors.values():
            new_a, new_b, turn = refactored(a, b)
            a.copy_(new_a)
            b.copy_(new_b)
            if self.optimizer is not None and b in self.optimizer.state:
                turn_moments(self.optimizer.state[b], b, turn)

    def state_dict(self) -> dict[str, Tensor]:
        """Every A as it is now."""
        return {name: a.detach().clone() for name, (a, _) in self.factors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, (a, _) in self.factors.items():
            a.copy_(state[name])


def turn_moments(state: dict[str, Any], b: Tensor, turn: Tensor) -> None:
    """Turn Adam's moments of B along with it, and let what another optimiser remembers of B start anew.

    Args:
        turn: T (r, r), see `refactored`.
    """
    moments = {"exp_avg": turn, "exp_avg_sq": turn.square()}
    if set(state) != {"step", *moments} or any(state[name].shape != b.shape for name in moments):
        state.clear()
        return
    for name, by in moments.items():
        state[name].copy_(state[name].double() @ by)


def refactored(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A' (r, in) of orthonormal rows and B' (out, r), with B' A' = B A, from the singular vectors of B A, and T (r, r).

    B's gradient is s G A^T, and A' = T^T A, so that B' has the gradient s G A^T T: Adam's first moment m becomes m T. Its second,
    v, becomes v T^2 (entry by entry), as if the columns' gradients were uncorrelated.
    """
    a, b = a.double(), b.double()
    q, r = torch.linalg.qr(b)  # (out, r), (r, r)
    u, s, vt = torch.linalg.svd(r @ a, full_matrices=False)
    missing = s <= 1e-12 * s[0].clamp(min=torch.finfo(s.dtype).tiny)
    if missing.any():  # B of fewer ranks leaves the others open: they stay within what A spans
        vt = _completed(vt[~missing], a)
        u, s = torch.cat([u[:, ~missing], u[:, missing]], 1), torch.cat([s[~missing], torch.zeros_like(s[missing])])
    return vt, q @ u * s, torch.linalg.solve(a @ a.T, a @ vt.T)


def _completed(rows: Tensor, a: Tensor) -> Tensor:
    """These orthonormal rows, and more of what A (r, in) spans, r in all."""
    rest = a - a @ rows.T @ rows
    _, _, vt = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([rows, vt[: len(a) - len(rows)]])
