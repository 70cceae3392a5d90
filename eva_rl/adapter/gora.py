"""GoRA: ranks and B from the loss's gradient, A random (He et al. 2025, arXiv 2502.12171)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from eva_rl.adapter.eva import LayerResult
from eva_rl.adapter.eva.load import load_components, lora_layers
from eva_rl.adapter.starts import TaskData, oriented, start_at, with_gradients

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel

LEAST, MOST = 0.5, 4.0
"""The fewest and most ranks of a layer, as multiples of the nominal one."""


def gora(
    model: nn.Module, config: LoraConfig, data: TaskData, step: float = 0.05
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """More ranks where mean |W * G| is large, G being the loss's mean gradient, and s B A = -step sqrt(in / r) G P_A.

    P_A projects onto the rows of A, which are Kaiming's: of all B that is the one whose product is nearest to -step sqrt(in / r) G.
    The factor makes up for what a random A loses. W stays as it is.

    Raises:
        UserError: if there is no loss of a batch, or no batch.
    """
    peft_model, layers, gradients = with_gradients(model, config, data, "GoRA")
    with torch.no_grad():
        weights = [layer.get_base_layer().weight for layer in layers]
        nominal = [layer.r["default"] for layer in layers]
        importances = [float((w * g).abs().mean()) for w, g in zip(weights, gradients, strict=True)]
        shapes = [oriented(layer, weight).shape for layer, weight in zip(layers, weights, strict=True)]  # (out, in)
        ranks = shared_out(importances, shapes, nominal)
        names = [name for name, _ in lora_layers(model)]
        rows = [torch.empty(rank, width) for rank, (_, width) in zip(ranks, shapes, strict=True)]
        load_components(
            peft_model, {n: nn.init.kaiming_uniform_(a, a=5**0.5) for n, a in zip(names, rows, strict=True)}, "default"
        )
        for (_, layer), gradient in zip(lora_layers(model), gradients, strict=True):
            a = layer.lora_A["default"].weight.double()  # (r, in)
            full = -step * (a.shape[1] / len(a)) ** 0.5 * oriented(layer, gradient).double() / data.few
            start_at(layer, a, full @ torch.linalg.pinv(a) / layer.scaling["default"])
    return peft_model, {}


def shared_out(importances: Sequence[float], shapes: Sequence[Sequence[int]], nominal: Sequence[int]) -> list[int]:
    """Ranks that rise with importance / sqrt(in + out), for as many weights in all as the nominal ones.

    They lie between `LEAST` and `MOST` times the nominal ranks. The paper's ranks are
    round(budget importance / sqrt(in + out)). Here the budget is chosen so that the number of weights stays.
    """
    costs = [sum(shape) for shape in shapes]
    total = sum(rank * cost for rank, cost in zip(nominal, costs, strict=True))
    bounds = [
        (max(1, round(LEAST * rank)), min(round(MOST * rank), *shape))
        for rank, shape in zip(nominal, shapes, strict=True)
    ]
    worth = [max(value, 1e-30) / cost**0.5 for value, cost in zip(importances, costs, strict=True)]

    def ranks(budget: float) -> list[int]:
        return [min(max(round(budget * own), low), high) for own, (low, high) in zip(worth, bounds, strict=True)]

    low, high = 0.0, max(bound for _, bound in bounds) / min(worth)
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(rank * cost for rank, cost in zip(ranks(middle), costs, strict=True))
        low, high = (middle, high) if spent <= total else (low, middle)
    chosen = ranks(low)
    left = total - sum(rank * cost for rank, cost in zip(chosen, costs, strict=True))
    for number in sorted(range(len(costs)), key=lambda n: chosen[n] - low * worth[n]):  # the most deprived first
        if costs[number] <= left and chosen[number] < bounds[number][1]:
            chosen[number] += 1
            left -= costs[number]
    return chosen
