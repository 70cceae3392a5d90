"""Finished runs -> methods compared: on the tasks and seeds that all of them have, under one protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_high
from typing import Any

import numpy as np

from eva_rl.report.labels import MISSING, differing, in_words, labels, protocol_of
from eva_rl.report.statistics import Estimate
from eva_rl.report.study import (
    Runs,
    Statistic,
    average,
    difference,
    interquartile_mean,
    permutation_test,
    probability_of_improvement,
    stratified,
)
from eva_rl.report.table import markdown

REFERENCE = "full"
"""The adapter whose final score the others' learning curves are measured by."""


@dataclass
class Study:
    """Methods that were run under one protocol, which is all settings but the method's, the task and the seed."""

    protocol: dict[str, Any]
    score: str
    """The score they are compared by: the success rate, or the normalised score where there is a task without success."""
    methods: dict[str, list[Mapping[str, Any]]]
    """Each method's runs on the tasks and seeds that all methods have."""
    title: str = ""
    """In what its protocol differs from those of the other studies."""
    amiss: list[str] = field(default_factory=list)
    """What was left out, a sentence each."""

    @property
    def tasks(self) -> list[str]:
        return sorted({run["task"] for runs in self.methods.values() for run in runs})

    @property
    def short_tasks(self) -> list[str]:
        """The tasks without their domains, where that leaves them apart."""
        short = [task.partition("/")[2] or task for task in self.tasks]
        return short if len(set(short)) == len(short) else self.tasks

    @property
    def references(self) -> list[str]:
        """The methods by whose final score the others' learning curves could be measured: full fine-tuning."""
        return [name for name, runs in self.methods.items() if runs[0]["adapter"] == REFERENCE]

    @property
    def seeds(self) -> list[int]:
        return sorted({run["seed"] for runs in self.methods.values() for run in runs})

    def scores(self, method: str) -> dict[str, list[float]]:
        """Each task's scores, a run each, in the order of their seeds, which all methods have."""
        return self._by_task(method, lambda run: run[self.score]["mean"])

    def estimate(self, runs: Runs, statistic: Statistic = average) -> Estimate:
        """A statistic of these runs' scores with its interval, which for success rates lies within 0 and 1."""
        found = stratified(runs, statistic)
        if self.score != "success_rate" or found.low is None:
            return found
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))

    def areas(self, method: str) -> dict[str, list[float]] | None:
        """Each task's areas under the learning curve, from 0 to the last step, as a mean over the steps."""
        curves = [self.curve(run) for run in self.methods[method]]
        if not all(curves) or any(len(curve) < 3 for curve in curves):
            return None
        return self._by_task(method, lambda run: area(self.curve(run)))

    def curve(self, run: Mapping[str, Any]) -> list[tuple[int, float]] | None:
        """(steps, score) from zero-shot to the end; None where the run has no zero-shot score."""
        before = run["zero_shot"][self.score]
        if before is None:
            return None
        points = {0: before["mean"]}
        points |= {int(step): f[self.score]["mean"] for step, f in run["curve"].items() if f[self.score] is not None}
        return sorted((points | {run["steps"]: run[self.score]["mean"]}).items())

    def mean_curve(self, method: str) -> list[tuple[int, float]]:
        """The mean learning curve over tasks, each of them the mean of its runs', at the steps that all runs have."""
        curves = self._by_task(method, lambda run: dict(self.curve(run) or ()))
        steps = sorted(set.intersection(*(set(curve) for own in curves.values() for curve in own)))
        return [
            (step, float(np.mean([np.mean([curve[step] for curve in own]) for own in curves.values()])))
            for step in steps
        ]

    def ranked(self) -> list[str]:
        """The methods, the best mean first."""
        return sorted(self.methods, key=lambda method: (-stratified(self.scores(method)).mean, method))

    def _by_task(self, method: str, value: Any) -> dict[str, list[float]]:
        runs = self.methods[method]
        return {task: [value(run) for run in runs if run["task"] == task] for task in self.tasks}


