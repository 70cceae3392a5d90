"""Explained Variance Adaptation (EVA, arXiv 2410.07170): activations of the new task -> LoRA's A matrices.

    for each adapted weight W (k x d) with inputs X (n x d):   X - mean(X) = U S V^T
    A <- the first r rows of V^T                               (theorem 3.1: the subspace that captures most variance)
    r  by explained variance, the sum over all layers fixed    (Eq. 6)

The covariance of every layer's input is accumulated exactly, so the components are those of a full SVD of all rows seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva.covariance import Covariance, leading_components, refine_components
from eva_rl.adapter.eva.ranks import RANKINGS, explained, redistribute
from eva_rl.errors import UserError


@dataclass(frozen=True)
class EvaSettings:
    """How long to look at activations, and how to choose among their components."""

    rho: float = 2.0
    """A layer may get up to rho times its nominal rank; 1 keeps all ranks equal."""
    tau: float = 0.99
    """A layer has converged when each component's cosine similarity to the one a batch ago is at least this. While the
    stream runs, components are followed by orthogonal iteration; those returned are exact."""
    max_batches: int = 64
    center: bool = True
    """Components about the mean, as published; False: about zero, the `Sigma = E[x x^T]` of theorem 3.2."""
    ranking: str = "ratio"
    """What components are worth when ranks are shared out: `ratio` or `paper`, see `explained`."""

    def __post_init__(self) -> None:
        if self.rho < 1 or not 0 < self.tau <= 1 or self.max_batches < 1:
            raise UserError(
                f"EVA was given rho={self.rho}, tau={self.tau}, max_batches={self.max_batches}, where rho >= 1, "
                "0 < tau <= 1 and max_batches >= 1 were expected."
            )
        if self.ranking not in RANKINGS:
            raise UserError(f"EVA was given ranking={self.ranking}, where one of {RANKINGS} was expected.")


@dataclass(frozen=True)
class LayerResult:
    """What EVA found for one layer."""

    components: Tensor  # (rank, d) float32, orthonormal rows
    explained: Tensor  # (candidates,) what each candidate component is worth, as ranked
    batches: int
    """Batches until the components had converged."""


@dataclass
class _Group:
    """Layers that read the same tensor, and the statistics of it."""

    layers: list[str]
    candidates: int
    covariance: Covariance
    components: Tensor | None = None
    similarity: float = 0.0
    batches: int = 0
    converged: bool = False


@dataclass
class _Pass:
    """The tensors seen in one forward pass, and which group each belongs to."""

    rows: Tensor | None = None
    seen: list[tuple[Tensor, _Group]] = field(default_factory=list)


@torch.no_grad()
def eva_init(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Mapping[str, int],
    settings: EvaSettings,
    token_mask: Callable[[Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> dict[str, LayerResult]:
    """Run batches through `model` until every layer's components have converged, and share out the ranks.

    Args:
        model: any module; it runs in evaluation mode and is left as it was, also when something raises.
        batches: consumed one by one, no more than `settings.max_batches`.
        ranks: nominal rank for each layer's name in `model.named_modules()`; their sum is the budget.
        token_mask: boolean tensor for a batch whose shape is that of the layers' inputs without the last dimension;
            only rows where it is True count. None: all do.
        forward: runs the model on a batch.

    Returns:
        For each layer A's rows, as many as the rank it was given, possibly 0.

    Raises:
        UserError: if there are no batches, a layer never runs, its activations are not finite, or its candidates exceed
            its width.
    """
    groups: dict[str, _Group] = {}
    for name, rank in ranks.items():
        width = _input_width(model.get_submodule(name), name)
        if not 1 <= rank <= width:
            raise UserError(f"Rank {rank} was asked for layer '{name}', whose inputs have {width} dimensions.")
    current = _Pass()

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            same = next((group for tensor, group in current.seen if tensor is x), None)
            if name not in groups:
                candidates = min(round(ranks[name] * settings.rho), x.shape[-1])
                groups[name] = same or _Group([], candidates, Covariance(x.shape[-1], x.device))
                groups[name].layers.append(name)
                groups[name].candidates = max(groups[name].candidates, candidates)
            if same is None and not groups[name].converged:
                groups[name].covariance.update(_rows(x, current.rows, name))
            current.seen.append((x, groups[name]))

        return hook

    seen = 0
    with _observed(model, {name: observe(name) for name in ranks}):
        for batch in batches:
            current = _Pass(rows=token_mask(batch) if token_mask else None)
            forward(model, batch)
            seen += 1
            silent = [name for name in ranks if name not in groups]
            if silent:
                raise UserError(
                    f"The layer '{silent[0]}' did not run in the forward pass: leave it out of the adapter."
                )
            distinct = _distinct(groups)
            for group in distinct:
                _track(group, settings, seen)
            if all(group.converged for group in distinct) or seen >= settings.max_batches:
                break
    if not seen:
        raise UserError("EVA was given no batch of data: the dataset is empty.")
    late = [f"{group.layers[0]} ({group.similarity:.3f})" for group in distinct if not group.converged]
    if late and seen >= settings.max_batches:
        warnings.warn(
            f"EVA stopped after {seen} batches with the components of {len(late)} layers still moving (least cosine "
            f"similarity in brackets, tau={settings.tau}): {', '.join(late)}.",
            stacklevel=2,
        )
    return _share_out(groups, ranks, settings)


def _distinct(groups: Mapping[str, _Group]) -> list[_Group]:
    """Each group once, in the order of the layers."""
    return list({id(group): group for group in groups.values()}.values())


def _track(group: _Group, settings: EvaSettings, seen: int) -> None:
    """Follow the group's components from batch to batch, to know when they have converged."""
    if group.converged:
        return
    moments = group.covariance.moments(settings.center)
    if not torch.isfinite(moments).all():
        raise UserError(
            f"The inputs of layer '{group.layers[0]}' are NaN or infinite: look for extreme values in the dataset."
        )
    group.batches = seen
    if group.components is None:
        group.components, _ = leading_components(moments, group.candidates)
        return
    before, group.components = group.components, refine_components(moments, group.components)
    group.similarity = float((before * group.components).sum(1).abs().min())
    group.converged = group.similarity >= settings.tau


