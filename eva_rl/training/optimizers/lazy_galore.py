"""GaLore with Q-GaLore's lazy subspaces, without its quantisation (Zhang et al. 2024, arXiv 2407.08296)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_rl.training.optimizers.moments import adam_direction
from eva_rl.training.optimizers.projected import leading_rows, projected


def lazy_galore(
    groups: list[dict[str, Any]],
    lr: float,
    interval: int = 200,
    scale: float = 0.25,
    threshold: float = 0.4,
    memory: int = 5,
    growth: float = 2.0,
    **adamw: Any,
) -> torch.optim.Optimizer:
    """AdamW in a gradient's `rank` leading singular directions, renewed less often the less they change (section 3.2).

    Each matrix has an interval of its own. It grows by `growth` when the leading direction's cosine with the one before
    it has been at least `threshold`, in the mean over the last `memory` renewals. The cosine is taken without its sign,
    as a singular vector has none. The authors' code takes it as it comes.

    Args:
        interval: steps between renewals, at first.
        scale: GaLore's alpha, by which the update is multiplied.
    """

    def renew(state: dict[str, Any], gradient: Tensor, rank: int) -> None:
        basis = leading_rows(gradient, rank)  # (n, rank)
        if "basis" in state:
            cosine = float((state["basis"][:, 0] @ basis[:, 0]).abs())
            state["cosines"] = [*state["cosines"], cosine][-memory:]
            if len(state["cosines"]) == memory and sum(state["cosines"]) / memory >= threshold:
                state["interval"] = int(state["interval"] * growth)
        else:
            state |= {"cosines": [], "interval": interval}
        state |= {"basis": basis, "age": 0}

    def direction(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if "basis" not in state or state["age"] >= state["interval"]:
            renew(state, gradient, group["rank"])
        state["age"] += 1
        low = gradient @ state["basis"]  # (m, rank)
        return scale * adam_direction(state, low, group["betas"], group["eps"]) @ state["basis"].T

    return projected(groups, lr, direction, **adamw)
