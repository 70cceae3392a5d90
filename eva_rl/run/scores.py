"""Episodes -> the three scores every result states, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from eva_rl.run.intervals import Estimate, mean, proportion

SCORES = ("success_rate", "success_at_end", "episode_return", "normalized_score")
RATES = SCORES[:2]
Scores = dict[str, Estimate | None]
"""Scores by name. None where the environment does not define a score, its scale is missing, or nothing was played."""


class Played(Protocol):
    """Finished episodes."""

    @property
    def returns(self) -> np.ndarray:
        """(n,)"""
        ...

    @property
    def successes(self) -> np.ndarray | None:
        """(n,)"""
        ...

    @property
    def solved_at_end(self) -> np.ndarray | None:
        """(n,)"""
        ...


def scores(episodes: Played | None, scale: tuple[float, float] | None) -> Scores:
    """Success rate (solved at any step, as Meta-World counts), success at the last step (as L2M, arXiv 2306.14884,
    counts), episode return, and the return with `scale` (random, expert) as 0 and 1."""
    if episodes is None:
        return dict.fromkeys(SCORES)
    return {
        "success_rate": None if episodes.successes is None else proportion(episodes.successes),
        "success_at_end": None if episodes.solved_at_end is None else proportion(episodes.solved_at_end),
        "episode_return": mean(episodes.returns),
        "normalized_score": None if scale is None else mean((episodes.returns - scale[0]) / (scale[1] - scale[0])),
    }


def failures_counted(found: Sequence[Scores]) -> list[Scores]:
    """Scores of one task, where an environment that mentions success in any of them mentions it: else nothing succeeded.

    Some environments say `success` only where there is one, so that a policy which never succeeds is told nothing about it. What a
    task has is therefore decided over all that was played of it.
    """
    return [own | _failures(own, found) for own in found]


def _failures(own: Scores, others: Sequence[Scores]) -> Scores:
    """The rates that these scores lack and others of the same task have, as 0.

    There are none where nothing was rolled out.
    """
    played = own["episode_return"]
    if played is None:
        return {}
    unsaid = [name for name in RATES if own[name] is None and any(other[name] is not None for other in others)]
    return {name: proportion(np.zeros(played.n, bool)) for name in unsaid}


def to_json(found: Scores) -> dict[str, Any]:
    """Scores as result.json states them."""
    return {name: None if estimate is None else asdict(estimate) for name, estimate in found.items()}


def from_json(found: Mapping[str, Any]) -> Scores:
    """The inverse of `to_json`."""
    return {name: None if found[name] is None else Estimate(**found[name]) for name in SCORES}


def to_scalars(found: Scores) -> Mapping[str, float]:
    """Scores as TensorBoard shows them."""
    return {f"evaluation/{name}": estimate.mean for name, estimate in found.items() if estimate is not None}
