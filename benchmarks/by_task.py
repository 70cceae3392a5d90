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

from eva_rl.report import Estimate, markdown
from eva_rl.report.runs import read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    results, left_out = read_results([parser.parse_args().folder])
    methods = sorted({r["adapter"] for r in results}, key=lambda name: (name != "none", name))
    cells = {(r["task"], r["adapter"]): r for r in results}
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
        found = [Estimate(**cells[task, method][score]) for method in methods]
        rows.append((task, {"success_rate": "success", "normalized_score": "normalized"}[score], *found))
    means = [np.mean([cells[task, method]["normalized_score"]["mean"] for task in whole]) for method in methods]
    rows.append((f"mean of {len(whole)} tasks", "normalized", *(f"{mean:.2f}" for mean in means)))
    print(markdown(["task", "score", *("zero-shot" if method == "none" else method for method in methods)], rows))


if __name__ == "__main__":
    main()
