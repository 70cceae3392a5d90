"""A model's policy in rows of numbers, and the return it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:  # simulators' processes import this package, and start sooner without torch
    import torch
    from torch import Tensor

    from eva_rl.interface import Interface
    from eva_rl.rollout.simulators import Job


class Policy(Protocol):
    """What acting needs of a model: it acts for n episodes that step together."""

    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """(n, obs), (n,) -> actions in the environment's units (n, *action_shape), choices numbered from 0."""
        ...

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        """What was done in the end (clipped to the environment's space), and what it earned (n,)."""

    def keep(self, episodes: Tensor) -> None:
        """The others have ended: go on with these (m,)."""


@dataclass(frozen=True)
class ForJobs:
    """Makes policies that depend on what the episodes are of: given in place of a function of their number."""

    make: Callable[[Sequence[Job]], Policy]


class Actor:
    """Acts for n episodes that step together, in a rollout or in a user's own loop.

    `act` and `observe` take turns. The policy first asks for the target return. Every reward received is subtracted
    from what it asks for next (Chen et al. 2021, algorithm 1).
    """

    def __init__(
        self,
        policy: Policy,
        interface: Interface,
        target_returns: Sequence[float] | np.ndarray,
        device: torch.device | str = "cpu",
    ):
        self.policy, self.interface, self.device = policy, interface, device
        self.wanted = np.array(target_returns, np.float64)  # (n,)

    def act(self, observations: np.ndarray) -> np.ndarray:
        """(n, obs) flat -> actions (n, act) in the environment's units but not clipped, or choices from 0."""
        import torch

        rows = torch.as_tensor(observations, device=self.device)
        wanted = torch.as_tensor(self.wanted, dtype=torch.float32, device=self.device)
        return self.policy.act(rows, wanted).cpu().numpy().reshape(len(rows), -1)

    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:
        """What was done in the end (n, act), clipped to the environment's space, and what it earned (n,)."""
        import torch

        self.wanted -= rewards
        kind = torch.int64 if self.interface.choices else torch.float32
        done = torch.as_tensor(actions, dtype=kind).reshape(len(actions), *self.interface.action_shape)
        self.policy.record(done.to(self.device), torch.as_tensor(rewards, dtype=torch.float32, device=self.device))

    def keep(self, episodes: np.ndarray) -> None:
        """The others have ended: go on with these (m,)."""
        import torch

        self.wanted = self.wanted[episodes]
        self.policy.keep(torch.as_tensor(episodes, device=self.device))
