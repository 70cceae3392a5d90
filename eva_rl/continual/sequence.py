"""Tasks one after the other: learn one, score all, write. An interrupted run goes on from what is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.continual.learners import Lessons, learner_of
from eva_rl.continual.measures import Curve, area, average_performance, forgetting, forward_transfer
from eva_rl.errors import UserError
from eva_rl.files import read_json, replacing, write_json
from eva_rl.run import versions
from eva_rl.table import markdown

RESULT = "result.json"


def run_sequence(lessons: Lessons, facts: Mapping[str, Any], reference: Sequence[Curve] | None) -> dict[str, Any]:
    """Learn all tasks of `lessons.stage`, from where `result.json` says that an earlier run of the same `facts` stopped.

    Returns:
        The result, as `result.json` has it, with the measures. Row i of `matrix` (N, N) holds the scores of all tasks
        after task i, and `before` (N,) those of the base. `curves` holds each task's scores while it was trained.

    Raises:
        UserError: if the folder holds another run.
    """
    path, tasks = lessons.folder / RESULT, [source.task for source in lessons.stage.sources]
    earlier = _earlier(path, facts)
    before, matrix, curves = (earlier.get(name, []) for name in ("before", "matrix", "curves"))
    if not before:
        before = [lessons.stage.score(number, lessons.base.model) for number in range(len(tasks))]
    learner = learner_of(lessons)
    if matrix:
        learner.load(len(matrix) - 1)
    result = _result(facts, tasks, before, matrix, curves, reference)
    write_json(path, result)
    for number in range(len(matrix), len(tasks)):
        last = matrix[-1] if matrix else before
        curve = learner.learn(number)
        row = learner.scores(number, last)
        curves.append([(0, last[number]), *curve, (lessons.steps, row[number])])
        matrix.append(row)
        learner.save(number)
        result = _result(facts, tasks, before, matrix, curves, reference)
        write_json(path, result)  # after the weights: one that is killed in between learns this task again
        print(f"{tasks[number]}: {row[number]:.2f}, mean over the tasks so far {np.mean(row[: number + 1]):.2f}")
    save_picture(lessons.folder / "matrix.png", np.array(matrix), tasks)
    if reference is not None and (
        perfect := [t for t, alone in zip(tasks, reference, strict=True) if area(alone) >= 1]
    ):
        warnings.warn(
            f"There is no forward transfer to measure: trained alone, '{perfect[0]}' has the score 1 from the first step on.",
            stacklevel=2,
        )
    return result


def _earlier(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    earlier = read_json(path)
    if not isinstance(earlier, dict) or any((BEFORE | earlier).get(name) != value for name, value in facts.items()):
        raise UserError(f"'{path.parent}' holds a run of other settings: set another run_dir.")
    return earlier


def _result(
    facts: Mapping[str, Any],
    tasks: Sequence[str],
    before: list[float],
    matrix: list[list[float]],
    curves: list[Curve],
    reference: Sequence[Curve] | None,
) -> dict[str, Any]:
    whole = len(matrix) == len(tasks)
    transfer = forward_transfer(curves, reference) if whole and reference is not None else None
    return {
        **facts,
        "tasks": list(tasks),
        "average_performance": average_performance(np.array(matrix)) if whole else None,
        "forgetting": forgetting(np.array(matrix)) if whole else None,
        "forward_transfer": transfer,
        "before": before,
        "matrix": matrix,
        "curves": curves,
        "status": "complete" if whole else "partial",
        "versions": versions(),
    }


SAME = (
    *("steps", "evaluations", "episodes", "demonstrations", "seed", "base"),
    *("filter", "max_episode_steps", "batch_size", "base_sha256"),
)
"""What a run and its reference must have in common."""
BEFORE = {"filter": "all", "max_episode_steps": None}
"""What the results of former versions do not say, and how it was."""


def reference_curves(folder: Path, tasks: Sequence[str], wanted: Mapping[str, Any]) -> list[Curve]:
    """Each task's curve in a finished run of method=alone.

    wanted: the values of `SAME`, as far as they are known yet.

    Raises:
        UserError: if it is none, or has not these tasks or settings.
    """
    result = read_json(folder / RESULT)
    if not isinstance(result, dict) or result.get("method") != "alone" or result.get("status") != "complete":
        raise UserError(f"reference={folder} is no finished run of method=alone: run that first.")
    curves = dict(zip(result["tasks"], result["curves"], strict=True))
    if missing := [task for task in tasks if task not in curves]:
        raise UserError(f"reference={folder} has not the task '{missing[0]}': it must have these {len(tasks)}.")
    found = BEFORE | result
    if other := [name for name in SAME if name in wanted and found.get(name) != wanted[name]]:
        raise UserError(
            f"reference={folder} has {other[0]}={found.get(other[0])}, but this run has {wanted[other[0]]}."
        )
    return [curves[task] for task in tasks]


def table(result: Mapping[str, Any]) -> str:
    """The measures, and the matrix of tasks learned by tasks tested."""
    short = [task.rpartition("/")[2] for task in result["tasks"]]
    names = ("average_performance", "forgetting", "forward_transfer")
    found = [None if result[name] is None else f"{result[name]:.3f}" for name in names]
    rows = [(name, *(f"{value:.2f}" for value in row)) for name, row in zip(short, result["matrix"], strict=False)]
    before = ("(base)", *(f"{value:.2f}" for value in result["before"]))
    measures = markdown(["method", *(name.replace("_", " ") for name in names)], [(result["method"], *found)])
    return f"{measures}\n\n{markdown(['learned', *short], [before, *rows])}"


def save_picture(path: Path, matrix: np.ndarray, tasks: Sequence[str]) -> None:
    """Tasks learned by tasks tested, as a picture."""
    from matplotlib.figure import Figure

    short = [task.rpartition("/")[2] for task in tasks]
    figure = Figure(figsize=(2.5 + 0.5 * len(tasks), 2 + 0.45 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(short)), short, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(short)), short, fontsize=8)
    axes.set(xlabel="task tested", ylabel="after task")
    for (row, column), value in np.ndenumerate(matrix):
        color = "black" if value > 0.6 else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, label="score")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())
