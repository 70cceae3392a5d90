"""What EVA found, drawn: spectra, ranks, and how far each layer had come when the stream ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing matplotlib takes seconds
    from matplotlib.figure import Figure


EVA_CLAIM = (
    "Shares of variance, convergence and `captured` are those of the rows that were seen (`rows`, in `batches`): a direction that only "
    "data beyond these have is in none of them."
)


def eva_figures(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Pictures by name of the layers' facts, as `eva.json` holds them."""
    names = list(layers)
    inputs = {layer["reads_the_input_of"]: layer for layer in layers.values()}
    return {
        "eva/spectrum": _curves(inputs, "spectrum", "share of variance of the rows seen", log=True),
        "eva/cumulative": _curves(inputs, "cumulative", "cumulative share of variance of the rows seen"),
        "eva/rank": _bars(names, [layers[name]["rank"] for name in names], "rank"),
        "eva/batches": _bars(
            list(inputs),
            [layer["converged_after"] or layer["batches"] for layer in inputs.values()],
            "batches to convergence (all batches, where it did not converge)",
        ),
        "eva/angle": _bars(
            list(inputs),
            [layer["angle_degrees"] for layer in inputs.values()],
            "largest principal angle to the subspace a batch before (degrees)",
        ),
    }


def _curves(inputs: Mapping[str, Mapping[str, Any]], key: str, label: str, log: bool = False) -> Figure:
    """One line for each input; the dot is the rank of the layer that reads it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"]
    for number, (name, layer) in enumerate(inputs.items()):
        values, rank = layer[key], layer["rank"]
        colour = colours(number / max(len(inputs) - 1, 1))
        axes.plot(range(1, len(values) + 1), values, color=colour, label=name)
        if rank:
            axes.plot(rank, values[rank - 1], "o", color=colour)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="component (dot: rank given)", ylabel=label)
    axes.legend(fontsize=6, ncols=1 + len(inputs) // 24, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), values)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return figure
