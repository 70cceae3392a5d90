"""Packed trajectories -> random windows, by indexing alone; batch number n is a pure function of the seed and n."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eva_rl.data.trajectories import Trajectories
from eva_rl.interface import Batch


class WindowSampler:
    """Draws batches of windows: a task uniformly, then one of its transitions' windows, every transition equally likely.

    A window is any run of `context` consecutive steps that overlaps an episode, cut to the episode: windows that hang
    over the beginning start at step 0 and are shorter, as histories are early in a rollout; windows that hang over the
    end are shorter too. The real steps stand first and zeros follow.
    """

    def __init__(self, trajectories: Sequence[Trajectories], interface: str, context: int, batch_size: int, seed: int):
        self.interface, self.context, self.batch_size, self.seed = interface, context, batch_size, seed
        self.observations = torch.cat([t.observations for t in trajectories])
        self.actions = torch.cat([t.actions for t in trajectories])
        self.rewards = torch.cat([t.rewards for t in trajectories])
        self.returns_to_go = torch.cat([t.returns_to_go for t in trajectories])
        offsets = np.cumsum([0, *(len(t.rewards) for t in trajectories)])
        self.episode_starts = torch.cat([t.starts[:-1] + o for t, o in zip(trajectories, offsets[:-1], strict=True)])
        self.episode_lengths = torch.cat([t.lengths for t in trajectories])
        # Windows are numbered through: an episode of T steps has T + context - 1 of them.
        self.window_ends = (self.episode_lengths + context - 1).cumsum(0)
        episodes = np.cumsum([0, *(len(t.lengths) for t in trajectories)])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), self.window_ends])[torch.from_numpy(episodes)]
        self.task_first, self.task_windows = bounds[:-1].numpy(), bounds.diff().numpy()

    def batch(self, number: int) -> Batch:
        """Batch `number` of this seed's endless sequence."""
        rng = np.random.default_rng((self.seed, number))
        tasks = rng.integers(len(self.task_first), size=self.batch_size)
        return self.gather(torch.from_numpy(self.task_first[tasks] + rng.integers(self.task_windows[tasks])))

    def gather(self, windows: Tensor) -> Batch:
        """The windows of these numbers (B,), each between 0 and the last of `window_ends` (excluded)."""
        episode = torch.searchsorted(self.window_ends, windows, right=True)  # (B,)
        length = self.episode_lengths[episode]
        first = windows - (self.window_ends[episode] - (length + self.context - 1)) - (self.context - 1)
        last = (first + self.context).clamp(max=length)  # (B,) excluded; first is -(context - 1) .. length - 1
        first = first.clamp(min=0)
        steps = first[:, None] + torch.arange(self.context)  # (B, T) within the episode
        mask = steps < last[:, None]
        rows = self.episode_starts[episode][:, None] + torch.where(mask, steps, first[:, None])  # (B, T)

        def take(column: Tensor) -> Tensor:
            values = column[rows]  # (B, T, ...)
            return values * mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)

        return Batch(
            observations=take(self.observations),
            actions=take(self.actions),
            returns_to_go=take(self.returns_to_go),
            rewards=take(self.rewards),
            mask=mask,
            interface=self.interface,
        )
