"""The table of a model card: each task's random, expert and zero-shot scores with 95 % intervals.

    python -m tools.model_card runs/card/*

The command takes the folders of `python -m eva_rl.evaluate`. Random and expert returns are those of
envs/<domain>_scores.json.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl import envs
from eva_rl.files import read_json
from eva_rl.run import Estimate
from eva_rl.run.scores import from_json
from eva_rl.table import markdown

HEADER = (
    "task",
    "random return",
    "expert return",
    "zero-shot return",
    "normalized score",
    "success",
    "expert's success",
)


def row(task: str, found: dict[str, Any]) -> list[object]:
    domain, _, name = task.partition("/")
    scores = json.loads((Path(envs.__file__).parent / f"{domain}_scores.json").read_text())["tasks"][name]
    reference = [
        Estimate(scores[who], *scores.get(f"{who}_interval", (None, None)), n=0) for who in ("random", "expert")
    ]
    own = [from_json(found)[score] for score in ("episode_return", "normalized_score", "success_rate")]
    return [task, *reference, *own, scores["expert_success_rate"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    results = [read_json(folder / "result.json") for folder in parser.parse_args().folders]
    tasks = {task: found for result in results for task, found in result["tasks"].items()}
    domains = defaultdict(list)
    for task, found in sorted(tasks.items()):
        domains[task.partition("/")[0]].append(found)
    rows = []
    for name, members in domains.items():
        score = np.mean([found["normalized_score"]["mean"] for found in members if found["normalized_score"]])
        solved = [found["success_rate"]["mean"] for found in members if found["success_rate"]]
        rows.append((name, len(members), f"{score:.2f}", f"{np.mean(solved):.2f}" if solved else None))
    print(markdown(["domain", "tasks", "mean normalized score", "mean success"], rows), end="\n\n")
    print(markdown(HEADER, [row(task, found) for task, found in sorted(tasks.items())]))


if __name__ == "__main__":
    main()
