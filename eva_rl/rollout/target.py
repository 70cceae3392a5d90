"""What return a policy is asked for."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eva_rl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eva_rl.interface import TaskStatistics

SWEEP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Where a sweep asks: 0 is the mean of the trajectories' returns, 1 the best of them."""


@dataclass(frozen=True)
class TargetReturn:
    """What return to ask for, as the settings say it.

    - `auto` (None too): the median return of the task's successful trajectories. Where success is unknown, the median
      of all, and where none succeeded, the best one.
    - `max`: the best, as in EVA's experiment. This may be that of a failure.
    - `q0.9`: that quantile of all returns.
    - A number.
    - `sweep`: several, from below their mean to beyond the best.

    Raises:
        UserError: if it is none of these.
    """

    asked: str | None = None

    def __post_init__(self) -> None:
        if self.asked in (None, "auto", "max", "sweep") or self._quantile() is not None or self.known:
            return
        raise UserError(
            f"target_return must be auto, max, a quantile such as q0.9, a number or sweep, got {self.asked}."
        )

    def _quantile(self) -> float | None:
        share = _number(self.asked[1:]) if self.asked and self.asked.startswith("q") else None
        return share if share is not None and 0 <= share <= 1 else None

    def _given(self) -> float | None:
        """The number that was asked for, if it is one."""
        return None if self.asked is None else _number(self.asked)

    @property
    def sweeps(self) -> bool:
        return self.asked == "sweep"

    @property
    def known(self) -> bool:
        """Whether it is a number, for which no trajectories need to be known."""
        return self._given() is not None

    def wanted(self, task: str, statistics: TaskStatistics | None, tokens: Sequence[str]) -> list[float]:
        """`returns` for a model that reads these tokens.

        Where the model reads no returns and nothing is known of them, this is 0, which the model ignores.

        Raises:
            UserError: if it reads returns, and nothing is known of the task's.
        """
        ignored = "return" not in tokens and statistics is None and not self.known
        return [0.0] if ignored else self.returns(task, statistics)

    def returns(self, task: str, statistics: TaskStatistics | None) -> list[float]:
        """What to ask for in a task whose trajectories have these statistics: one return, unless this is a sweep.

        Raises:
            UserError: if the statistics do not say.
        """
        if (number := self._given()) is not None:
            return [number]
        if statistics is None:
            raise UserError(
                f"Nothing is known of trajectories of '{task}', and so not what return to ask for: set target_return to a number, or "
                "name an adapter of that task."
            )
        if self.sweeps:
            mean, span = statistics.return_mean, statistics.return_max - statistics.return_mean
            return list(dict.fromkeys(mean + where * span for where in SWEEP))  # one, if all returns are equal
        if self.asked in (None, "auto"):
            return [statistics.return_max if statistics.return_typical is None else statistics.return_typical]
        share = self._quantile()
        if share is None:
            return [statistics.return_max]
        if not statistics.return_deciles:
            raise UserError(
                f"The checkpoint keeps no quantiles of the returns in '{task}': set target_return to a number."
            )
        deciles = statistics.return_deciles
        return [float(np.interp(share, np.linspace(0, 1, len(deciles)), deciles))]


def warn_if_far(target: float, task: str, statistics: TaskStatistics) -> None:
    """Warn of a return that no trajectory comes near: further beyond the worst or the best than half of what lies between them.

    Where all returns are equal, a tenth of them is near.
    """
    best, worst = statistics.return_max, min((*statistics.return_deciles, statistics.return_mean))
    near = max((best - worst) / 2, abs(best) / 10)
    if not worst - near <= target <= best + near:
        warnings.warn(
            f"target_return={target:g} is asked for in '{task}', whose trajectories returned {worst:g} to {best:g}: what the model does "
            "then is a guess.",
            stacklevel=2,
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
