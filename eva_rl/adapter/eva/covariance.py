"""The exact scatter matrix of all rows seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_rl.adapter.eva.moments import Moments, orthonormal
from eva_rl.adapter.eva.peers import Peers


class Covariance(Moments):
    """The d x d scatter of all rows: the same, up to rounding, for any split of them into batches and any order.

    Subspace iteration follows the components from batch to batch, to know when to stop. The components returned are
    exact. Memory is O((n + d) d) a stream and time n d^2 a batch, however few components are asked for.
    """

    noise = 1e-6  # the scatter is a sum of float32 products, so it may be a little indefinite

    def __init__(self, streams: int, width: int, *args: Any, **options: Any):
        super().__init__(streams, width, *args, **options)
        self.scatter = torch.zeros(streams, width, width, dtype=torch.float64, device=self.mass.device)  # (G, d, d)

    def _absorb(self, streams: Tensor, rows: Tensor, correction: Tensor) -> None:
        products = rows.mT @ rows + correction[..., None] * correction[:, None]  # (A, d, d)
        for stream, product in zip(streams.tolist(), products, strict=True):
            self.scatter[stream] += product

    def _multiply(self, streams: Tensor, rows: Tensor, correction: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        basis = basis.double()
        image = torch.stack([q @ self.scatter[s] for s, q in zip(streams.tolist(), basis, strict=True)])  # (A, k, d)
        core = image @ basis.mT
        return image, (core + core.mT) / 2

    def _merge(self, peers: Peers, apart: Tensor) -> None:
        self.scatter = peers.sum(self.scatter) + torch.einsum("pgd,pge->gde", apart, apart)

    def _eigen(self, stream: int) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.scatter[stream])  # ascending; (d,), (d, d)
        return values.clamp(min=0), vectors.mT

    def leading(self, stream: int, k: int) -> tuple[Tensor, Tensor]:
        values, vectors = self._eigen(stream)
        return orthonormal(vectors[-k:].flip(0)), values[-k:].flip(0)

    def minor(self, stream: int, k: int) -> Tensor:
        """The k components (k, d) that hold least variance, the least first."""
        return orthonormal(self._eigen(stream)[1][:k])
