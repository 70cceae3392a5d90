"""Episodes -> the three scores every result states, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from eva_rl.report.statistics import Estimate, mean, proportion

SCORES = ("success_rate", "success_at_end", "episode_return", "normalized_score")
Scores = dict[str, Estimate | None]
"""By name; None where the environment or the missing scale does not define a score, or nothing was rolled out."""


class Played(Protocol):
    """Finished episodes."""

    returns: np.ndarray  # (n,)
    successes: np.ndarray | None  # (n,)
    solved_at_end: np.ndarray | None  # (n,)


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


def to_json(found: Scores) -> dict[str, Any]:
    """Scores as result.json states them."""
    return {name: None if estimate is None else asdict(estimate) for name, estimate in found.items()}


def to_scalars(found: Scores) -> Mapping[str, float]:
    """Scores as TensorBoard shows them."""
    return {f"evaluation/{name}": estimate.mean for name, estimate in found.items() if estimate is not None}
