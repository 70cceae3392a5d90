"""Finished runs -> methods compared: on the tasks and seeds that all of them have, under one protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_high
from typing import Any

from eva_rl.run import Estimate, RunResult
from eva_rl.study.labels import MISSING, Labelled, differing, in_words, labelled
from eva_rl.study.read import read_results
from eva_rl.study.study import REFERENCE, Study

Cells = dict[tuple[str, int], RunResult]
"""A method's runs by task and seed."""


@dataclass(frozen=True)
class Comparison:
    """Runs, and what they say about their methods."""

    runs: list[Labelled]
    studies: list[Study]
    """A protocol each."""
    varied: Varied | None
    """What came of the one number in which the protocols differ, if they differ in no more."""
    left_out: list[str]
    """Runs that were found and left out, a sentence each."""

    @property
    def amiss(self) -> list[str]:
        """All that was left out or is missing, a sentence each."""
        return self.left_out + [sentence for study in self.studies for sentence in study.amiss]


def compare(folders: Iterable[Path]) -> Comparison:
    """The finished fine-tuning runs below these folders, compared.

    Raises:
        UserError: if a folder does not exist.
    """
    return compared(*read_results(folders))


def compared(results: Sequence[RunResult], left_out: Sequence[str] = ()) -> Comparison:
    """These runs, compared."""
    runs = labelled(results)
    found = studies(runs)
    return Comparison(runs, found, varied(found), list(left_out))


def studies(runs: Sequence[Labelled]) -> list[Study]:
    """The protocols among these runs, each with its methods.

    Methods of one name are told apart by the settings in which they differ. Runs are left out, and named, if they are
    on tasks or seeds that not all methods of a protocol have, or lack the score that the others have. Of three methods
    or more, those with less than half of the median number of runs are left out and named too.
    """
    protocols: dict[str, list[Labelled]] = {}
    for run in runs:
        protocols.setdefault(in_words(run.protocol), []).append(run)
    found = [_study(own) for own in protocols.values()]
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


def _study(runs: Sequence[Labelled]) -> Study:
    """The methods of runs of one protocol."""
    score = _score_of([own.run for own in runs])
    cells, amiss = _cells(runs, score)
    amiss += _without_small_ones(cells)
    shared = set.intersection(*map(set, cells.values())) if cells else set()
    if cells and not shared:
        amiss.append(f"{'; '.join(sorted(cells))} have no task and seed in common: they are not compared")
    amiss += _missing(cells, shared)
    methods = {label: [own[cell] for cell in sorted(shared)] for label, own in sorted(cells.items())}
    study = Study(runs[0].protocol, score, methods if shared else {}, amiss=amiss)
    if any(run.curve for own in study.methods.values() for run in own):
        amiss += _about_curves(study)
    return study


def _score_of(runs: Sequence[RunResult]) -> str:
    """The success rate, or the normalised score where there is a task that has this and not the other."""
    rated = {run.task for run in runs if run.scores["success_rate"] is not None}
    unrated = any(run.scores["normalized_score"] is not None for run in runs if run.task not in rated)
    return "normalized_score" if unrated else "success_rate"


def _cells(runs: Sequence[Labelled], score: str) -> tuple[dict[str, Cells], list[str]]:
    """Each method's runs by task and seed, but for those that can't be compared, each of which has a sentence."""
    amiss: list[str] = []
    cells: dict[str, Cells] = {}
    twice = set()
    for own in runs:
        run, cell = own.run, (own.run.task, own.run.seed)
        if run.scores[score] is None:
            amiss.append(f"{own.method}: {run.task}, seed {run.seed} left out: it has no {score.replace('_', ' ')}")
        elif cell in cells.setdefault(own.method, {}):
            twice.add((own.method, *cell))
        else:
            cells[own.method][cell] = run
    for label, task, seed in sorted(twice):
        del cells[label][task, seed]
        amiss.append(f"{label}: {task}, seed {seed} left out: it is there twice, with other settings")
    return cells, amiss


def _without_small_ones(cells: dict[str, Cells]) -> list[str]:
    """Take out methods with less than half of the median number of runs, if there are three methods or more.

    Returns:
        A sentence for each.
    """
    counts = [len(own) for own in cells.values()]
    usual = median_high(counts) if len(counts) > 2 else min(counts, default=0)
    return [
        f"{label}: left out, as it has few runs ({len(cells.pop(label))}, where half of the methods have {usual} or more)"
        for label in sorted(label for label, own in cells.items() if 2 * len(own) < usual)
    ]


def _missing(cells: Mapping[str, Cells], shared: set[tuple[str, int]]) -> list[str]:
    """A sentence for runs that some methods lack, and for seeds that some tasks do."""
    amiss = []
    everywhere = set().union(*cells.values())
    missing: dict[str, list[str]] = {}
    for label, own in sorted(cells.items()):
        missing.setdefault(cells_in_words(everywhere - set(own)), []).append(label)
    for place, names in missing.items():
        if place:
            amiss.append(f"{'; '.join(names)}: missing {place}; for all methods left out of the comparison")
    for task in sorted({task for task, _ in shared}):
        absent = sorted({seed for _, seed in shared} - {seed for other, seed in shared if other == task})
        if absent:
            amiss.append(f"{task}: missing seed {', '.join(map(str, absent))}, its mean is of the others")
    return amiss


def _about_curves(study: Study) -> list[str]:
    """Why there are no learning curves of some methods, or nothing to measure them by, a sentence each."""
    found, bare = [], []
    for name, runs in study.methods.items():
        if any(run.zero_shot[study.score] is None for run in runs):
            bare.append(name)
        elif len(study.mean_curve(name)) < 3 and any(run.trainable_parameters for run in runs):
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


def cells_in_words(cells: set[tuple[str, int]]) -> str:
    """Tasks and seeds, to stand in a sentence."""
    seeds: dict[str, list[int]] = {}
    for task, seed in sorted(cells):
        seeds.setdefault(task, []).append(seed)
    return "; ".join(f"{task} seed {', '.join(map(str, own))}" for task, own in seeds.items())


@dataclass(frozen=True)
class Varied:
    """What came of one number of the protocol, by method."""

    setting: str
    score: str
    lines: dict[str, list[tuple[float, Estimate]]]
    """Each method's mean score at every value, in order."""
    left_out: str
    """The tasks and seeds that not all values have. Empty if all have the same."""


def varied(studies: Sequence[Study]) -> Varied | None:
    """The studies as values of the one numeric setting in which their protocols differ, on the tasks and seeds that all have.

    None if they differ in something else too, or have no task and seed in common.
    """
    compared = [study for study in studies if study.methods]
    differs = differing([study.protocol for study in compared]) if len(compared) > 1 else []
    given = [study.protocol.get(name) for study in compared for name in differs]
    values = [value for value in given if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(differs) != 1 or len(values) < len(given):
        return None
    cells = [{(r.task, r.seed) for runs in study.methods.values() for r in runs} for study in compared]
    shared, everywhere = set.intersection(*cells), set.union(*cells)
    if not shared or len({study.score for study in compared}) > 1:
        return None
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for value, study in sorted(zip(values, compared, strict=True), key=lambda pair: pair[0]):
        for name, runs in study.methods.items():
            own = replace(study, methods={name: [run for run in runs if (run.task, run.seed) in shared]})
            lines.setdefault(name, []).append((value, own.estimate(own.scores(name))))
    return Varied(differs[0], compared[0].score, lines, cells_in_words(everywhere - shared))
