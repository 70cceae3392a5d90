"""Second-order statistics of streams of rows, and the subspace that holds most of their variance.

Streams of equal width are kept in one stack, so that one batched call updates them all. What a stream's statistics are
kept in (a few vectors, or the whole matrix) is left to `StreamingSvd` and `Covariance`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_rl.adapter.eva.peers import Peers

FIRST_ITERATIONS = 2
"""Power iterations on the first batch, started from random mixtures of its rows. Later ones start near their goal."""

NEWCOMERS = 4
"""Random mixtures of some of a batch's rows that join the components in the iteration, for directions orthogonal to all of
them."""


@dataclass(frozen=True)
class Change:
    """What one batch did to the components of A streams."""

    finite: Tensor  #: (A,) bool: the rows were
    cosines: Tensor  #: (A, k) between each component and its predecessor
    captured: Tensor  #: (A, k) share of variance the first j components will hold of what the best j do; see `_expect`


class Moments(ABC):
    """Mean, total variance and k leading components of the rows of G streams, each d wide.

    Sums are kept in float64, rows and products in float32 (float64 for float64 rows).
    """

    noise: float
    """Size of the rounding errors in products, as a share of all variance, below which a direction counts as empty."""

    def __init__(
        self, streams: int, width: int, k: int, center: bool, dtype: torch.dtype, device: torch.device, seed: int
    ):
        self.center = center
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        double = {"dtype": torch.float64, "device": device}
        self.mass = torch.zeros(streams, **double)  # (G,) rows, or the sum of their weights
        self.mean = torch.zeros(streams, width, **double)  # (G, d)
        self.variance = torch.zeros(
            streams, **double
        )  # (G,) squared distance of all rows to their mean: the sum of all S^2
        self.constant = torch.ones(
            streams, dtype=torch.bool, device=device
        )  # (G,) so far, up to the rounding of the mean
        self.values = torch.zeros(streams, k, **double)  # (G, k) S^2, in descending order
        basis = torch.eye(k, width, dtype=self.dtype, device=device)
        self.basis = basis.expand(streams, k, width).clone()  # (G, k, d) orthonormal rows: V^T
        self.before = self.basis  # (G, k, d) a batch ago
        self.losses = torch.zeros_like(self.values)  # (G, k) what `_expect` averages
        self.batches = torch.zeros_like(self.mass)  # (G,)
        self.seed = seed
        self.scratch = torch.empty(0, dtype=self.dtype, device=device)

    def room(self, streams: int, rows: int) -> Tensor:
        """Memory (streams, rows, d) in the arithmetic's precision, the same at every call."""
        shape = streams, rows, self.mean.shape[1]
        if self.scratch.numel() < math.prod(shape):
            self.scratch = self.scratch.new_empty(math.prod(shape))
        return self.scratch[: math.prod(shape)].view(shape)

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows (n, d) of A streams as one (A, n, d): where they lie, if they were written to `room`, else a copy."""
        if self.scratch.numel() >= len(rows) * rows[0].numel():
            stacked = self.room(len(rows), len(rows[0]))
            if all(target.data_ptr() == source.data_ptr() for target, source in zip(stacked, rows, strict=True)):
                return stacked
        return torch.stack(list(rows)).to(self.mass.device, self.dtype)

    def update(self, streams: Tensor, rows: Tensor, weights: Tensor | None = None) -> Change:
        """Take in rows (A, n, d) of these streams (A,), and overwrite the rows.

        Each row counts as one, or by its weight if there are weights (A, n).
        """
        mass = self.mass[streams]
        first = self.variance[streams] == 0
        starting = bool(first.any())
        finite, correction = self._center(streams, rows, weights)
        if not finite.all():
            return Change(finite, *(2 * [torch.zeros_like(self.values[streams])]))
        self._absorb(streams, rows, correction)
        start = basis = self.basis[streams]
        scale = self.variance[streams]
        k = basis.shape[1]
        if starting:
            start = basis = torch.where(first[:, None, None], self._mixtures(rows, k), basis)
        for iteration in range(FIRST_ITERATIONS if starting else 1):
            basis = self._joined_by_newcomers(basis, rows, correction)
            image, core = self._multiply(streams, rows, correction, basis)
            if iteration == 0:
                quotients = core.diagonal(dim1=-2, dim2=-1)[:, :k]  # (A, k) variance along the vectors of a batch ago
            basis, values = nystrom(image, core, basis, self.noise * scale)
            basis, values = basis[:, :k].to(self.dtype), values[:, :k]
        self.basis = self.basis.index_copy(0, streams, basis)
        self.values[streams] = values
        self.before = self.before.index_copy(0, streams, start)
        return Change(
            finite=finite,
            cosines=(start * basis).sum(-1).abs(),
            captured=self._expect(streams, quotients, values, mass),
        )

    def _mixtures(self, rows: Tensor, count: int) -> Tensor:
        """(A, count, d) orthonormal rows in the span of random mixtures of the rows (A, n, d)."""
        mix = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(self.seed))
        return torch.linalg.qr((mix.to(rows) @ rows).mT).Q.mT

    def _joined_by_newcomers(self, basis: Tensor, rows: Tensor, correction: Tensor) -> Tensor:
        """The basis (A, k, d) and mixtures of the rows, orthonormal together.

        Without the mixtures, the iteration would never see rows that are exactly orthogonal to the basis, such as those
        of columns that were silent until now.
        """
        count, some = min(NEWCOMERS, rows.shape[2] - basis.shape[1]), rows[:, :: 1 + rows.shape[1] // 128]
        mix = torch.randn(count, some.shape[1] + 1, generator=torch.Generator().manual_seed(self.seed)).to(rows)
        new = mix[:, :-1] @ some + mix[:, -1:] * correction[:, None]  # (A, count, d)
        for _ in range(2):  # twice is enough
            new = torch.nn.functional.normalize(new, dim=-1)
            new = new - (new @ basis.mT) @ basis
        new = torch.linalg.qr(new.mT).Q.mT
        return torch.cat([basis, new], 1)

    def _center(self, streams: Tensor, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Subtract the batch's mean from the rows, for which a correction makes up.

        The scatter of all rows is the sum of that of the rows so far, that of the centred batch, and the outer product
        of the correction with itself. See Chan, Golub & LeVeque (1979), and eq. 4 of Ross et al. (2008).

        Returns:
            Which streams are finite (A,), and the correction (A, d).
        """
        if weights is None:
            mass = torch.full_like(self.mass[streams], rows.shape[1])  # (A,)
            mean = rows.mean(1)  # (A, d)
        else:
            mass = weights.double().sum(1)
            mean = (weights[:, None] @ rows)[:, 0].double() / mass.clamp(min=1e-300)[:, None]
            mean = mean.to(rows.dtype)
        so_far = self.mass[streams]
        share = mass / (so_far + mass).clamp(min=1e-300)  # (A,) of the rows that are new
        shift = mean.double() - self.mean[streams]  # (A, d)
        if self.center:
            rows -= mean[:, None]
            correction = (so_far * share).sqrt()[:, None] * shift
            self.mean[streams] += share[:, None] * shift
        else:
            correction = torch.zeros_like(shift)
        if weights is not None:
            rows *= weights.sqrt()[..., None]
        correction = correction.to(rows.dtype)
        new = torch.linalg.vector_norm(rows, dim=(1, 2)).square() + correction.square().sum(-1)  # (A,)
        self.variance[streams] += new
        self.mass[streams] += mass
        self.constant[streams] &= self._constant(rows, correction, mean, mass, new)
        return torch.isfinite(new) & torch.isfinite(mean).all(-1) & torch.isfinite(mass), correction

    def _constant(self, rows: Tensor, correction: Tensor, mean: Tensor, mass: Tensor, spread: Tensor) -> Tensor:
        """(A,) bool: what is left of these rows in total, `spread`, is the rounding of their mean."""
        rounding = mass[:, None] * (8 * torch.finfo(rows.dtype).eps * mean).square() * self.center  # (A, d)
        found = spread <= rounding.sum(-1)
        for i in found.nonzero()[:, 0].tolist():  # rare, so that columns need to be told apart for few
            found[i] = (rows[i].square().sum(0) + correction[i].square() <= rounding[i]).all()
        return found

    def _expect(self, streams: Tensor, quotients: Tensor, values: Tensor, before: Tensor) -> Tensor:
        """(A, k): the share of the best j components' variance that the present j will hold once all data are seen.

        On the data so far, the components of a batch ago hold `sum(quotients)` where the present ones hold
        `sum(values)`. The last batch moved the covariance by D n / (N + n), with D the difference between batch and
        data so far. As batches are independent, what is left to the limit is N / n times that in the mean square. So is
        the loss, which is quadratic in the error of the subspace. The loss falls as 1 / (N + n), so each batch but the
        first gives an estimate of `loss * (N + n)`. An estimate scatters about as widely as it is large. The loss
        reported is that of their mean plus one standard error. The share is 0 before the second batch.
        """
        best, held = values.cumsum(-1), quotients.cumsum(-1)  # (A, k)
        gained = torch.where(best > 0, 1 - held / best.clamp(min=1e-300), 0).clamp(min=0)
        rows = self.mass[streams]
        new = (rows - before).clamp(min=1e-300)
        self.losses[streams] += (before / new * rows)[:, None] * gained
        self.batches[streams] += before > 0
        estimates = self.batches[streams].clamp(min=1)[:, None]
        loss = self.losses[streams] / estimates * (1 + estimates.rsqrt()) / rows.clamp(min=1e-300)[:, None]
        captured = (1 - loss).clamp(min=0)
        return torch.where((self.batches[streams] > 0)[:, None], captured, 0)

    def leading(self, stream: int, k: int) -> tuple[Tensor, Tensor]:
        """The k leading components (k, d) of a stream, orthonormal to float64, and their S^2 (k,)."""
        return orthonormal(self.basis[stream, :k].double()), self.values[stream, :k]

    def angle(self, stream: int, k: int) -> float:
        """The largest principal angle, in degrees, between the first k components and those of a batch ago."""
        return principal_angle(self.before[stream, :k], self.basis[stream, :k])

    def combine(self, peers: Peers) -> None:
        """Replace every process's statistics by those of all their rows."""
        if peers.count == 1:
            return
        masses, means = peers.gather(self.mass), peers.gather(self.mean)  # (P, G), (P, G, d)
        mass = masses.sum(0)
        mean = (masses[..., None] * means).sum(0) / mass.clamp(min=1e-300)[:, None]
        apart = (means - mean) * masses.sqrt()[..., None]  # (P, G, d): between the processes; 0 if not centred
        self.variance = peers.sum(self.variance) + apart.square().sum((0, 2))
        rounding = 8 * torch.finfo(self.dtype).eps * mean.abs()  # (G, d)
        alike = (apart.abs() <= masses.sqrt()[..., None] * rounding).all(2).all(0)
        self.constant = alike & (peers.sum((~self.constant).int()) == 0)
        self._merge(peers, apart)
        self.mass, self.mean = mass, mean

    @abstractmethod
    def _merge(self, peers: Peers, apart: Tensor) -> None:
        """Merge the components with those of every process.

        `apart` (P, G, d): each process's mean less the mean of all, times the square root of its number of rows.
        """

    @abstractmethod
    def _absorb(self, streams: Tensor, rows: Tensor, correction: Tensor) -> None:
        """Take the centred rows (A, n, d) and their correction (A, d) into the statistics."""

    @abstractmethod
    def _multiply(self, streams: Tensor, rows: Tensor, correction: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """(Q C, Q C Q^T) in float64 for the scatter C of all rows, these included, and a basis Q (A, k, d)."""


def nystrom(image: Tensor, core: Tensor, basis: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors (A, k, d), as rows, and eigenvalues (A, k) of C as far as it shows in Q C and Q C Q^T.

    They are those of the Nystrom approximation `(Q C)^T (Q C Q^T)^-1 (Q C)`, the best one of rank k with these products:
    one power iteration and a Rayleigh-Ritz step for the price of one product with C. A small multiple of the identity,
    `noise` (A,), is added for stability and taken off again (Tropp et al. 2017, arXiv 1706.05736, algorithm 3). In
    directions that C leaves empty, this multiple keeps the vectors of the basis.
    """
    shift = noise.clamp(min=1e-200)[:, None]  # (A, 1)
    for _ in range(8):  # some processors round more coarsely than `noise` allows for: ten times as much then
        shifted = core + torch.diag_embed(shift.expand(core.shape[:-1]))
        lower, failed = torch.linalg.cholesky_ex(shifted)  # L L^T = Q C Q^T
        if not failed.any():
            break
        shift = torch.where(failed[:, None] > 0, 10 * shift, shift)
    else:
        lower = torch.linalg.cholesky(shifted)  # raises
    factor = torch.linalg.solve_triangular(lower, image + shift[..., None] * basis, upper=False)  # F^T F ~ C
    values, rotation = torch.linalg.eigh(factor @ factor.mT)
    values, rotation = values.flip(-1), rotation.flip(-1)
    vectors = (rotation.mT @ factor) / values.clamp(min=1e-300).sqrt()[..., None]  # (A, k, d)
    return vectors, (values - shift).clamp(min=0)


def orthonormal(rows: Tensor) -> Tensor:
    """Nearly orthonormal rows (k, d) made orthonormal, with the largest entry of each positive."""
    rows = torch.linalg.qr(rows.mT).Q.mT
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # (k, 1)
    return rows * torch.where(largest < 0, -1.0, 1.0)


def principal_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle, in degrees, between the spans of the orthonormal rows of a and b (k, d)."""
    if not len(a):
        return 0.0
    a, b = orthonormal(a.double()), orthonormal(b.double())
    sine = torch.linalg.svdvals(b - b @ a.mT @ a)[0].clamp(max=1)  # exact for small angles, where cosines are not
    return float(torch.rad2deg(torch.asin(sine)))
