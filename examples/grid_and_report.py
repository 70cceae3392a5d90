"""A grid of runs and its report: `python examples/grid_and_report.py [key=value ...]`, with settings of `finetune`."""

import sys
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_module

from eva_rl.config import FinetuneConfig, parse
from eva_rl.finetune import finetune
from eva_rl.rollout import Simulators
from eva_rl.study import compare, document, save_report

FOLDER = Path("runs/example")


def settings(adapter: str, seed: int, given: list[str]) -> FinetuneConfig:
    """What `python -m eva_rl.finetune` makes of the same words."""
    words = ["task=pointmaze/UMaze", "demonstrations=5", f"adapter={adapter}", f"seed={seed}", *given]
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        return parse(compose("finetune", words), FinetuneConfig)


def main() -> None:
    grid = [settings(adapter, seed, sys.argv[1:]) for adapter, seed in product(["bc", "lora", "eva"], [0, 1])]
    with Simulators(grid[0].workers) as simulators:
        for run in grid:
            finetune(run, FOLDER / run.adapter.name / str(run.seed), simulators)
    comparison = compare([FOLDER])
    save_report(FOLDER / "report", comparison)
    print(document(comparison))
    for study in comparison.studies:
        print(f"best: {study.ranked()[0]}")


if __name__ == "__main__":
    main()
