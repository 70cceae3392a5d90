"""A study's results by task: a row a task, a column a method, each score with its 95 % interval over all episodes.

    python -m benchmarks.by_task benchmarks/results/multi_heldout

For studies of one seed, where `python -m eva_rl.report` has no runs to draw intervals from. Intervals hold for these trained models
on other episodes, not for other seeds of training. Success rates where the task has such a notion, else normalized scores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from eva_rl.errors import UserError
from eva_rl.study import compare
from eva_rl.table import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        found = compare([folder])
    except UserError as error:
        sys.exit(f"error: {error}")
    seeds = {own.run.seed for own in found.runs}
    if len(found.studies) != 1 or len(seeds) != 1:
        sys.exit(
            f"error: runs of {len(found.studies)} protocols and {len(seeds)} seeds are in '{folder}' where one of each was "
            "expected: `python -m eva_rl.report` compares those."
        )
    cells = {(own.run.task, own.method): own.run for own in found.runs}
    methods = sorted({method for _, method in cells}, key=lambda name: (name != "none", name))
    tasks = sorted({task for task, _ in cells})
    whole = [task for task in tasks if all((task, method) in cells for method in methods)]
    for sentence in [
        *found.left_out,
        *(f"{task}: not run with every method, left out" for task in tasks if task not in whole),
    ]:
        print(sentence, file=sys.stderr)
    rows = []
    for task in whole:
        score = "normalized_score" if cells[task, methods[0]].scores["success_rate"] is None else "success_rate"
        own = [cells[task, method].scores[score] for method in methods]
        rows.append((task, {"success_rate": "success", "normalized_score": "normalized"}[score], *own))
    normalized = {cell: run.scores["normalized_score"] for cell, run in cells.items()}
    scaled = [task for task in whole if all(normalized[task, method] for method in methods)]
    if scaled:
        means = [np.mean([normalized[task, method].mean for task in scaled]) for method in methods]
        rows.append((f"mean of {len(scaled)} tasks", "normalized", *(f"{mean:.2f}" for mean in means)))
    print(markdown(["task", "score", *("zero-shot" if method == "none" else method for method in methods)], rows))


if __name__ == "__main__":
    main()
