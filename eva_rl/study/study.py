"""Methods that were run under one protocol, and what their runs scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from eva_rl.run import Estimate, RunResult
from eva_rl.study.bootstrap import (
    Runs,
    Statistic,
    average,
    permutation_test,
    probability_of_improvement,
    stratified,
)
from eva_rl.study.curves import area

REFERENCE = "full"
"""The adapter whose final score the others' learning curves are measured by."""
T = TypeVar("T")


@dataclass
class Study:
    """Methods that were run under one protocol, which is all settings but the method's, the task and the seed."""

    protocol: dict[str, Any]
    score: str
    """The score they are compared by: the success rate, or the normalised score where there is a task without success."""
    methods: dict[str, list[RunResult]]
    """Each method's runs on the tasks and seeds that all methods have."""
    title: str = ""
    """How its protocol differs from those of the other studies."""
    amiss: list[str] = field(default_factory=list)
    """What was left out, a sentence each."""

    @property
    def tasks(self) -> list[str]:
        return sorted({run.task for runs in self.methods.values() for run in runs})

    @property
    def short_tasks(self) -> list[str]:
        """The tasks without their domains, where that leaves them apart."""
        short = [task.partition("/")[2] or task for task in self.tasks]
        return short if len(set(short)) == len(short) else self.tasks

    @property
    def references(self) -> list[str]:
        """The methods by whose final score the others' learning curves could be measured: full fine-tuning."""
        return [name for name, runs in self.methods.items() if runs[0].adapter == REFERENCE]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for runs in self.methods.values() for run in runs})

    def scores(self, method: str) -> dict[str, list[float]]:
        """Each task's scores, a run each, in the order of their seeds, which all methods have."""
        return self._by_task(method, self.score_of)

    def score_of(self, run: RunResult) -> float:
        """A run's score.

        Raises:
            ValueError: if it has none, as none of the study's methods' runs does.
        """
        if (own := run.scores[self.score]) is None:
            raise ValueError(f"A run of {run.task} has no {self.score}.")
        return own.mean

    def estimate(self, runs: Runs, statistic: Statistic = average) -> Estimate:
        """A statistic of these runs' scores with its interval, which for success rates lies within 0 and 1."""
        found = stratified(runs, statistic)
        if self.score != "success_rate" or found.low is None or found.high is None:
            return found
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))

    def areas(self, method: str) -> dict[str, list[float]] | None:
        """Each task's areas under the learning curve, from 0 to the last step, as a mean over the steps."""
        if any(len(self.curve(run) or ()) < 3 for run in self.methods[method]):
            return None
        return self._by_task(method, lambda run: area(self.curve(run) or ()))

    def curve(self, run: RunResult) -> list[tuple[int, float]] | None:
        """(steps, score) from zero-shot to the end, or None where the run has no zero-shot score."""
        before = run.zero_shot[self.score]
        if before is None:
            return None
        between = {int(step): own.mean for step, found in run.curve.items() if (own := found[self.score]) is not None}
        return sorted(({0: before.mean} | between | {run.steps: self.score_of(run)}).items())

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

    def _by_task(self, method: str, value: Callable[[RunResult], T]) -> dict[str, list[T]]:
        runs = self.methods[method]
        return {task: [value(run) for run in runs if run.task == task] for task in self.tasks}


def improvement(study: Study, method: str, other: str) -> Estimate:
    return probability_of_improvement(study.scores(method), study.scores(other))


def told_apart(study: Study, method: str, other: str) -> bool:
    """Whether a permutation test rejects at 5 % that the two score alike."""
    first, second = sorted((method, other))  # the same exchanges whoever is asked about
    return method != other and permutation_test(study.scores(first), study.scores(second)) <= 0.05
