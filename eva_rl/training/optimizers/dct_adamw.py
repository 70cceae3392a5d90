"""DCT-AdamW: Adam in the columns of a discrete cosine transform that hold most of the gradient (arXiv 2505.17967)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eva_rl.training.optimizers.moments import adam_direction
from eva_rl.training.optimizers.projected import projected


def dct_adamw(
    groups: list[dict[str, Any]], lr: float, interval: int = 1, error_feedback: bool = True, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW whose moments of a matrix are (m, rank), with columns chosen anew every `interval` steps (algorithm 2).

    G + E, E being what was left out a step ago, is projected to the `rank` columns of the transform Q whose entries of
    (G + E) Q have the largest sum of magnitudes. The moments are turned to the new columns by Q_before^T Q_now: a column
    that stays keeps its own, the others start at zero.
    """

    def direction(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if error_feedback and "error" in state:
            gradient = gradient + state["error"]
        basis = transform(gradient.shape[1]).to(gradient)  # (n, n)
        if "columns" not in state or state["step"] % interval == 0:
            columns = (gradient @ basis).abs().sum(0).topk(group["rank"]).indices  # (rank,)
            if "columns" in state:
                turn = basis[:, state["columns"]].T @ basis[:, columns]  # (rank, rank), of ones and zeros
                turn = turn.round()
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name] @ turn
            state["columns"] = columns
        chosen = basis[:, state["columns"]]  # (n, rank)
        low = gradient @ chosen  # (m, rank)
        if error_feedback:
            state["error"] = gradient - low @ chosen.T
        return adam_direction(state, low, group["betas"], group["eps"]) @ chosen.T

    return projected(groups, lr, direction, **adamw)


@cache
def transform(n: int) -> Tensor:
    """The orthonormal discrete cosine transform of type II, one frequency a column (n, n)."""
    place, frequency = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (place + 0.5) * frequency / n) * math.sqrt(2 / n)
    basis[:, 0] /= math.sqrt(2)
    return basis
