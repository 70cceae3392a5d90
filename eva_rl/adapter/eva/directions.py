"""Components -> A, and the ablations that put other directions in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_rl.adapter.eva.moments import Moments, orthonormal
from eva_rl.adapter.eva.settings import EvaSettings


def choose_rows(
    moments: Moments, stream: int, leading: Tensor, settings: EvaSettings, generator: torch.Generator
) -> Tensor:
    """A's rows (r, d) for a layer whose r leading components these are."""
    rank, width = leading.shape
    if settings.components == "random":
        rows = orthonormal(_randn(rank, width, generator).to(leading))
    elif settings.components == "minor":
        rows = moments.minor(stream, rank)
    else:
        rows = leading
    if settings.rotation:
        rows = torch.linalg.qr(_randn(rank, rank, generator)).Q.to(rows) @ rows
    if settings.permutation:
        order = torch.rand(rank, width, generator=generator).argsort(1)
        rows = rows.gather(1, order.to(rows.device))
    if settings.whiten:
        deviation = (moments.values[stream, :rank] / (moments.mass[stream] - 1).clamp(min=1)).sqrt()
        rows = rows / torch.where(deviation > 0, deviation, 1)[:, None]
    return rows.float()


def _randn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)
