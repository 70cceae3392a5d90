"""What optimisers that keep Adam's moments of a matrix in a few of its dimensions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eva_rl.training.optimizers.build import on_gradients
from eva_rl.training.optimizers.moments import move

Direction = Callable[[dict[str, Any], Tensor, dict[str, Any]], Tensor]
"""From a matrix's state, its gradient (m, n) with m >= n and its group: where it moves (m, n)."""


def projected(groups: list[dict[str, Any]], lr: float, direction: Direction, **adamw: Any) -> torch.optim.Optimizer:
    """AdamW, in which matrices of groups with a `rank` below their dimensions move as `direction` says.

    A matrix that is wider than high is transposed for it, so that the shorter side is projected.
    """

    def step(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if "rank" not in group or p.ndim != 2 or p.grad is None or min(p.shape) <= group["rank"]:
                    continue
                wide = p.shape[0] < p.shape[1]
                gradient = p.grad.T.contiguous() if wide else p.grad
                found = direction(optimizer.state[p], gradient, group)
                move(p, group, found.T if wide else found)

    return on_gradients(torch.optim.AdamW(groups, lr=lr, **adamw), step)


def leading_rows(gradient: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of a gradient (m, n), as columns (n, rank)."""
    _, _, vt = torch.linalg.svd(gradient.float(), full_matrices=False)
    return vt[:rank].T.contiguous().to(gradient.dtype)
