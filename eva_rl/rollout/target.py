"""What return a policy is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eva_rl.errors import UserError

if TYPE_CHECKING:
    from eva_rl.interface import TaskStatistics

SWEEP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Where a sweep asks: 0 is the mean of the trajectories' returns, 1 the best of them."""


@dataclass(frozen=True)
class TargetReturn:
    """`max` (None too): the best return in the task's trajectories, as in EVA's experiment; `q0.9`: that quantile of their
    returns; a number; `sweep`: several, from below their mean to beyond the best.

    Raises:
        UserError: if it is none of these.
    """

    asked: str | None = None

    def __post_init__(self) -> None:
        if self.asked in (None, "max", "sweep") or self._quantile() is not None or _number(self.asked) is not None:
            return
        raise UserError(
            f"target_return={self.asked} was given where max, a quantile such as q0.9, a number or sweep was expected."
        )

    def _quantile(self) -> float | None:
        share = _number(self.asked[1:]) if self.asked and self.asked.startswith("q") else None
        return share if share is not None and 0 <= share <= 1 else None

    @property
    def sweeps(self) -> bool:
        return self.asked == "sweep"

    @property
    def known(self) -> bool:
        """Whether it is a number, for which no trajectories need to be known."""
        return self.asked is not None and _number(self.asked) is not None

    def returns(self, task: str, statistics: TaskStatistics | None) -> list[float]:
        """What to ask for in a task whose trajectories have these statistics; one return unless this is a sweep.

        Raises:
            UserError: if the statistics do not say.
        """
        if self.known:
            return [_number(self.asked)]
        if statistics is None:
            raise UserError(f"Nothing is known of trajectories of '{task}': set target_return to a number.")
        if self.sweeps:
            mean, span = statistics.return_mean, statistics.return_max - statistics.return_mean
            return list(dict.fromkeys(mean + where * span for where in SWEEP))  # one, if all returns are equal
        share = self._quantile()
        if share is None:
            return [statistics.return_max]
        if not statistics.return_deciles:
            raise UserError(
                f"The checkpoint keeps no quantiles of the returns in '{task}': set target_return to a number."
            )
        deciles = statistics.return_deciles
        return [float(np.interp(share, np.linspace(0, 1, len(deciles)), deciles))]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