def studies(results: Sequence[Mapping[str, Any]]) -> list[Study]:
    """The protocols among these runs, each with its methods.

    Methods of one name are told apart by the settings in which they differ. Left out and named are runs on tasks or seeds
    that not all methods of a protocol have, runs without the score that the others have, and of three methods or more those
    with less than half of the median number of runs.
    """
    protocols: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for label, run in zip(labels(results), results, strict=True):
        protocols.setdefault(in_words(protocol_of(run)), []).append((label, run))
    found = [_study(json.loads(protocol), runs) for protocol, runs in protocols.items()]
    differs = differing([study.protocol for study in found])
    found.sort(key=lambda study: [_in_order(study.protocol.get(name)) for name in differs])
    for study in found:
        study.title = ", ".join(f"{name}={study.protocol.get(name, MISSING)}" for name in differs)
    if len(found) > 1 and varied(found) is None:
        for study in (study for study in found if len(study.methods) == 1):
            study.amiss.append(f"{next(iter(study.methods))}: no other method to compare it with under {study.title}")
    return found


def _in_order(value: Any) -> tuple[bool, float, str]:
    """A key that puts numbers before text, each in its order."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _study(protocol: dict[str, Any], runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Study:
    """runs: each with the label of its method."""
    rated = {run["task"] for _, run in runs if run["success_rate"] is not None}
    unrated = any(run["normalized_score"] is not None for _, run in runs if run["task"] not in rated)
    score = "normalized_score" if unrated else "success_rate"
    amiss: list[str] = []
    cells: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    twice = set()
    for label, run in runs:
        cell = run["task"], run["seed"]
        if run[score] is None:
            amiss.append(f"{label}: {run['task']}, seed {run['seed']} left out: it has no {score.replace('_', ' ')}")
        elif cell in cells.setdefault(label, {}):
            twice.add((label, *cell))
        else:
            cells[label][cell] = run
    for label, task, seed in sorted(twice):
        del cells[label][task, seed]
        amiss.append(f"{label}: {task}, seed {seed} left out: it is there twice, with other settings")
    counts = [len(own) for own in cells.values()]
    usual = median_high(counts) if len(counts) > 2 else min(counts, default=0)
    for label in sorted(label for label, own in cells.items() if 2 * len(own) < usual):
        amiss.append(
            f"{label}: left out, as it has few runs ({len(cells.pop(label))}, where half of the methods have {usual} or more)"
        )
    shared = set.intersection(*map(set, cells.values())) if cells else set()
    if cells and not shared:
        amiss.append(f"{'; '.join(sorted(cells))} have no task and seed in common: they are not compared")
    everywhere = set().union(*cells.values())
    missing: dict[str, list[str]] = {}
    for label, own in sorted(cells.items()):
        missing.setdefault(_cells_in_words(everywhere - set(own)), []).append(label)
    for place, names in missing.items():
        if place:
            amiss.append(f"{'; '.join(names)}: missing {place}; for all methods left out of the comparison")
    for task in sorted({task for task, _ in shared}):
        absent = sorted({seed for _, seed in shared} - {seed for other, seed in shared if other == task})
        if absent:
            amiss.append(f"{task}: missing seed {', '.join(map(str, absent))}, its mean is of the others")
    methods = {label: [own[cell] for cell in sorted(shared)] for label, own in sorted(cells.items())}
    study = Study(protocol, score, methods if shared else {}, amiss=amiss)
    if any(run["curve"] for own in study.methods.values() for run in own):
        amiss += _about_curves(study)
    return study


def _about_curves(study: Study) -> list[str]:
    """Why there are no learning curves of some methods, or nothing to measure them by; a sentence each."""
    found, bare = [], []
    for name, runs in study.methods.items():
        if any(run["zero_shot"][study.score] is None for run in runs):
            bare.append(name)
        elif len(study.mean_curve(name)) < 3 and any(run["trainable_parameters"] for run in runs):
            found.append(f"{name}: no learning curve, as not all of its runs have one")
    if bare:
        found.append(
            f"{'; '.join(bare)}: no learning curve, which begins with the base as it is: add runs of adapter=none on the same tasks "
            "and seeds, or run with zero_shot=true"
        )
    if len(study.references) > 1:
        found.append(f"{'; '.join(study.references)}: several, so that curves are measured by none of them")
    elif not study.references:
        found.append(f"{REFERENCE}: not there, so that curves are measured by nothing")
    return found


def _cells_in_words(cells: set[tuple[str, int]]) -> str:
    seeds: dict[str, list[int]] = {}
    for task, seed in sorted(cells):
        seeds.setdefault(task, []).append(seed)
    return "; ".join(f"{task} seed {', '.join(map(str, own))}" for task, own in seeds.items())


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


def _steps_in_words(curve: Sequence[tuple[int, float]], level: float) -> str:
    steps = steps_to(curve, level)
    return f"> {curve[-1][0]}" if steps is None else f"{steps:.0f}"


@dataclass(frozen=True)
class Varied:
    """What came of one number of the protocol, by method."""

    setting: str
    score: str
    lines: dict[str, list[tuple[float, Estimate]]]
    """Each method's mean score at every value, in order."""
    left_out: str
    """The tasks and seeds that not all values have; empty if all have the same."""