def _share_out(groups: Mapping[str, _Group], ranks: Mapping[str, int], settings: EvaSettings) -> dict[str, LayerResult]:
    exact = {}
    for group in _distinct(groups):
        moments = group.covariance.moments(settings.center)
        components, values = leading_components(moments, group.candidates)
        worth = explained(values, group.covariance.count, float(moments.trace()), settings.ranking)
        exact[id(group)] = components, worth
    limits = {name: min(round(rank * settings.rho), groups[name].candidates) for name, rank in ranks.items()}
    worths = {name: exact[id(groups[name])][1][: limits[name]] for name in ranks}
    given = redistribute(worths, sum(ranks.values()))
    return {
        name: LayerResult(
            components=exact[id(groups[name])][0][: given[name]].float(),
            explained=worths[name].float(),
            batches=groups[name].batches,
        )
        for name in ranks
    }


def _rows(x: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """The counted rows (n, d) of a layer's input (..., d)."""
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    if x.shape[:-1] != mask.shape:
        raise UserError(
            f"The layer '{name}' reads inputs of shape {tuple(x.shape)}, but the token mask has shape {tuple(mask.shape)}."
        )
    return x[mask]


def _input_width(module: nn.Module, name: str) -> int:
    width = getattr(module, "in_features", None)
    if width is None:
        raise UserError(
            f"EVA adapts linear layers; '{name}' is a {type(module).__name__}: leave it out of the adapter."
        )
    return width


@contextmanager
def _observed(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    """The model in evaluation mode with pre-hooks on these layers; afterwards it is as it was."""
    training = {module: module.training for module in model.modules()}
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
