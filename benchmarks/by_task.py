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
from eva_rl.report import markdown
from eva_rl.report.labels import in_words, labels, protocol_of
from eva_rl.report.runs import estimate, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        results, left_out = read_results([folder])
    except UserError as error:
        sys.exit(f"error: {error}")
    protocols, seeds = {in_words(protocol_of(r)) for r in results}, {r["seed"] for r in results}
    if len(protocols) != 1 or len(seeds) != 1:
        sys.exit(
            f"error: runs of {len(protocols)} protocols and {len(seeds)} seeds are in '{folder}' where one of each was "
            "expected: `python -m eva_rl.report` compares those."
        )
    cells = {(r["task"], method): r for method, r in zip(labels(results), results, strict=True)}
    methods = sorted({method for _, method in cells}, key=lambda name: (name != "none", name))
    tasks = sorted({task for task, _ in cells})
    whole = [task for task in tasks if all((task, method) in cells for method in methods)]
    for sentence in [
        *left_out,
        *(f"{task}: not run with every method, left out" for task in tasks if task not in whole),
    ]:
        print(sentence, file=sys.stderr)
    rows = []
    for task in whole:
        score = "normalized_score" if cells[task, methods[0]]["success_rate"] is None else "success_rate"
        found = [estimate(cells[task, method][score]) for method in methods]
        rows.append((task, {"success_rate": "success", "normalized_score": "normalized"}[score], *found))
    scaled = [task for task in whole if all(cells[task, method]["normalized_score"] for method in methods)]
    if scaled:
        means = [np.mean([cells[task, method]["normalized_score"]["mean"] for task in scaled]) for method in methods]
        rows.append((f"mean of {len(scaled)} tasks", "normalized", *(f"{mean:.2f}" for mean in means)))
    print(markdown(["task", "score", *("zero-shot" if method == "none" else method for method in methods)], rows))


if __name__ == "__main__":
    main()