def varied(studies: Sequence[Study]) -> Varied | None:
    """The studies as values of the one numeric setting in which their protocols differ, on the tasks and seeds that all have.

    None if they differ in something else too, or have no task and seed in common.
    """
    compared = [study for study in studies if study.methods]
    differs = differing([study.protocol for study in compared]) if len(compared) > 1 else []
    values = [study.protocol.get(name) for study in compared for name in differs]
    if len(differs) != 1 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return None
    cells = [{(r["task"], r["seed"]) for runs in study.methods.values() for r in runs} for study in compared]
    shared, everywhere = set.intersection(*cells), set.union(*cells)
    if not shared or len({study.score for study in compared}) > 1:
        return None
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for value, study in sorted(zip(values, compared, strict=True), key=lambda pair: pair[0]):
        for name, runs in study.methods.items():
            own = replace(study, methods={name: [run for run in runs if (run["task"], run["seed"]) in shared]})
            lines.setdefault(name, []).append((value, own.estimate(own.scores(name))))
    return Varied(differs[0], compared[0].score, lines, _cells_in_words(everywhere - shared))


def varied_table(found: Varied) -> str:
    """A row a method, a column a value."""
    values = sorted({value for line in found.lines.values() for value, _ in line})
    rows = [(name, *(dict(line).get(value) for value in values)) for name, line in sorted(found.lines.items())]
    return markdown([f"{found.score.replace('_', ' ')} by {found.setting}", *map(str, values)], rows)


def method_table(study: Study) -> str:
    """A row a method: its scores over all tasks, how fast it learned, what it cost."""
    best = study.ranked()[0]
    goal = stratified(study.scores(study.references[0])).mean if len(study.references) == 1 else None
    rows = []
    for name in study.ranked():
        runs, own = study.methods[name], study.scores(name)
        areas, curve = study.areas(name), study.mean_curve(name)
        reached = [
            None if goal is None or goal <= 0 or len(curve) < 3 else _steps_in_words(curve, part * goal)
            for part in (0.5, 0.9)
        ]
        rows.append(
            (
                name,
                study.estimate(own),
                study.estimate(own, interquartile_mean),
                *(
                    (None, None)
                    if name == best
                    else (improvement(study, best, name), difference(study.scores(best), own))
                ),
                None if areas is None else study.estimate(areas),
                *reached,
                f"{np.mean([run['trainable_parameters'] for run in runs]):,.0f}",
                f"{_seconds(runs, 'init'):.1f}",
                f"{_seconds(runs, 'train'):.0f}",
                len(runs),
            )
        )
    score = study.score.replace("_", " ")
    header = [
        "method",
        f"mean {score}",
        "interquartile mean",
        f"P({best} > method)",
        f"{best} - method",
        "area under curve",
    ]
    header += [f"steps to half of {REFERENCE}", f"to 90 % of {REFERENCE}", "weights", "init s", "train s", "runs"]
    return markdown(header, rows)


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
    """The probability that the row's method scores more than the column's on the same task and seed; bold where they can be told apart."""
    names = study.ranked()

    def cell(row: str, column: str) -> str | None:
        if row == column:
            return None
        mark = "**" if told_apart(study, row, column) else ""
        return f"{mark}{improvement(study, row, column).mean:.2f}{mark}"

    return markdown(["P(row > column)", *names], [(row, *(cell(row, column) for column in names)) for row in names])


def improvement(study: Study, method: str, other: str) -> Estimate:
    return probability_of_improvement(study.scores(method), study.scores(other))


def told_apart(study: Study, method: str, other: str) -> bool:
    """Whether a permutation test rejects at 5 % that the two score alike."""
    first, second = sorted((method, other))  # the same exchanges whoever is asked about
    return method != other and permutation_test(study.scores(first), study.scores(second)) <= 0.05


def _seconds(runs: Sequence[Mapping[str, Any]], phase: str) -> float:
    return float(np.median([run["seconds"][phase] for run in runs]))
