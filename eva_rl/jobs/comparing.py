"""Finished runs -> how their methods compare, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from eva_rl.errors import UserError
from eva_rl.jobs.execute import Run


@dataclass(frozen=True)
class Compared:
    """One method among those that were run under one protocol, on the tasks and seeds that all of them have."""

    study: str
    """How the protocol differs from those of the other studies. Empty if there is only one study."""
    method: str
    score: str
    """What they are compared by, such as `success_rate`."""
    mean: float
    low: float | None
    """The lower end of the 95 % interval. `high` is the upper end. Both are None where runs are too few."""
    high: float | None
    interquartile_mean: float
    runs: int
    trainable_parameters: float
    """The mean over the runs."""


def compare(runs: str | Path | Run | Iterable[str | Path | Run]) -> list[Compared]:
    """The report's table of methods as data, the best first.

    `python -m eva_rl.report` prints this table.

    Args:
        runs: a folder that holds runs, a run, or several of them.

    Raises:
        UserError: if a folder is not there, or holds no complete fine-tuning run.
    """
    from eva_rl import study
    from eva_rl.study.bootstrap import interquartile_mean

    given = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    found = study.compare([own.folder if isinstance(own, Run) else Path(own) for own in given])
    if not found.runs:
        raise UserError("There is no complete fine-tuning run in these folders.")
    rows = []
    for own in found.studies:
        for name in own.ranked():
            scores = own.scores(name)
            mean, middle = own.estimate(scores), own.estimate(scores, interquartile_mean)
            weights = fmean(run.trainable_parameters for run in own.methods[name])
            interval = mean.mean, mean.low, mean.high, middle.mean
            rows.append(Compared(own.title, name, own.score, *interval, len(own.methods[name]), weights))
    return rows
