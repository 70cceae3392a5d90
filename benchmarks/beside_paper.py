"""The study of Continual World's tasks beside the EVA paper's: success rates of the methods that both have.

    python -m benchmarks.beside_paper

Writes `benchmarks/results/cw10.md`, of the runs that `python -m eva_rl.finetune study=cw10` left in `benchmarks/results/cw10`.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from benchmarks.eva_init import RESULTS
from eva_rl.files import write_text
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


PROTOCOLS = markdown(
    ["", "paper (arXiv 2410.07170)", "here"],
    [
        ("model", "12 M weights, context of 50 steps", "3.2 M weights, context of 20 steps"),
        ("pretrained on", "MT40, 80 M transitions, 1 M steps", "MT40, 0.32 M transitions, 4,000 steps"),
        ("trajectories of a task", "2 M transitions", "40 episodes, 8,000 transitions"),
        ("fine-tuning", "100,000 steps of 128 windows", "200 steps of 32 windows"),
        ("learning rate", "1e-4 for all", "each method's own, found on two tasks of MT40"),
        ("size", "the best of ranks 2, 4, 8 and 16 for each entry", "rank 8, or as many weights"),
        ("rolled out", "10 episodes a seed", "50 episodes a seed, each of a goal that no trajectory had"),
        ("seeds", "3", "those below"),
    ],
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = RESULTS / "cw10"
    results, left_out = read_results([folder])
    found = studies(results)
    if len(found) != 1:
        sys.exit(f"error: runs of {len(found)} protocols are in '{folder}' where those of one were expected.")
    [study] = found
    for sentence in [*left_out, *study.amiss]:
        print(sentence, file=sys.stderr)
    table = beside(study)
    about = f"Success rates, means of {len(study.tasks)} tasks and seeds {', '.join(map(str, study.seeds))}"
    report = f"All methods, pictures and every run: [report](cw10/report/report.md), `python -m eva_rl.report {folder.relative_to(RESULTS.parents[1])}`."
    write_text(
        RESULTS / "cw10.md", f"`python -m benchmarks.beside_paper`\n\n{about}.\n\n{table}\n\n{PROTOCOLS}\n\n{report}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
