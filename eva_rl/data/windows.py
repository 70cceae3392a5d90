"""Packed trajectories -> random windows, by indexing alone.

Batch number n is a pure function of the seed and n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from eva_rl.batch import Batch
from eva_rl.data.trajectories import Trajectories

UNNAMED = 0.1
"""The share of windows that do not name their task, where they may.
So a model also knows tasks that it is not told of."""
JOINED = 2 * 2**30
"""Bytes of observations up to which a sampler joins its tasks, in memory."""


class WindowSampler:
    """Draws batches of windows: a task uniformly, then a window of one of its transitions, all of these equally likely.

    A window is any run of `context` consecutive steps that overlaps an episode, cut to the episode. Windows that hang
    over the beginning start at step 0 and are shorter, as histories are early in a rollout. Windows that hang over the
    end are shorter too. The real steps come first and zeros follow.

    named: whether batches say which of the trajectories a window is from (see `Batch.tasks`). All but a share of
    `UNNAMED` of their windows then do.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectories],
        interface: str,
        context: int,
        batch_size: int,
        seed: int,
        named: bool = False,
    ):
        self.named = named
        self.interface, self.context, self.batch_size, self.seed = interface, context, batch_size, seed
        bytes_in_all = sum(t.observations.numel() * t.observations.element_size() for t in trajectories)
        if bytes_in_all <= JOINED:
            self.observations = [torch.cat([t.observations for t in trajectories])]
        else:  # mapped from disk, see `load_dataset`: each task stays where it is
            self.observations = [t.observations for t in trajectories]
        self.actions = torch.cat([t.actions for t in trajectories])
        labels = [t.actions if t.labels is None else t.labels for t in trajectories]
        self.labels = None if all(t.labels is None for t in trajectories) else torch.cat(labels)
        self.rewards = torch.cat([t.rewards for t in trajectories])
        self.returns_to_go = torch.cat([t.returns_to_go for t in trajectories])
        offsets = np.cumsum([0, *(len(t.rewards) for t in trajectories)])
        self.observations_dtype = reduce(torch.promote_types, (t.dtype for t in self.observations))
        self.observations_first = torch.from_numpy(offsets[: len(self.observations)])
        self.episode_starts = torch.cat([t.starts[:-1] + o for t, o in zip(trajectories, offsets[:-1], strict=True)])
        self.episode_lengths = torch.cat([t.lengths for t in trajectories])
        # Windows are numbered through: an episode of T steps has T + context - 1 of them.
        self.window_ends = (self.episode_lengths + context - 1).cumsum(0)
        episodes = np.cumsum([0, *(len(t.lengths) for t in trajectories)])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), self.window_ends])[torch.from_numpy(episodes)]
        self.task_first, self.task_windows = bounds[:-1].numpy(), bounds.diff().numpy()

    def batch(self, number: int) -> Batch:
        """Batch `number` of this seed's endless sequence."""
        return self.draw(np.random.default_rng((self.seed, number)), self.batch_size)

    def spread(self, number: int) -> Batch:
        """Batch `number` of another endless sequence, whose windows lie across all episodes and their whole length.

        The windows are a Latin hypercube (McKay et al. 1979) over episodes and phases. Every transition is as likely as
        in `batch`, but the first batches already hold each phase of an episode, a late one too. This is meant for what
        looks at few batches.
        """
        rng, n = np.random.default_rng((self.seed, number, 1)), self.batch_size
        across = (np.arange(n) + rng.random(n)) / n * len(self.task_first)  # (n,) tasks, and places within them
        along = (rng.permutation(n) + rng.random(n)) / n  # (n,) how far into its episode each window lies
        tasks = across.astype(np.int64)
        place = self.task_first[tasks] + ((across - tasks) * self.task_windows[tasks]).astype(np.int64)
        episode = torch.searchsorted(
            self.window_ends, torch.from_numpy(place), right=True
        )  # (n,) by its share of windows
        count = self.episode_lengths[episode] + self.context - 1
        return self.gather(self.window_ends[episode] - count + (torch.from_numpy(along) * count).long())

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """So many windows."""
        tasks = rng.integers(len(self.task_first), size=count)
        batch = self.gather(torch.from_numpy(self.task_first[tasks] + rng.integers(self.task_windows[tasks])))
        if not self.named:
            return batch
        told = np.where(rng.random(count) < UNNAMED, -1, tasks)
        return replace(batch, tasks=torch.from_numpy(told))

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

        def masked(values: Tensor) -> Tensor:  # (B, T, ...)
            return values * mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)

        return Batch(
            observations=masked(self._observations(rows)),
            actions=masked(self.actions[rows]),
            returns_to_go=masked(self.returns_to_go[rows]),
            rewards=masked(self.rewards[rows]),
            mask=mask,
            interface=self.interface,
            labels=None if self.labels is None else masked(self.labels[rows]),
        )

    def _observations(self, rows: Tensor) -> Tensor:
        """The observations of these rows (B, T), those of a window all of one task."""
        if len(self.observations) == 1:
            return self.observations[0][rows]
        found = torch.empty(*rows.shape, self.observations[0].shape[1], dtype=self.observations_dtype)
        tasks = torch.searchsorted(self.observations_first, rows[:, 0].contiguous(), right=True) - 1
        for task in tasks.unique().tolist():
            own = tasks == task
            found[own] = self.observations[task][rows[own] - self.observations_first[task]].to(found.dtype)
        return found
