"""FRUGAL: Adam in a few dimensions of a gradient, its sign in the others (Zmushko et al. 2024, arXiv 2411.07837)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_rl.training.optimizers.moments import adam_direction
from eva_rl.training.optimizers.projected import leading_rows, projected


def frugal(
    groups: list[dict[str, Any]], lr: float, interval: int = 200, sign_rate: float = 0.1, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW on the gradient's part in its `rank` leading singular directions, signSGD on the rest (algorithm 1).

    Args:
        interval: steps between new directions. Adam's moments start anew with them.
        sign_rate: the rest learns at this multiple of the rate.
    """

    def direction(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if "basis" not in state or state["step"] == interval:
            state.clear()
            state["basis"] = leading_rows(gradient, group["rank"])  # (n, rank)
        basis = state["basis"]
        low = gradient @ basis  # (m, rank)
        rest = gradient - low @ basis.T
        return adam_direction(state, low, group["betas"], group["eps"]) @ basis.T + sign_rate * rest.sign()

    return projected(groups, lr, direction, **adamw)
