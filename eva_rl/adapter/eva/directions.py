"""Components -> A, and the ablations that put other directions in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_rl.adapter.eva.covariance import Covariance
from eva_rl.adapter.eva.moments import Moments, orthonormal
from eva_rl.adapter.eva.settings import EvaSettings


def choose_rows(
    moments: Moments, stream: int, leading: Tensor, settings: EvaSettings, generator: torch.Generator
) -> Tensor:
    """A's rows (r, d) for a layer whose r leading components these are."""
    rank, width = leading.shape
    if settings.components == "random":
        rows = random_rows(rank, width, generator).to(leading)
    elif settings.components == "minor":
        assert isinstance(moments, Covariance)  # the settings see to it
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


def random_rows(rank: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """(rank, width) float64 orthonormal rows, uniformly random."""
    return orthonormal(_randn(rank, width, generator))


def _randn(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)
