"""What goes into a model and what comes out of it: sizes and scales of one family of observations and actions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eva_rl.errors import UserError

OBSERVATION_CLIP = 10.0
"""Normalised observations are clipped to this range: a target task may move what the statistics never saw move."""


@dataclass(frozen=True)
class Interface:
    """The observations, actions and returns of a domain or a dataset, with the statistics that normalise them.

    Discrete actions are numbered from 0; `action_size` is then the number of choices, and `action_mean` and
    `action_scale` are empty.
    """

    name: str
    observation_size: int
    action_kind: Literal["continuous", "discrete"]
    action_size: int
    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]
    action_mean: tuple[float, ...]
    action_scale: tuple[float, ...]
    return_scale: float
    reward_scale: float

    def fits(self, other: Interface) -> bool:
        """Whether tensors of the other interface have this one's shapes and kinds."""
        return self.sizes == other.sizes

    @property
    def sizes(self) -> tuple[int, str, int]:
        return (self.observation_size, self.action_kind, self.action_size)

    def require(self, other: Interface, what: str) -> None:
        """Raise a `UserError` that names `what` unless the other interface fits this one."""
        if not self.fits(other):
            raise UserError(
                f"{what} has observations of size {other.observation_size} and {other.action_kind} actions of size "
                f"{other.action_size}, but the interface '{self.name}' expects observations of size "
                f"{self.observation_size} and {self.action_kind} actions of size {self.action_size}."
            )

    def renamed(self, name: str) -> Interface:
        return replace(self, name=name)


@dataclass(frozen=True)
class TaskStatistics:
    """What is known of a task from the trajectories of it that a model was trained on."""

    episodes: int
    return_max: float
    """The best undiscounted episode return: the return a rollout asks for."""
    return_mean: float
    success_rate: float | None
    """Share of the episodes that solved the task; None where the dataset does not say."""
    return_deciles: tuple[float, ...] = ()
    """(11,) the quantiles 0, 0.1, ..., 1 of the episodes' returns."""


@dataclass(frozen=True)
class Batch:
    """Windows of T consecutive steps, each starting at position 0 and padded with zeros at its end.

    Under a causal mask no real token attends to padding on its right, so models ignore `mask`; losses do not.
    """

    observations: Tensor  # (B, T, obs) float32
    actions: Tensor  # (B, T, act) float32, or (B, T) int64 for discrete actions
    returns_to_go: Tensor  # (B, T) float32: undiscounted sum of the rewards from this step to the episode's end
    rewards: Tensor  # (B, T) float32
    mask: Tensor  # (B, T) bool: True where the step is real
    interface: str

    def to(self, device: torch.device | str) -> Batch:
        tensors = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "interface"
        }
        return Batch(**tensors, interface=self.interface)
