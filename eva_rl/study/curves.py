"""Learning curves: straight lines between the scores at some steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def area(curve: Sequence[tuple[int, float]]) -> float:
    """The mean height of a curve of straight lines through these points."""
    steps, heights = np.array(curve, float).T
    return float((np.diff(steps) * (heights[1:] + heights[:-1]) / 2).sum() / (steps[-1] - steps[0]))


def steps_to(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """Where a curve of straight lines through these points first reaches the level."""
    before = None
    for step, height in curve:
        if height >= level:
            return (
                float(step)
                if before is None
                else before[0] + (step - before[0]) * (level - before[1]) / (height - before[1])
            )
        before = step, height
    return None


def steps_in_words(curve: Sequence[tuple[int, float]], level: float) -> str:
    """`steps_to` in words for a table: beyond the last step where the level is not reached."""
    steps = steps_to(curve, level)
    return f"> {curve[-1][0]}" if steps is None else f"{steps:.0f}"
