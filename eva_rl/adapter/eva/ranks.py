"""The rank budget, shared out among layers by the variance their components explain (arXiv 2410.07170, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eva_rl.errors import UserError


def explained(values: Tensor, rows: float, total: float, ranking: str) -> Tensor:
    """How much each component (k,) is worth, from eigenvalues `sigma^2` (k,) of M = `rows` centred rows.

    `ratio`: `sigma_i^2` as a share of the layer's total variance, as peft ranks them. `paper`: Eq. 6,
    `sigma_i^2 / ((M - 1) ||sigma||_1)`, which falls with the square root of M: a layer whose stream ended early is worth
    more for it.
    """
    if ranking == "ratio":
        return values / total if total > 0 else torch.zeros_like(values)
    norm = values.sqrt().sum()
    return values / ((max(rows, 2) - 1) * norm) if norm > 0 else torch.zeros_like(values)


def redistribute(worth: Mapping[str, Tensor], budget: int, costs: Mapping[str, int] | None = None) -> dict[str, int]:
    """Spend `budget` on the components that are worth most.

    A layer gets 0 to len(worth[layer]) ranks. Every layer's components must be in descending order. Ties go to the
    layer named first.

    Args:
        costs: what a rank of each layer costs, 1 if None. What is left in the end is less than the cost of the dearest
            rank, unless all components are bought.

    Raises:
        UserError: if all components together cost less than the budget.
    """
    costs = costs or dict.fromkeys(worth, 1)
    names = [name for name, values in worth.items() for _ in range(len(values))]  # a tensor is slow to iterate
    if budget > sum(costs[name] for name in names):
        raise UserError(f"A budget of {budget} ranks was asked for, but the layers have only {len(names)} components.")
    ranks = dict.fromkeys(worth, 0)
    for index in torch.cat(list(worth.values())).argsort(descending=True, stable=True).tolist():
        name = names[index]
        if costs[name] <= budget:
            ranks[name] += 1
            budget -= costs[name]
    return ranks
