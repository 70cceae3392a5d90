"""Each adapter's learning rate: the one of a few that trains best on two tasks of the base's own.

    python -m benchmarks.learning_rates

For every method with an adapter, 100 steps on two tasks of Meta-World's MT40, on which CW10 has no say; the rate whose training
loss, averaged over the last tenth of the steps and over the tasks (as a share of the best in each), is least. A rate at the
end of the range is tried against one beyond it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import run_cells
from benchmarks.eva_init import RESULTS
from eva_rl.config import choices
from eva_rl.files import write_text
from eva_rl.table import markdown

TASKS = ("metaworld/box-close-v3", "metaworld/assembly-v3")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = slice(2, 5)
"""The rates every method is tried with."""
STEPS = 100
SAME_AS = {"eva_rho2": "eva", "eva_grad": "eva"}
"""Methods that start where another does, up to their ranks or directions, and take its rate."""
FOLDER = RESULTS / "learning_rates"


def cells(methods: Sequence[str], rates: Sequence[float]) -> dict[str, list[str]]:
    return {
        f"{method}/{task.rpartition('/')[2]}-{rate:g}": [
            f"task={task}",
            f"adapter={method}",
            f"training.learning_rate={rate}",
            f"steps={STEPS}",
            "episodes=0",
        ]
        for method in methods
        for rate in rates
        for task in TASKS
    }


def regrets(found: dict[str, dict], method: str) -> dict[float, float]:
    """For each rate tried on all tasks, its last losses over the best rate's, averaged over the tasks."""
    losses = {
        (task, rate): result["loss"][-1]
        for task in TASKS
        for rate in RATES
        if (result := found.get(f"{method}/{task.rpartition('/')[2]}-{rate:g}"))
    }
    rates = [rate for rate in RATES if all((task, rate) in losses for task in TASKS)]
    best = {task: min(losses[task, rate] for rate in rates) for task in TASKS if rates}
    return {rate: sum(losses[task, rate] / best[task] for task in TASKS) / len(TASKS) for rate in rates}


def beyond_the_end(found: dict[str, dict], method: str) -> dict[str, list[str]]:
    """The cells of the next rate, where the best of those tried is the first or the last of them."""
    tried = regrets(found, method)
    if not tried:
        return {}
    best = min(tried, key=tried.get)
    step = (best == max(tried)) - (best == min(tried))
    index = RATES.index(best) + step
    return cells([method], [RATES[index]]) if step and 0 <= index < len(RATES) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [line.split()[0] for line in choices("adapter", "finetune").splitlines()]
    parser.add_argument("--methods", nargs="+", choices=known, help="default: all with an adapter, and full and head")
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    methods = a.methods or [name for name in known if name not in ("none", "peft", *SAME_AS)]
    found = run_cells(cells(methods, RATES[START]), FOLDER, a.workers)
    attempted = cells(methods, RATES[START])
    while fresh := {n: c for method in methods for n, c in beyond_the_end(found, method).items() if n not in attempted}:
        attempted |= fresh
        found |= run_cells(fresh, FOLDER, a.workers)
    rows = []
    for method in methods:
        tried = regrets(found, method)
        best = min(tried, key=tried.get, default=None)
        rows.append([method, *(f"{tried[r]:.3f}" if r in tried else None for r in RATES), best and f"{best:g}"])
    table = markdown(["adapter", *(f"{rate:g}" for rate in RATES), "chosen"], rows)
    text = (
        "`python -m benchmarks.learning_rates`\n\n"
        f"Training loss over the last tenth of {STEPS} steps, over the best rate's, mean of {' and '.join(TASKS)} (seed 0). "
        f"{', '.join(f'{a} takes the rate of {b}' for a, b in SAME_AS.items())}.\n\n{table}\n"
    )
    write_text(Path(f"{FOLDER}.md"), text)
    print(table)


if __name__ == "__main__":
    main()
