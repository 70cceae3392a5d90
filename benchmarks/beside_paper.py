"""The study of Continual World's tasks beside the EVA paper's: success rates of the methods that both have.

    python -m benchmarks.beside_paper benchmarks/results/cw10

The paper's are from its table of decision making (arXiv 2410.07170): three seeds of ten episodes, the best of ranks 2 to 16 (and of rho
1 and 2) for each entry, a model of four times the size, 100,000 steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from eva_rl.report import markdown
from eva_rl.report.methods import Study, studies
from eva_rl.report.runs import read_results

TASKS = (
    "faucet-close",
    "hammer",
    "handle-press-side",
    "peg-unplug-side",
    "push-back",
    "push",
    "push-wall",
    "shelf-place",
    "stick-pull",
    "window-close",
)
PAPER = {
    "full": (1.0, 0.97, 1.0, 0.77, 0.87, 1.0, 1.0, 1.0, 0.63, 1.0),
    "lora": (1.0, 1.0, 1.0, 0.60, 0.63, 1.0, 1.0, 1.0, 0.40, 1.0),
    "adalora": (1.0, 0.97, 1.0, 0.40, 0.57, 0.97, 0.97, 1.0, 0.13, 1.0),
    "pissa": (1.0, 1.0, 1.0, 0.43, 0.57, 1.0, 1.0, 1.0, 0.53, 1.0),
    "olora": (1.0, 0.97, 1.0, 0.57, 0.63, 1.0, 1.0, 1.0, 0.60, 1.0),
    "eva": (1.0, 0.97, 1.0, 0.63, 0.77, 1.0, 1.0, 1.0, 0.63, 1.0),
    "dora": (1.0, 1.0, 1.0, 0.60, 1.0, 1.0, 1.0, 1.0, 0.67, 1.0),
    "eva_dora": (1.0, 1.0, 1.0, 0.80, 1.0, 1.0, 1.0, 1.0, 0.63, 1.0),
}


def beside(study: Study) -> str:
    """Two rows a method, ours with the interval of its mean; a column for each task that the study has."""
    columns = {task: f"metaworld/{task}-v3" for task in TASKS if f"metaworld/{task}-v3" in study.tasks}
    rows = []
    for method in (name for name in PAPER if name in study.methods):
        scores, theirs = study.scores(method), dict(zip(TASKS, PAPER[method], strict=True))
        ours = [f"{np.mean(scores[task]):.2f}" for task in columns.values()]
        rows.append((method, "ours", *ours, study.estimate(scores)))
        rows.append(
            ("", "paper", *(f"{theirs[task]:.2f}" for task in columns), f"{np.mean([theirs[t] for t in columns]):.2f}")
        )
    return markdown(["method", "", *columns, "mean"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    results, left_out = read_results([parser.parse_args().folder])
    found = studies(results)
    if len(found) != 1:
        sys.exit(f"error: runs of {len(found)} protocols were found where those of one were expected.")
    for sentence in [*left_out, *found[0].amiss]:
        print(sentence, file=sys.stderr)
    print(beside(found[0]))


if __name__ == "__main__":
    main()
