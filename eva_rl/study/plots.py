"""Methods compared, drawn: scores with their intervals, learning curves, what a score costs, who beats whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from eva_rl.run import Estimate
from eva_rl.study.bootstrap import average, interquartile_mean
from eva_rl.study.compare import Varied
from eva_rl.study.study import Study, improvement, told_apart
from eva_rl.table import counted

if TYPE_CHECKING:  # importing matplotlib takes seconds
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LONGEST = 60
"""Characters of a label. The tables show it whole."""


def plots(study: Study) -> Mapping[str, Figure]:
    """The pictures of a study, by name."""
    found = {"scores": scores_plot(study), "pareto": pareto_plot(study)}
    if len(study.methods) > 1:
        found["improvement"] = improvement_plot(study)
    if any(len(study.mean_curve(method)) > 2 for method in study.methods):
        found["curves"] = curves_plot(study)
    return found


def scores_plot(study: Study) -> Figure:
    """Mean and interquartile mean of each method, and its mean on each task."""
    from matplotlib.figure import Figure

    names = study.ranked()
    figure = Figure(figsize=(7.5 + 0.45 * max(len(study.tasks), 10), 2 + 0.33 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 0.6 * max(len(study.tasks), 10)))
    for axes, statistic, title in zip(
        panels, (average, interquartile_mean), ("mean", "interquartile mean"), strict=False
    ):
        for place, name in enumerate(names):
            found = study.estimate(study.scores(name), statistic)
            axes.errorbar(
                found.mean, place, xerr=_spread([found]), fmt="o", color=_color(name), markersize=4, capsize=2
            )
        axes.set(xlabel=title, yticks=range(len(names)), yticklabels=map(_plain, names))
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(study.score.replace("_", " "))
    grid = np.array([[np.mean(study.scores(name)[task]) for task in study.tasks] for name in names])
    image = panels[2].imshow(grid, aspect="auto", cmap="viridis", vmin=min(0.0, grid.min()), vmax=max(1.0, grid.max()))
    panels[2].set_xticks(range(len(study.tasks)), study.short_tasks, rotation=40, ha="right", fontsize=8)
    _numbers(panels[2], image)
    figure.colorbar(image, ax=panels[2], label=study.score.replace("_", " "))
    return figure


def curves_plot(study: Study) -> Figure:
    """The mean learning curve of each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for name, style in zip(study.ranked(), _styles(), strict=False):  # as many styles as it takes
        curve = study.mean_curve(name)
        if len(curve) > 1:
            axes.plot(*zip(*curve, strict=True), label=_plain(name), **style)
    axes.set(
        xlabel="optimiser steps", ylabel=f"{study.score.replace('_', ' ')}, mean of {counted(len(study.tasks), 'task')}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def pareto_plot(study: Study) -> Figure:
    """Mean score against trainable weights and against seconds.

    A line joins the methods that no other beats in both score and cost.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    styles = dict(zip(study.ranked(), _styles(), strict=False))  # those of the learning curves
    costs = {
        "trainable weights": lambda run: run.trainable_parameters,
        "seconds of initialising and training": lambda run: run.seconds["init"] + run.seconds["train"],
    }
    for axes, (label, cost) in zip(panels, costs.items(), strict=True):
        points = {
            name: (float(np.median([cost(run) for run in runs])), study.estimate(study.scores(name)))
            for name, runs in study.methods.items()
        }
        for name, style in styles.items():
            x, found = points[name]
            style = style | {"linestyle": "none", "markersize": 6, "alpha": 0.8, "label": _plain(name)}
            axes.errorbar(x, found.mean, yerr=_spread([found]), **style)
        front = pareto_front({name: (x, found.mean) for name, (x, found) in points.items()})
        axes.step(*zip(*[(points[n][0], points[n][1].mean) for n in front], strict=True), "k:", where="post", alpha=0.5)
        costs_of = [x for x, _ in points.values()]
        if label == "trainable weights" and max(costs_of) > 10 * min(costs_of):
            axes.set_xscale("symlog", linthresh=10_000, linscale=0.3)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=_mean_of(study.score, [found for _, found in points.values()]))
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _mean_of(score: str, found: Iterable[Estimate]) -> str:
    interval = any(estimate.low is not None for estimate in found)
    return f"mean {score.replace('_', ' ')}{' with its 95 % interval' if interval else ''}"


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of those (cost, score) that no other reaches at the same cost or less, the cheapest first."""
    front: list[str] = []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or score > points[front[-1]][1]:
            front.append(name)
    return front


def varied_plot(found: Varied) -> Figure:
    """Each method's mean score against the number that varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    places = {value: place for place, value in enumerate(sorted({v for line in found.lines.values() for v, _ in line}))}
    for shift, ((name, line), style) in enumerate(zip(sorted(found.lines.items()), _styles(), strict=False)):
        aside = min(0.04, 0.6 / len(found.lines)) * (
            shift - (len(found.lines) - 1) / 2
        )  # bars of several methods stand side by side
        x, y = [places[value] + aside for value, _ in line], [estimate.mean for _, estimate in line]
        axes.errorbar(x, y, yerr=_spread([estimate for _, estimate in line]), label=_plain(name), capsize=2, **style)
    axes.set_xticks(range(len(places)), map(str, places))
    axes.set(xlabel=found.setting, ylabel=_mean_of(found.score, [e for line in found.lines.values() for _, e in line]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def improvement_plot(study: Study) -> Figure:
    """How likely the row's method is to score more than the column's on the same task.

    Numbers are bold where a permutation test tells the two apart at 5 %, not corrected for the number of pairs.
    """
    from matplotlib.figure import Figure

    names = study.ranked()
    grid = np.array([[0.5 if a == b else improvement(study, a, b).mean for b in names] for a in names])
    sure = np.array([[told_apart(study, a, b) for b in names] for a in names])
    figure = Figure(figsize=(3 + 0.5 * len(names), 2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_array(grid, np.eye(len(names), dtype=bool)), cmap="RdBu_r", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), map(_plain, names), rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), map(_plain, names), fontsize=8)
    _numbers(axes, image, sure)
    figure.colorbar(image, ax=axes, label="P(row > column)")
    return figure


def _spread(found: Sequence[Estimate]) -> np.ndarray:
    """How far the intervals reach below and above their means, (2, n), or 0 where there is none."""
    ends = [(e.mean, e.mean) if e.low is None or e.high is None else (e.low, e.high) for e in found]
    return np.array([[e.mean - low, high - e.mean] for e, (low, high) in zip(found, ends, strict=True)]).T.clip(0)


def to_png(figure: Figure) -> bytes:
    return _saved(figure, "png", {"Software": None})


def to_svg(figure: Figure) -> bytes:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "eva_rl", "svg.fonttype": "none"}):  # the same file each time
        return _saved(figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, metadata: Mapping[str, None]) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format=kind, dpi=110, metadata=metadata)
    return stream.getvalue()


def _numbers(axes: Axes, image: AxesImage, bold: np.ndarray | None = None) -> None:
    """Each cell's value on it, in black or white, whichever its colour leaves readable."""
    for (row, column), value in np.ma.ndenumerate(image.get_array()):
        weight = "bold" if bold is not None and bold[row, column] else "normal"
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, weight=weight, color="w" if dark else "k"
        )


def _plain(name: str) -> str:
    """A label as it stands, which matplotlib would set as mathematics between two dollar signs, and not too long."""
    return (name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…").replace("$", r"\$")


def _color(name: str) -> str:
    """EVA and its relatives stand out."""
    return "C3" if name.startswith("eva") else "C0"


def _styles() -> Iterator[dict[str, Any]]:
    return (
        {
            "color": f"C{n % 10}",
            "linestyle": ("-", "--", ":")[n // 10 % 3],
            "marker": "os^"[n // 10 % 3],
            "markersize": 4,
        }
        for n in count()
    )
