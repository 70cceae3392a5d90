"""FILA: A and B from the part of W that matters to the task (Cha et al. 2024, arXiv 2408.06621)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva import LayerResult
from eva_rl.adapter.starts import TaskData, oriented, take_out, with_gradients

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel


def fila(model: nn.Module, config: LoraConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """s B A minimises ||diag(w) (W - s B A)||_F over the products of rank r, and is taken out of W.

    w_i^2 is the importance of output i. The importance of an entry of W is the mean square of the loss's gradient
    there, its Fisher information for the task, with batches in place of samples. The authors divide it by the
    importance for what should be kept. Data for the latter are not at hand here.

    Raises:
        UserError: if there is no loss of a batch, or no batch.
    """
    peft_model, layers, squares = with_gradients(model, config, data, "FILA", squared=True)
    with torch.no_grad():
        for layer, square in zip(layers, squares, strict=True):
            weight = oriented(layer, layer.get_base_layer().weight).float()  # (out, in)
            scale, rank = layer.scaling["default"], layer.r["default"]
            take_out(layer, *weighted(weight, importance(oriented(layer, square).float()), rank, scale))
    return peft_model, {}


def importance(squares: Tensor) -> Tensor:
    """w (out,), of mean 1: the root of each row's sum of squared gradients (out, in), or ones where there are none."""
    w = squares.sum(1).sqrt()
    return w / w.mean() + 1e-5 if w.mean() > 0 else torch.ones_like(w)


def weighted(weight: Tensor, w: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the best scale B A for a weight (out, in) whose rows count as w (out,) says.

    With diag(w) W = U S V^T, A = sqrt(S_r / s) V_r^T and B = diag(1 / w) U_r sqrt(S_r / s).
    """
    u, s, vt = torch.linalg.svd(w[:, None] * weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root / w[:, None]
