"""Where the randomness of episodes and batches comes from: pure functions of the run's seed, never of the order of work."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np

from eva_rl.errors import UserError

HALF = 2**30


def episode_seed(purpose: Literal["collect", "evaluate"], task: str, seed: int, episode: int) -> int:
    """The seed that one episode's environment is reset with.

    Seeds for collecting lie in [0, 2**30), those for evaluating in [2**30, 2**31), so no policy is scored on a seed
    that its data came from, whatever the two runs' seeds.
    """
    drawn = int(_sequence(task, seed, episode).generate_state(1)[0]) % HALF
    return drawn + HALF if purpose == "evaluate" else drawn


def evaluation_seeds(task: str, seed: int, episodes: int) -> list[int]:
    """The environment seeds of an evaluation of so many episodes.

    Raises:
        UserError: if `episodes` is negative.
    """
    if episodes < 0:
        raise UserError(f"episodes must be at least 0, got {episodes}.")
    return [episode_seed("evaluate", task, seed, episode) for episode in range(episodes)]


def episode_rng(task: str, seed: int, episode: int) -> np.random.Generator:
    """Randomness of one episode's policy (action noise), independent of its environment's."""
    return np.random.default_rng(_sequence(task, seed, episode).spawn(1)[0])


def _sequence(task: str, seed: int, episode: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, zlib.crc32(task.encode()), episode))
