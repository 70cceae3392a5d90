"""What EVA found, drawn: spectra, ranks, and how many batches each layer took, a picture each that can be read on a card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # importing matplotlib takes seconds
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EVA_CLAIM = (
    "Shares of variance, convergence and `captured` are those of the rows that were seen (`rows`, in `batches`): a direction that only "
    "data beyond these have is in none of them."
)
GROUP = "what_eva_found"
"""TensorBoard sorts cards by their names: the loss and the scores of `train` and `evaluation` come first."""
CARD = (6.4, 4.4)
"""Inches, the shape of a card."""
ANNOTATED = 200
"""Cells up to which a heat map has a number in each."""


def eva_figures(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Pictures by name of the layers' facts, as `eva.json` holds them."""
    batches = {name: own["converged_after"] or own["batches"] for name, own in layers.items()}
    open_ = sum(own["converged_after"] is None for own in layers.values())
    late = f"; {open_} had not converged by then" if open_ else ""
    return {
        f"{GROUP}/spectrum": _spectra({own["reads_the_input_of"]: own for own in layers.values()}),
        f"{GROUP}/rank": _heat_map({name: own["rank"] for name, own in layers.items()}, "rank of each layer"),
        f"{GROUP}/batches": _heat_map(batches, f"batches to convergence{late}"),
    }


def place(name: str) -> tuple[str, str]:
    """A layer's block and what it is called in there: `trunk.blocks.3.attention.q` is `q` of block `3`."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return (numbers[0] if numbers else ""), name.rpartition(".")[2]


def _heat_map(values: Mapping[str, float], title: str) -> Figure:
    """A number for each layer: blocks from top to bottom, layers of a block from left to right."""
    from matplotlib.figure import Figure

    places = {name: place(name) for name in values}
    if len(set(places.values())) < len(places):  # blocks within blocks: a row for each layer
        places = {name: (name, "") for name in values}
    blocks, kinds = (list(dict.fromkeys(own)) for own in zip(*places.values(), strict=True))
    table = np.full((len(blocks), len(kinds)), np.nan)
    for name, (block, kind) in places.items():
        table[blocks.index(block), kinds.index(kind)] = values[name]
    figure = Figure(figsize=CARD, layout="constrained")
    axes = figure.subplots()
    _colour(axes, table)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=13)
    axes.set_yticks(range(len(blocks)), [f"block {b}" if b.isdecimal() else b for b in blocks], fontsize=13)
    axes.set_title(title, fontsize=14)
    return figure


def _colour(axes: Axes, table: np.ndarray) -> None:
    """The table as colours, with its numbers where they find room."""
    image = axes.imshow(table, aspect="auto", cmap="viridis")
    if table.size > ANNOTATED:
        axes.figure.colorbar(image, ax=axes)
        return
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = np.asarray(image.norm(value)) < 0.6
            axes.text(
                column, row, f"{value:g}", ha="center", va="center", fontsize=13, color="white" if dark else "black"
            )


def _spectra(inputs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A line of cumulative variance for each input, with a colour for each kind of layer.

    A dot marks the rank of the layer that reads the input.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(place(name)[1] for name in inputs))
    figure = Figure(figsize=CARD, layout="constrained")
    axes, colours, named = figure.subplots(), colormaps["tab10"], set()
    for name, own in inputs.items():
        kind, values, rank = place(name)[1], own["cumulative"], own["rank"]
        colour = colours(kinds.index(kind) % 10)
        axes.plot(range(1, len(values) + 1), values, color=colour, label=None if kind in named else kind)
        named.add(kind)
        if rank:
            axes.plot(rank, values[rank - 1], "o", color=colour)
    axes.set_xlabel("components (dot: rank given)", fontsize=13)
    axes.set_ylabel("share of variance of the rows seen", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.legend(title="input of", fontsize=12, title_fontsize=12)
    return figure
