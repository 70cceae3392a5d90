"""Studies as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eva_rl.run import RunResult
from eva_rl.study.bootstrap import difference, interquartile_mean, stratified
from eva_rl.study.compare import Varied
from eva_rl.study.curves import steps_in_words
from eva_rl.study.study import REFERENCE, Study, improvement, told_apart
from eva_rl.table import markdown


def varied_table(found: Varied) -> str:
    """A row a method, a column a value."""
    values = sorted({value for line in found.lines.values() for value, _ in line})
    rows = [(name, *(dict(line).get(value) for value in values)) for name, line in sorted(found.lines.items())]
    return markdown([f"{found.score.replace('_', ' ')} by {found.setting}", *map(str, values)], rows)


def method_table(study: Study) -> str:
    """A row a method: its scores over all tasks, how fast it learned, what it cost."""
    names = study.ranked()
    goal = stratified(study.scores(study.references[0])).mean if len(study.references) == 1 else None
    header = [
        "method",
        f"mean {study.score.replace('_', ' ')}",
        "interquartile mean",
        f"P({names[0]} > method)",
        f"{names[0]} - method",
        "area under curve",
    ]
    header += [f"steps to half of {REFERENCE}", f"to 90 % of {REFERENCE}", "weights", "init s", "train s", "runs"]
    return markdown(header, [_method_row(study, name, names[0], goal) for name in names])


def _method_row(study: Study, name: str, best: str, goal: float | None) -> tuple[object, ...]:
    """goal: the score that learning curves are measured by."""
    runs, own = study.methods[name], study.scores(name)
    areas, curve = study.areas(name), study.mean_curve(name)
    mark = goal if goal is not None and goal > 0 and len(curve) >= 3 else None
    behind = (improvement(study, best, name), difference(study.scores(best), own)) if name != best else (None, None)
    return (
        name,
        study.estimate(own),
        study.estimate(own, interquartile_mean),
        *behind,
        None if areas is None else study.estimate(areas),
        *(None if mark is None else steps_in_words(curve, part * mark) for part in (0.5, 0.9)),
        f"{np.mean([run.trainable_parameters for run in runs]):,.0f}",
        f"{_seconds(runs, 'init'):.1f}",
        f"{_seconds(runs, 'train'):.0f}",
        len(runs),
    )


def task_table(study: Study) -> str:
    """A row a method, a column a task."""
    rows = [
        (
            name,
            *(study.estimate({task: study.scores(name)[task]}) for task in study.tasks),
            f"{stratified(study.scores(name)).mean:.3f}",
        )
        for name in study.ranked()
    ]
    return markdown(["method", *study.short_tasks, "mean"], rows)


def improvement_table(study: Study) -> str:
    """The probability that the row's method scores more than the column's on the same task and seed.

    Numbers are bold where the two can be told apart.
    """
    names = study.ranked()

    def cell(row: str, column: str) -> str | None:
        if row == column:
            return None
        mark = "**" if told_apart(study, row, column) else ""
        return f"{mark}{improvement(study, row, column).mean:.2f}{mark}"

    return markdown(["P(row > column)", *names], [(row, *(cell(row, column) for column in names)) for row in names])


def _seconds(runs: Sequence[RunResult], phase: str) -> float:
    return float(np.median([run.seconds[phase] for run in runs]))
