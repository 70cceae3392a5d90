"""Each adapter's learning rate: the one of a few that trains best on two tasks of the base's own.

    python -m eva_rl.finetune study=learning_rates
    python -m benchmarks.learning_rates

The first command runs, the second reads. The training loss of a rate is averaged over the last tenth of the steps, and
divided by that of the best rate on the same task and seed. The rate's figure is the mean of this over tasks and seeds.
Where the best rate is the first or the last of those tried, the command that runs the next one is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.eva_init import RESULTS
from eva_rl.files import write_text
from eva_rl.run import RunResult
from eva_rl.study import read_results
from eva_rl.table import markdown

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SAME_AS = {"eva_rho2": "eva", "eva_grad": "eva"}
"""Methods that start where another does, up to their ranks or directions, and take its rate."""
FOLDER = RESULTS / "learning_rates"


def regrets(runs: Sequence[RunResult]) -> dict[float, float]:
    """Of one method's runs, for each rate tried on all tasks and seeds, its last losses over the best rate's, the mean over these."""
    losses = {(run.task, run.seed, run.learning_rate): run.loss[-1] for run in runs if run.loss}
    cells = sorted({(task, seed) for task, seed, _ in losses})
    rates = [rate for rate in RATES if cells and all((*cell, rate) in losses for cell in cells)]
    best = {cell: min(losses[(*cell, rate)] for rate in rates) for cell in cells if rates}
    return {rate: sum(losses[(*cell, rate)] / best[cell] for cell in cells) / len(cells) for rate in rates}


def beyond_the_end(tried: dict[float, float]) -> float | None:
    """The rate to try next, where the best of those tried is the first or the last of them."""
    if not tried:
        return None
    best = min(tried, key=tried.__getitem__)
    step = (best == max(tried)) - (best == min(tried))
    index = RATES.index(best) + step
    return RATES[index] if step and 0 <= index < len(RATES) else None


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results, left_out = read_results([FOLDER])
    methods: dict[str, list[RunResult]] = {}
    for run in results:
        methods.setdefault(run.adapter, []).append(run)
    rows = []
    for method, runs in sorted(methods.items()):
        tried = regrets(runs)
        best = min(tried, key=tried.__getitem__, default=None)
        rows.append([method, *(f"{tried[r]:.3f}" if r in tried else None for r in RATES), best and f"{best:g}"])
        if rate := beyond_the_end(tried):
            params = f"{{adapter: {method}, training.learning_rate: '{rate:g}'}}"
            print(f'python -m eva_rl.finetune study=learning_rates "hydra.sweeper.params={params}"')
    table = markdown(["adapter", *(f"{rate:g}" for rate in RATES), "chosen"], rows)
    tasks, seeds = sorted({run.task for run in results}, reverse=True), sorted({run.seed for run in results})
    text = (
        "`python -m benchmarks.learning_rates`\n\n"
        f"Training loss over the last tenth of {results[0].steps} steps, over the best rate's, mean of {' and '.join(tasks)} "
        f"(seed {', '.join(map(str, seeds))}). "
        f"{', '.join(f'{a} takes the rate of {b}' for a, b in SAME_AS.items())}.\n\n{table}\n"
    )
    write_text(Path(f"{FOLDER}.md"), text)
    print(table, *left_out, sep="\n")


if __name__ == "__main__":
    main()
