"""Adam's moments, for optimisers that keep them of something else than the gradient."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def adam_direction(state: MutableMapping[str, Any], gradient: Tensor, betas: Sequence[float], eps: float) -> Tensor:
    """Average `gradient` into the moments of `state`, and return m / (sqrt(v) + eps), both corrected for their start."""
    if "exp_avg" not in state:
        state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
    state["step"] += 1
    first, second = betas
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    m = state["exp_avg"] / (1 - first ** state["step"])
    v = state["exp_avg_sq"] / (1 - second ** state["step"])
    return m / (v.sqrt() + eps)


def move(parameter: nn.Parameter, group: dict[str, Any], direction: Tensor) -> None:
    """Take one step of the group's learning rate against `direction`, with decoupled weight decay.

    The gradient is used up.
    """
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
    parameter.grad = None
