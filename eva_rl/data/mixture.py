"""Windows of several interfaces and domains in one batch, each with its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eva_rl.batch import Batch, Mixture
from eva_rl.data.windows import WindowSampler
from eva_rl.errors import UserError, did_you_mean


class MixtureSampler:
    """Draws batches from several samplers, from each the share of the windows that its weight has of all weights.

    Shares that are no whole numbers are rounded up or down at random, such that they hold on average.
    """

    def __init__(self, samplers: Sequence[WindowSampler], weights: Sequence[float], batch_size: int, seed: int):
        self.samplers, self.batch_size, self.seed = samplers, batch_size, seed
        self.ends = np.cumsum(weights) / np.sum(weights)

    def batch(self, number: int) -> Batch | Mixture:
        """Batch `number` of this seed's endless sequence."""
        rng = np.random.default_rng((self.seed, number))
        points = (rng.random() + np.arange(self.batch_size)) / self.batch_size  # systematic sampling
        counts = np.diff(np.searchsorted(points, self.ends[:-1]), prepend=0, append=self.batch_size)
        parts = [sampler.draw(rng, int(n)) for sampler, n in zip(self.samplers, counts, strict=True) if n]
        return parts[0] if len(parts) == 1 else Mixture(tuple(parts))


def domain_weights(
    sizes: Mapping[str, int], weights: Mapping[str, float] | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """The share of the windows that each domain gets: w n^(1 / temperature) over the sum of all, n its transitions.

    A temperature of 1 shares out by size, and a high one evenly (Conneau & Lample 2019, section 3.1, with
    alpha = 1 / temperature).

    Raises:
        UserError: if the temperature or a weight is not positive, or a weight is for a domain that is not in the
            mixture.
    """
    weights = weights or {}
    if not temperature > 0:
        raise UserError(f"temperature must be a number above 0, got {temperature}.")
    for domain, weight in weights.items():
        if domain not in sizes:
            raise UserError(f"weights names '{domain}', which is not in the mixture. {did_you_mean(domain, sizes)}")
        if not 0 < weight < np.inf:
            raise UserError(f"weights.{domain} must be a number above 0, got {weight}.")
    largest = max(sizes.values(), default=1)  # its power is 1, and the others' too small at worst
    shares = {domain: weights.get(domain, 1.0) * (n / largest) ** (1 / temperature) for domain, n in sizes.items()}
    return {domain: share / sum(shares.values()) for domain, share in shares.items()}
