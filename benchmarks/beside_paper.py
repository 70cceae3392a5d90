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
from eva_rl.study import Study, compare
from eva_rl.table import markdown

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

PAPER_AT_RANK_8 = {"lora": 0.79, "eva": 0.85, "eva_dora": 0.91}
"""Means over the ten tasks at our rank. The rows above have the best rank of each entry."""


def beside(study: Study) -> str:
    """Two rows a method, ours with the interval of its mean, and a column for each task that the study has."""
    columns = {task: f"metaworld/{task}-v3" for task in TASKS if f"metaworld/{task}-v3" in study.tasks}
    rows = []
    for method in (name for name in PAPER if name in study.methods):
        found, theirs = study.scores(method), dict(zip(TASKS, PAPER[method], strict=True))
        scores = {task: found[task] for task in columns.values()}
        ours = [f"{np.mean(own):.2f}" for own in scores.values()]
        rows.append((method, "ours", *ours, study.estimate(scores)))
        mean = f"{np.mean([theirs[task] for task in columns]):.2f}"
        if method in PAPER_AT_RANK_8 and len(columns) == len(TASKS):
            mean += f"; at rank 8 {PAPER_AT_RANK_8[method]:.2f}"
        rows.append(("", "paper", *(f"{theirs[task]:.2f}" for task in columns), mean))
    return markdown(["method", "", *columns, "mean"], rows)


def protocols(study: Study) -> str:
    """What the two did, side by side."""
    own = study.protocol
    rows = [
        ("model", "12 M weights, 50 steps of context, with rewards", "3.2 M weights, 20 steps of context, without"),
        ("pretrained on", "MT40: 80 M transitions, 1 M steps", "MT40: 0.32 M transitions, 4,000 steps"),
        ("trajectories of a task", None, f"{own['demonstrations']} episodes of a noisy expert"),
        (
            "fine-tuning",
            "100,000 steps of 128 windows",
            f"{own['steps']} steps of {own['training.batch_size']} windows",
        ),
        ("learning rate", "1e-4 for all", "each method's own, found on two tasks of MT40"),
        (
            "schedule",
            "4,000 steps of warm-up, cosine to 1e-6",
            f"{own['training.warmup']} steps of warm-up, cosine to 0",
        ),
        ("rank", "the best of 2, 4, 8 and 16 for each entry", f"{own['adapter.rank']}, or as many weights"),
        ("rolled out", "10 episodes a seed", f"{own['episodes']} a seed, each of a goal that no trajectory had"),
        ("seeds", "3", ", ".join(map(str, study.seeds))),
    ]
    return markdown(["", "paper", "here"], rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = RESULTS / "cw10"
    found = compare([folder])
    if len(found.studies) != 1:
        sys.exit(f"error: runs of {len(found.studies)} protocols are in '{folder}' where those of one were expected.")
    [study] = found.studies
    if study.score != "success_rate" or not any(f"metaworld/{task}-v3" in study.tasks for task in TASKS):
        sys.exit(f"error: '{folder}' has no success rates that all methods share on tasks of the paper.")
    absent = [f"{name}: no such method among {', '.join(study.methods)}" for name in PAPER if name not in study.methods]
    parts = [
        "`python -m benchmarks.beside_paper`",
        f"Success rates on Continual World's tasks, means over seeds {', '.join(map(str, study.seeds))} here; in the last column over the "
        f"{len(study.tasks)} tasks shown, ours with the 95 % interval of runs of several seeds. Paper: arXiv 2410.07170, its table of "
        "decision making.",
        beside(study),
        protocols(study),
        *(
            ["Not in the table:\n\n" + "\n".join(f"- {sentence}" for sentence in missing)]
            if (missing := [*found.amiss, *absent])
            else []
        ),
        "All methods, pictures and runs: [report](cw10/report/report.md), made by `python -m eva_rl.report benchmarks/results/cw10`.",
    ]
    write_text(RESULTS / "cw10.md", "\n\n".join(parts) + "\n")
    print("\n\n".join(parts[2:4]))


if __name__ == "__main__":
    main()
