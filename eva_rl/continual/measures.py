"""Continual World's measures (Wolczyk et al. 2021, arXiv 2105.10919, section 4.1) of a sequence of N tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(step, score) of one task while it is trained, from its first step to its last."""


def average_performance(matrix: np.ndarray) -> float:
    """P(T): the mean over tasks of the score at the end of the sequence.

    Args:
        matrix: (N, N) row i: the scores of all tasks after task i was learned.
    """
    return float(matrix[-1].mean())


def forgetting(matrix: np.ndarray) -> float:
    """F: the mean over all N tasks of the score when the task's own training ended, less that at the sequence's end.

    F is below 0 where tasks got better afterwards.
    """
    return float((np.diag(matrix) - matrix[-1]).mean())


def area(curve: Curve) -> float:
    """AUC: the mean score over a task's own training, by the trapezoidal rule.

    Raises:
        ValueError: if it has fewer than two points.
    """
    if len(curve) < 2:
        raise ValueError("a curve needs two points")
    steps, scores = np.array(curve, float).T
    return float((np.diff(steps) * (scores[1:] + scores[:-1]) / 2).sum() / (steps[-1] - steps[0]))


def forward_transfer(curves: Sequence[Curve], reference: Sequence[Curve]) -> float | None:
    """FT: the mean over tasks of (AUC_i - AUC_i^b) / (1 - AUC_i^b), b being the task trained alone.

    None where a reference's area is 1, beside which nothing can be better.
    """
    areas = [(area(own), area(alone)) for own, alone in zip(curves, reference, strict=True)]
    if any(alone >= 1 for _, alone in areas):
        return None
    return float(np.mean([(own - alone) / (1 - alone) for own, alone in areas]))
