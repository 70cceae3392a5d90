"""The rank budget, shared out among layers by the variance their components explain (arXiv 2410.07170, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eva_rl.errors import UserError

RANKINGS = ("ratio", "paper")


def explained(values: Tensor, rows: int, total: float, ranking: str) -> Tensor:
    """How much each component (k,) is worth, from eigenvalues `sigma^2` (k,) of M = `rows` centred rows.

    `ratio`: `sigma_i^2` as a share of the layer's total variance, as peft ranks them. `paper`: Eq. 6,
    `sigma_i^2 / ((M - 1) ||sigma||_1)`, which falls with the square root of M: a layer whose stream ended early is worth
    more for it.
    """
    if ranking == "ratio":
        return values / total if total > 0 else torch.zeros_like(values)
    norm = values.sqrt().sum()
    return values / ((max(rows, 2) - 1) * norm) if norm > 0 else torch.zeros_like(values)


def redistribute(worth: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Give `budget` ranks to the layers whose components are worth most; a layer gets 0 to len(worth[layer]).

    Every layer's components must be in descending order. Ties go to the layer named first.

    Raises:
        UserError: if there are fewer components than ranks to give.
    """
    names = [name for name, values in worth.items() for _ in values]
    if budget > len(names):
        raise UserError(f"A budget of {budget} ranks was asked for, but the layers have only {len(names)} components.")
    order = torch.cat(list(worth.values())).argsort(descending=True, stable=True)[:budget].tolist()
    ranks = dict.fromkeys(worth, 0)
    for index in order:
        ranks[names[index]] += 1
    return ranks
