"""Incremental SVD: a few vectors stand for all rows seen."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_rl.adapter.eva.moments import Moments
from eva_rl.adapter.eva.peers import Peers

OVERSAMPLING = 8
"""Vectors kept beyond those asked for, without which the k-th component, cut off at every batch, would be learned late."""


class StreamingSvd(Moments):
    """The truncated SVD of all rows, `S V^T`, updated batch by batch (Ross et al. 2008, with mean correction).

    Each update approximates the leading right-singular vectors of `[S V^T; X - mean; correction]`, warm-started from V: one
    power iteration, that is two products with X. Memory: O((k + n) d) a stream.
    """

    noise = 1e-6

    def _absorb(self, streams: Tensor, rows: Tensor, correction: Tensor) -> None:
        pass  # the present vectors still lack the batch; `_multiply` adds it

    def _multiply(self, streams: Tensor, rows: Tensor, correction: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        past, values = self.basis[streams], self.values[streams]  # V^T (A, k, d), S^2 (A, k)
        weighted = (basis @ past.mT).double() * values[:, None]  # Q V S^2 (A, k, k)
        projected = rows @ basis.mT  # (A, n, k)
        corrected = basis @ correction[..., None]  # (A, k, 1)
        image = (projected.mT @ rows + corrected @ correction[:, None]).double() + weighted @ past.double()
        core = image @ basis.mT.double()
        return image, (core + core.mT) / 2

    def _merge(self, peers: Peers, apart: Tensor) -> None:
        self.values, basis = merge(peers.gather(self.values), peers.gather(self.basis), apart)
        self.basis = basis.to(self.dtype)


def merge(values: Tensor, bases: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """One SVD of all rows from those of P parts: S^2 (P, G, k) and V^T (P, G, k, d) -> S^2 (G, k) and V^T (G, k, d).

    `apart` (P, G, d): each part's mean less the mean of all, times the square root of its number of rows.
    """
    sketches = values.sqrt()[..., None] * bases.double()  # (P, G, k, d)
    stacked = torch.cat([*sketches, apart.transpose(0, 1)], 1)  # (G, P * k + P, d)
    _, singular, vectors = torch.linalg.svd(stacked, full_matrices=False)
    k = values.shape[-1]
    return singular[:, :k].square(), vectors[:, :k]
