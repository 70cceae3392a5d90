"""A grid of runs and its report: `python examples/grid_and_report.py [key=value ...]`, with settings of `finetune`."""

import sys
from itertools import product
from pathlib import Path

import eva_rl

FOLDER = Path("runs/example")


def main() -> None:
    runs = []
    for adapter, seed in product(["bc", "lora", "eva"], [0, 1]):
        folder = str(FOLDER / adapter / str(seed))
        job = eva_rl.Finetune(task="pointmaze/UMaze", demonstrations=5, adapter=adapter, seed=seed, run_dir=folder)
        runs.append(eva_rl.execute(job, *sys.argv[1:]))
    for row in eva_rl.compare(runs):
        interval = "" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
        print(f"{row.method:>4}: {row.score.replace('_', ' ')} {row.mean:.2f}{interval} over {row.runs} runs")
    best = max(runs, key=lambda run: run.result["success_rate"]["mean"])
    print(f"best: {best.result['adapter']}, seed {best.result['seed']}, in {best.folder}")


if __name__ == "__main__":
    main()
