"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): weights that mattered to past tasks are held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from eva_rl.adapter.allocators import Idle

WINDOWS = 64
"""Windows that a task's Fisher information is estimated from, each by itself."""


class Elastic(Idle):
    """The penalty strength / 2 sum_i F_i (theta_i - theta*_i)^2 as a companion of training, see `eva_rl.training.Companion`.

    F sums the diagonal Fisher information of all past tasks, and theta* are the weights after the last of them. A
    penalty for each task would need a copy of the weights for each. Huszar (2018, arXiv 1712.03847) shows why one will
    do.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strength: float):
        self.parameters, self.strength = dict(parameters), strength
        self.fisher = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.anchor = {name: p.detach().clone() for name, p in self.parameters.items()}

    def penalty(self) -> Tensor:
        parts = [(self.fisher[name] * (p - self.anchor[name]).square()).sum() for name, p in self.parameters.items()]
        return self.strength / 2 * torch.stack(parts).sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"fisher.{n}": t for n, t in self.fisher.items()} | {f"anchor.{n}": t for n, t in self.anchor.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.fisher = {name: state[f"fisher.{name}"].clone() for name in self.parameters}
        self.anchor = {name: state[f"anchor.{name}"].clone() for name in self.parameters}

    def consolidate(self, log_likelihoods: Callable[[int], Tensor]) -> None:
        """Add a task's Fisher information: the mean square of the gradient of log p(y | x), y drawn from the model itself.

        Args:
            log_likelihoods: of window number n, with y drawn.
        """
        parameters = list(self.parameters.values())
        for number in range(WINDOWS):
            gradients = torch.autograd.grad(log_likelihoods(number), parameters, allow_unused=True)
            for name, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    self.fisher[name] += gradient.detach().square() / WINDOWS
        self.anchor = {name: p.detach().clone() for name, p in self.parameters.items()}
