"""Several processes, each with data of its own: what they tell each other. Never activations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from eva_rl.adapter.eva.covariance import Covariance
from eva_rl.adapter.eva.moments import Moments
from eva_rl.adapter.eva.streaming import StreamingSvd, merge


class Peers:
    """The processes of `torch.distributed`, where it is initialised (accelerate and torchrun do), else this one alone."""

    def __init__(self, together: bool = True):
        self.count = dist.get_world_size() if together and dist.is_available() and dist.is_initialized() else 1

    def mean(self, values: Tensor) -> Tensor:
        """The mean of every process's values."""
        return self._sum(values) / self.count

    def all_have_one(self, has: bool, device: torch.device) -> tuple[bool, bool]:
        """Whether any process, and whether every process, still has a batch."""
        total = int(self._sum(torch.tensor(int(has), device=device)))
        return total > 0, total == self.count

    def combine(self, moments: Moments) -> None:
        """Replace every process's statistics by those of all their rows.

        A `StreamingSvd` sends k x d vectors a stream, a `Covariance` its d x d matrix.
        """
        if self.count == 1:
            return
        masses, means = self._gather(moments.mass), self._gather(moments.mean)  # (P, G), (P, G, d)
        mass = masses.sum(0)
        mean = (masses[..., None] * means).sum(0) / mass.clamp(min=1e-300)[:, None]
        apart = (means - mean) * masses.sqrt()[..., None]  # (P, G, d): between the processes; 0 if not centred
        moments.variance = self._sum(moments.variance) + apart.square().sum((0, 2))
        rounding = 8 * torch.finfo(moments.dtype).eps * mean.abs()  # (G, d)
        alike = (apart.abs() <= masses.sqrt()[..., None] * rounding).all(2).all(0)
        moments.constant = alike & (self._sum((~moments.constant).int()) == 0)
        if isinstance(moments, Covariance):
            moments.scatter = self._sum(moments.scatter) + torch.einsum("pgd,pge->gde", apart, apart)
        if isinstance(moments, StreamingSvd):
            moments.values, basis = merge(self._gather(moments.values), self._gather(moments.basis), apart)
            moments.basis = basis.to(moments.dtype)
        moments.mass, moments.mean = mass, mean

    def _sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            values = values.contiguous().clone()
            dist.all_reduce(values)
        return values

    def _gather(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)
