"""What came of asking for different returns, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_rl.files import replacing

if TYPE_CHECKING:  # importing matplotlib takes seconds
    from matplotlib.figure import Figure


def save_sweep(run_dir: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Achieved against asked-for return, a line a task with 95 % intervals, also as `<run>/sweep.png`.

    results: for each task its scores as in result.json, one for each `target_return`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for task, found in results.items():
        asked = [scores["target_return"] for scores in found]
        means = [scores["episode_return"]["mean"] for scores in found]
        lows = [scores["episode_return"]["low"] for scores in found]
        half = [0.0 if low is None else mean - low for mean, low in zip(means, lows, strict=True)]
        axes.errorbar(asked, means, yerr=half, fmt="o-", capsize=3, label=task)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], ":", color="grey", label="as asked")
    axes.set(xlabel="return asked for", ylabel="return achieved (bar: 95 % interval of the mean)", xlim=(low, high))
    axes.legend(fontsize=8)
    with replacing(run_dir / "sweep.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return figure
