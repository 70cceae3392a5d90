"""Windows as a mirror shows them: twice the trajectories, in tasks whose world has a plane of symmetry."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eva_rl.batch import Batch


class Sampler(Protocol):
    """What draws windows, such as a `WindowSampler`."""

    seed: int

    def batch(self, number: int) -> Batch: ...

    def spread(self, number: int) -> Batch: ...


class MirroredSampler:
    """Draws windows and shows every second one, on average, as its mirror image.

    Batch number n is a pure function of the seed and n, as it is without the mirror.

    Args:
        sampler: whose windows they are.
        observation_signs: (obs,) 1 or -1, by which the numbers of a flat observation are multiplied in the mirror.
        action_signs: (act,) the same of an action.
    """

    def __init__(self, sampler: Sampler, observation_signs: np.ndarray, action_signs: np.ndarray):
        self.sampler, self.seed = sampler, sampler.seed
        self.signs = [torch.as_tensor(signs, dtype=torch.float32) for signs in (observation_signs, action_signs)]

    def batch(self, number: int) -> Batch:
        """Batch `number` of this seed's endless sequence."""
        return self._mirrored(self.sampler.batch(number), number)

    def spread(self, number: int) -> Batch:
        """As `WindowSampler.spread`."""
        return self._mirrored(self.sampler.spread(number), number)

    def _mirrored(self, batch: Batch, number: int) -> Batch:
        heads = np.random.default_rng((self.seed, number, 2)).random(len(batch.mask)) < 0.5
        chosen = torch.from_numpy(heads).view(-1, 1, 1)  # (B, 1, 1)

        def mirrored(values: Tensor, signs: Tensor) -> Tensor:  # (B, T, size)
            return torch.where(chosen, values * signs, values)

        seen, done = self.signs
        return replace(
            batch,
            observations=mirrored(batch.observations, seen),
            actions=mirrored(batch.actions, done),
            labels=None if batch.labels is None else mirrored(batch.labels, done),
        )
