"""Exact second-order statistics of a stream of rows, and their leading components."""

from __future__ import annotations

import torch
from torch import Tensor


class Covariance:
    """Mean and scatter of all rows seen; the same, up to rounding, for any split of the rows into batches.

    Updates follow Chan, Golub & LeVeque (1979): each batch is centred at its own mean, so that a large mean does not
    cancel the variance; products are computed in float32 and accumulated in float64.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)  # (d,)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)  # (d, d)

    def update(self, rows: Tensor) -> None:
        """Take in rows (n, d) of any floating dtype."""
        if len(rows) == 0:
            return
        rows = rows.float()
        mean = rows.double().mean(0)
        centred = rows - mean.float()
        remainder = centred.double().mean(0)  # what rounding the mean to float32 left over
        self._merge(len(rows), mean, (centred.T @ centred).double() - len(rows) * torch.outer(remainder, remainder))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        delta = mean - self.mean
        total = self.count + count
        self.scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def moments(self, center: bool = True) -> Tensor:
        """(d, d): the scatter about the mean, or (uncentred) about zero, `X^T X`."""
        return self.scatter if center else self.scatter + self.count * torch.outer(self.mean, self.mean)


def leading_components(moments: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenvectors, as rows (k, d), and eigenvalues (k,) of a symmetric positive matrix, largest first.

    For moments `X^T X` these are the leading right-singular vectors of X and its squared singular values. Signs are
    fixed: the largest entry of each vector is positive.
    """
    values, vectors = torch.linalg.eigh(moments)
    return _signed(vectors.flip(1)[:, :k].T), values.flip(0)[:k].clamp(min=0)


def refine_components(moments: Tensor, start: Tensor, steps: int = 8) -> Tensor:
    """Approximate leading components (k, d): orthogonal iteration from `start` (k, d), then Rayleigh-Ritz."""
    basis = start.T
    for _ in range(steps):
        basis = torch.linalg.qr(moments @ basis).Q  # (d, k)
    _, rotation = torch.linalg.eigh(basis.T @ moments @ basis)  # (k, k)
    return _signed((basis @ rotation.flip(1)).T)


def _signed(components: Tensor) -> Tensor:
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # (k, 1)
    return components * torch.where(largest < 0, -1.0, 1.0)
