"""What each domain contributes to a step of training on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from eva_rl.batch import Batch, Mixture


def by_domain(
    domains: Mapping[str, str], loss: Callable[[Mixture], Tensor], shared: Sequence[nn.Parameter]
) -> Callable[[Batch | Mixture], dict[str, float]]:
    """A function that returns a batch's loss in each domain, and each domain's share of the gradient's length.

    Args:
        domains: each interface's domain.
        loss: the mean over a batch's real steps.
        shared: the parameters that all domains train. A domain's gradient is that of its part of the batch's loss with
            respect to them.
    """
    return partial(_by_domain, domains, loss, shared)


def _by_domain(
    domains: Mapping[str, str],
    loss: Callable[[Mixture], Tensor],
    shared: Sequence[nn.Parameter],
    batch: Batch | Mixture,
) -> dict[str, float]:
    parts: dict[str, list[Batch]] = {}
    for part in batch.parts:
        parts.setdefault(domains[part.interface], []).append(part)
    losses, lengths = {}, {}
    devices = [shared[0].device] if shared[0].is_cuda else []
    with torch.random.fork_rng(devices):  # dropout here must not move the training's
        for domain, own in parts.items():
            mixture = Mixture(tuple(own))
            value = loss(mixture)
            gradients = torch.autograd.grad(value * (mixture.steps / batch.steps), shared)
            losses[domain] = value.item()
            lengths[domain] = torch.stack([g.norm() for g in gradients]).norm().item()
    total = sum(lengths.values()) or 1.0
    return {f"loss/{domain}": value for domain, value in losses.items()} | {
        f"gradient_share/{domain}": length / total for domain, length in lengths.items()
    }
