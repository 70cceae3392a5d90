"""Every adapter on two tasks the base has not seen, as many trainable weights each: loss, success, cost.

    python -m benchmarks.adapters

Runs are kept under benchmarks/results/adapters/ and not repeated; `--table` makes the table and the picture of those there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.cells import run_cells
from benchmarks.eva_init import RESULTS
from eva_rl.config import choices
from eva_rl.files import replacing, write_text
from eva_rl.run import proportion
from eva_rl.table import markdown

TASKS = ("metaworld/push-back-v3", "metaworld/peg-unplug-side-v3")
FOLDER = RESULTS / "adapters"
COLUMNS = ("adapter", "weights", "share", "loss at 10 %", "at 50 %", "at 100 %")
COSTS = ("init s", "s a step", "MiB")


def cells(methods: Sequence[str], seeds: Sequence[int], steps: int, episodes: int) -> dict[str, list[str]]:
    return {
        f"{task.rpartition('/')[2]}/{method}-{seed}": [
            f"task={task}",
            f"adapter={method}",
            f"seed={seed}",
            f"steps={steps}",
            f"episodes={episodes}",
        ]
        for seed in seeds
        for method in methods
        for task in TASKS
    }


def row(method: str, runs: Sequence[dict[str, Any]]) -> list[object]:
    """A method's runs as a row of the table."""

    def average(values: Sequence[float]) -> float:
        return statistics.mean(values)

    share = average([r["trainable_parameters"] / r["total_parameters"] for r in runs])
    losses = [f"{average([r['loss'][tenth] for r in runs]):.4f}" if runs[0]["loss"] else None for tenth in (0, 4, 9)]
    success = [str(success_of([r for r in runs if r["task"] == task])) for task in TASKS]
    return [
        method,
        f"{average([r['trainable_parameters'] for r in runs]):,.0f}",
        f"{100 * share:.2f} %",
        *losses,
        *success,
        str(success_of(runs)),
        f"{average([r['seconds']['init'] for r in runs]):.1f}",
        f"{average([r['seconds']['train'] / max(r['steps'], 1) for r in runs]):.2f}",
        f"{average([r['peak_memory_mib'] for r in runs]):.0f}",
        len(runs),
    ]


def success_of(runs: Sequence[dict[str, Any]]) -> object:
    """The share of all these runs' episodes that succeeded. Its interval treats episodes of one run as independent."""
    solved = sum(round(r["success_rate"]["mean"] * r["success_rate"]["n"]) for r in runs)
    episodes = sum(r["success_rate"]["n"] for r in runs)
    return proportion([True] * solved + [False] * (episodes - solved)) if episodes else None


def picture(groups: dict[str, list[dict[str, Any]]]) -> bytes:
    """Success against trainable weights, a dot for each method; beside it the methods by name, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    scatter, ranking = figure.subplots(1, 2, width_ratios=(2, 3))
    weights = {name: statistics.mean(r["trainable_parameters"] for r in runs) for name, runs in groups.items()}
    budget = statistics.median(weights.values())
    ranked = sorted(groups.items(), key=lambda item: success_of(item[1]).mean)
    for place, (name, runs) in enumerate(ranked):
        found, color = success_of(runs), "C3" if name.startswith("eva") else "C0"
        scatter.plot(max(weights[name], 1), found.mean, "o", color=color, alpha=0.6)
        if abs(weights[name] / budget - 1) > 0.1:  # the others stand on one line; the ranking names them
            scatter.annotate(
                name, (max(weights[name], 1), found.mean), xytext=(5, 3), textcoords="offset points", fontsize=8
            )
        spread = [[found.mean - found.low], [found.high - found.mean]]
        ranking.errorbar(found.mean, place, xerr=spread, fmt="o", color=color, markersize=4)
        for seed in {r["seed"] for r in runs}:
            own = success_of([r for r in runs if r["seed"] == seed])
            ranking.plot(own.mean, place, "|", color="black", markersize=7, alpha=0.5)
    ranking.set_yticks(range(len(ranked)), [name for name, _ in ranked], fontsize=8)
    scatter.set_xscale("symlog", linthresh=1000)
    scatter.set(xlabel="trainable weights", ylabel="success, mean of both tasks", ylim=(-0.03, 1.0))
    ranking.set(xlabel="success with its 95 % interval; strokes: seeds", xlim=(-0.03, 1.0), ylim=(-1, len(ranked)))
    ranking.grid(axis="x", alpha=0.3)
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="run nothing")
    a = parser.parse_args()
    known = [line.split()[0] for line in choices("adapter", "finetune").splitlines()]
    methods = a.methods or [name for name in known if name != "peft"]
    wanted = cells(methods, a.seeds, a.steps, a.episodes)
    if a.table:
        wanted = {name: arguments for name, arguments in wanted.items() if (FOLDER / f"{name}.json").is_file()}
    if a.episodes < 1:
        parser.error("--episodes must be at least 1")
    found = run_cells(wanted, FOLDER, a.workers)
    if not found:
        parser.error(f"there is no result in {FOLDER}: run without --table first")
    groups = {
        method: runs
        for method in methods
        if (runs := [result for name, result in found.items() if name.rpartition("/")[2].rpartition("-")[0] == method])
    }
    short = [task.rpartition("/")[2] for task in TASKS]
    header = [*COLUMNS, *short, "both", *COSTS, "runs"]
    ranked = sorted(groups.items(), key=lambda item: -success_of(item[1]).mean)
    table = markdown(header, [row(method, runs) for method, runs in ranked])
    head = f"`python -m benchmarks.adapters --steps {a.steps} --episodes {a.episodes} --seeds {' '.join(map(str, a.seeds))}`"
    used = next(iter(found.values()))["versions"]
    text = (
        f"{head}\n\n{', '.join(f'{name} {version}' for name, version in used.items())}; {a.workers} runs at a time, which "
        "share the cores.\n\nMeans over tasks and seeds; success with the 95 % interval over all episodes, as if those of "
        f"one seed were independent.\n\n{table}\n\n![success against trainable weights](adapters.png)\n"
    )
    write_text(Path(f"{FOLDER}.md"), text)
    with replacing(Path(f"{FOLDER}.png")) as temporary:
        temporary.write_bytes(picture(groups))
    print(table)


if __name__ == "__main__":
    main()
