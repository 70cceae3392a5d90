"""Explained Variance Adaptation (EVA, arXiv 2410.07170): activations of the new task -> LoRA's A matrices.

for each adapted weight W (k x d) with inputs X (n x d):   X - mean(X) = U S V^T
A <- the first r rows of V^T                               (theorem 3.1: the subspace that captures most variance)
r  by explained variance, the sum over all layers fixed    (Eq. 6)
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eva_rl.adapter.eva.covariance import Covariance
from eva_rl.adapter.eva.directions import choose_rows
from eva_rl.adapter.eva.moments import Moments
from eva_rl.adapter.eva.observe import (
    Group,
    Room,
    Rows,
    as_it_was,
    discover,
    gradient_weights,
    input_width,
    masked_rows,
    observe,
    output_width,
)
from eva_rl.adapter.eva.peers import Peers
from eva_rl.adapter.eva.ranks import explained, redistribute
from eva_rl.adapter.eva.settings import EvaSettings
from eva_rl.adapter.eva.streaming import OVERSAMPLING, StreamingSvd
from eva_rl.errors import UserError


@dataclass(frozen=True)
class LayerResult:
    """What EVA found for one layer."""

    components: Tensor  # (rank, d) float32: A's rows, orthonormal unless the settings say otherwise
    explained: Tensor  # (candidates,) what each candidate component is worth, as ranked
    squared_singular_values: Tensor  # (candidates,) S^2 of the rows seen, about their mean if centred
    total: float
    """The sum of all S^2, candidates or not."""
    rows: float
    """How many rows were seen; with weights, their sum."""
    batches: int
    """Batches taken in, by this process."""
    converged_after: int | None
    """Batches until the components had converged, at the rank the layer has; None: they had not."""
    captured: float
    """The share of variance that this process's components are expected to capture of what the best would, see
    `EvaSettings`; of rows like those seen: what no batch has shown is in no claim."""
    angle: float
    """The largest principal angle, in degrees, between the layer's subspace and that of a batch before, in this process."""
    group: str
    """The first of the layers that read the same tensor."""
    mean: Tensor  # (d,) float32: of the rows seen; zero if not centred

    def facts(self) -> dict[str, Any]:
        """What a reader of `eva.json` wants to know, as plain numbers; the spectrum in shares of the total variance."""
        spectrum = self.squared_singular_values / self.total if self.total > 0 else self.squared_singular_values * 0
        return {
            "rank": len(self.components),
            "candidates": len(self.explained),
            "spectrum": spectrum.tolist(),
            "cumulative": spectrum.cumsum(0).tolist(),
            "explained": self.explained.tolist(),
            "captured": self.captured,
            "angle_degrees": self.angle,
            "batches": self.batches,
            "converged_after": self.converged_after,
            "rows": self.rows,
            "reads_the_input_of": self.group,
        }


@dataclass
class _Stream:
    """One group of layers: where its statistics are kept, and how far its components have come."""

    group: Group
    moments: Moments
    index: int
    captured: Tensor  # (candidates,) as in `Change`
    cosines: Tensor  # (candidates,)
    batches: int = 0
    rank: int = 0
    measure: float = 0.0
    converged_after: int | None = None

    @property
    def converged(self) -> bool:
        return self.converged_after is not None

    @property
    def candidates(self) -> int:
        return len(self.captured)

    def worth(self, ranking: str) -> Tensor:
        """(candidates,) what the components are worth at present."""
        moments, index = self.moments, self.index
        values, total = moments.values[index, : self.candidates], float(moments.variance[index])
        if moments.constant[index]:
            values, total = torch.zeros_like(values), 0.0
        return explained(values, float(moments.mass[index]), total, ranking).cpu()


class Budget:
    """What the layers' ranks may cost together."""

    def __init__(self, ranks: Mapping[str, int], rho: float, costs: Mapping[str, int]):
        self.costs = costs
        self.limits = {name: round(rank * rho) for name, rank in ranks.items()}
        self.total = sum(rank * costs[name] for name, rank in ranks.items())

    def spent(self, streams: Sequence[_Stream], worths: Sequence[Tensor]) -> dict[str, int]:
        """Each layer's rank, given what its stream's components are worth."""
        worth = {name: values for s, values in zip(streams, worths, strict=True) for name in s.group.layers}
        worth = {name: worth[name][:limit] for name, limit in self.limits.items()}
        return redistribute(worth, self.total, self.costs)


@torch.no_grad()
def eva_init(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Mapping[str, int],
    settings: EvaSettings,
    token_mask: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
    loss: Callable[[Any], Tensor] | None = None,
    rows: Callable[[Any], Rows] | None = None,
    share: bool = True,
    together: bool = True,
    progress: bool = False,
) -> dict[str, LayerResult]:
    """Run batches through `model` until every layer's components have converged, and share out the ranks.

    Where `torch.distributed` is initialised, every process calls this with batches of its own, the same ranks and
    settings, and gets the result for the rows of all; an error in one is raised in all.

    Args:
        model: any module; it runs in evaluation mode and is left as it was, also when something raises.
        batches: consumed one by one, no more than `settings.max_batches`. How often each layer runs in a forward pass is
            learned from the first; what it does beyond that in a later one is not seen.
        ranks: nominal rank for each layer's name in `model.named_modules()`; together they are the budget.
        token_mask: boolean tensor for a batch whose shape is that of the layers' inputs without the last dimension;
            only rows where it is True count. Several tensors: a layer's is the one of its inputs' shape. None: all do.
        forward: runs the model on a batch. The rows that count are those it sends through each layer: they should be those
            that training will send through it.
        loss: the loss of a batch, for `weighting="gradient"`.
        rows: chooses a batch's rows in another way than by a mask, see `Rows`.
        share: False: `rows` treats layers that read the same tensor differently.
        together: False: leave other processes out of it.
        progress: show a progress bar.

    Returns:
        For each layer A's rows, as many as the rank it was given, possibly 0.

    Raises:
        UserError: if there are no batches, a layer is not linear, never runs, or is narrower than its rank, or its
            activations are not finite.
    """
    if settings.weighting == "gradient" and loss is None:
        raise UserError("weighting=gradient needs the loss of a batch: give `loss`.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    peers, streams = Peers(device, together), []
    peers.check_alike("ranks or settings", (sorted(ranks.items()), settings))
    widths = peers.attempt(lambda: {name: _checked_width(model, name, rank) for name, rank in ranks.items()})
    costs = {name: widths[name] + output_width(model.get_submodule(name)) for name in ranks}
    budget = Budget(ranks, settings.rho, costs if settings.budget == "weights" else dict.fromkeys(ranks, 1))

    def take(active: Sequence[_Stream], batch: Any) -> Callable[[], None]:
        """Run the model on a batch, for these streams; return what there is to do with its activations."""
        weights = None
        run, mask = partial(forward, model, batch), None if token_mask is None else token_mask(batch)
        chosen = rows(batch) if rows else masked_rows(mask, _room(active, updates, settings))
        if not streams:
            groups, seen = discover(model, widths, run, chosen, shared=share and settings.weighting == "none")
            streams.extend(_make_streams(groups, seen, ranks, widths, settings))
            active = list(streams)
        elif settings.weighting == "none":
            seen = observe(model, [stream.group for stream in active], run, chosen)
        if settings.weighting == "gradient":
            seen, weights = gradient_weights(model, [s.group for s in active], partial(loss, batch), chosen)
        return partial(_update, active, seen, weights)

    def step(update: Callable[[], None]) -> None:
        peers.attempt(update)
        _judge(streams, budget, settings, peers)

    needed: Sequence[_Stream] = ()  # as of the last update waited for, so that no result depends on timing
    taken, bar = 0, tqdm(total=settings.max_batches, desc="EVA", unit="batch", leave=False, disable=not progress)
    with as_it_was(model), bar, _Updates(device) as updates:
        for batch in _limited(batches, settings.max_batches, peers, updates):
            update = _nothing if batch is _ENDED else _deferring_errors(partial(take, needed), batch, peers)
            updates.wait()
            needed = _needed(streams)
            if taken and not needed:
                break
            updates.start(partial(step, update))
            taken += 1
            bar.update()
            bar.set_postfix_str(f"{sum(s.converged for s in streams)}/{len(streams)} inputs converged", refresh=False)
            if updates.thread is None:
                needed = _needed(streams)
                if not needed:
                    break
    if not taken:
        raise UserError("EVA was given no batch of data: the dataset is empty.")
    if not float(peers.sum(sum(stream.moments.mass.sum() for stream in streams))):
        raise UserError("EVA was given no rows: the mask leaves out every token of every batch.")
    results = _share_out(streams, budget, settings, peers)
    _warn(streams, settings, taken)
    return results


def _checked_width(model: nn.Module, name: str, rank: int) -> int:
    width = input_width(model.get_submodule(name), name)
    if not 1 <= rank <= width:
        raise UserError(f"Rank {rank} was asked for layer '{name}', whose inputs have {width} dimensions.")
    return width


def _make_streams(
    groups: Sequence[Group],
    rows: Sequence[Tensor],
    ranks: Mapping[str, int],
    widths: Mapping[str, int],
    settings: EvaSettings,
) -> list[_Stream]:
    """A stream for each group; those of equal shape share their statistics' stack."""
    method = {"streaming": StreamingSvd, "covariance": Covariance}[settings.method]
    stacks = defaultdict(list)
    for number, (group, x) in enumerate(zip(groups, rows, strict=True)):
        width = widths[group.layers[0]]
        candidates = max(min(round(ranks[name] * settings.rho), width) for name in group.layers)
        stacks[width, candidates, x.dtype, x.device].append((number, group))
    streams: list[tuple[int, _Stream]] = []
    for (width, candidates, dtype, device), members in stacks.items():
        k = min(candidates + OVERSAMPLING, width)
        moments = method(len(members), width, k, settings.center, dtype, device, settings.seed)
        zeros = torch.zeros(candidates, dtype=torch.float64)
        streams += [(n, _Stream(group, moments, i, zeros, zeros)) for i, (n, group) in enumerate(members)]
    return [stream for _, stream in sorted(streams, key=lambda pair: pair[0])]


def _update(streams: Sequence[_Stream], rows: Sequence[Tensor], weights: Sequence[Tensor] | None) -> None:
    """Take the rows of one batch into the statistics, all of equal shape in one call."""
    buckets = defaultdict(list)
    for number, (stream, x) in enumerate(zip(streams, rows, strict=True)):
        stream.batches += 1
        if len(x):
            buckets[id(stream.moments), len(x)].append(number)
    for numbers in buckets.values():
        members = [streams[n] for n in numbers]
        moments = members[0].moments
        stacked = moments.stack([rows[n] for n in numbers])  # (A, n, d)
        stacked_weights = None if weights is None else torch.stack([weights[n] for n in numbers]).to(moments.dtype)
        indices = torch.tensor([stream.index for stream in members], device=stacked.device)
        change = moments.update(indices, stacked, stacked_weights)
        finite, captured, cosines = change.finite.tolist(), change.captured.cpu(), change.cosines.cpu()
        for i, stream in enumerate(members):
            if not finite[i]:
                raise UserError(
                    f"The inputs of layer '{stream.group.layers[0]}' are NaN or infinite, or too large to be squared: look "
                    "for extreme values in the dataset."
                )
            stream.captured, stream.cosines = captured[i, : stream.candidates], cosines[i, : stream.candidates]


def _judge(streams: Sequence[_Stream], budget: Budget, settings: EvaSettings, peers: Peers) -> None:
    """Decide which streams have converged, at the ranks their layers would be given now."""
    subspace = settings.convergence == "subspace"
    measures = [(stream.captured if subspace else stream.cosines).double() for stream in streams]
    worths = [stream.worth(settings.ranking) for stream in streams]
    if peers.count > 1:
        means = peers.mean(torch.cat([*measures, *worths])).cpu()
        means = means.split([stream.candidates for stream in streams] * 2)
        measures, worths = means[: len(streams)], means[len(streams) :]
        if subspace:  # the loss left shrinks with the number of rows, and all rows are merged
            shared = [1 - (1 - measure) / peers.count for measure in measures]
            measures = [torch.where(m > 0, s, 0) for m, s in zip(measures, shared, strict=True)]  # 0: no estimate yet
    given = budget.spent(streams, worths)
    for stream, measure in zip(streams, measures, strict=True):
        stream.rank = max(given[name] for name in stream.group.layers)
        used = measure[: stream.rank]
        if not len(used):
            stream.measure = 1.0
        else:
            stream.measure = float(used[-1] if subspace else used.min())
        if stream.measure < settings.tau:
            stream.converged_after = None
        elif not stream.converged:
            stream.converged_after = stream.batches


def _needed(streams: Sequence[_Stream]) -> Sequence[_Stream]:
    """The streams up to the last one, in the order of the forward pass, that has not converged.

    Those before it take the batch in even where they have converged: its forward pass is run for the last one anyway.
    """
    last = max((i for i, stream in enumerate(streams) if not stream.converged), default=-1)
    return streams[: last + 1]


def _room(streams: Sequence[_Stream], updates: _Updates, settings: EvaSettings) -> Room:
    """Where the rows of these streams would be stacked: written there at once, they need not be copied again.

    Not while an update may still read the last batch's, nor where a layer's rows come in several parts or are not as many as
    the others'.
    """
    stacks = defaultdict(list)
    if updates.thread is None and settings.weighting == "none":
        for stream in streams:
            stacks[id(stream.moments)].append(stream)
    counts: dict[int, int] = {}
    place = {s.group.layers[0]: (s, i, len(stack)) for stack in stacks.values() for i, s in enumerate(stack)}

    def room(name: str, count: int) -> Tensor | None:
        stream, position, of = place.get(name, (None, 0, 0))
        if stream is None or stream.group.calls > 1 or counts.setdefault(id(stream.moments), count) != count:
            return None
        return stream.moments.room(of, count)[position]

    return room


def _share_out(
    streams: Sequence[_Stream], budget: Budget, settings: EvaSettings, peers: Peers
) -> dict[str, LayerResult]:
    angles = [stream.moments.angle(stream.index, stream.rank) for stream in streams]
    for moments in {id(stream.moments): stream.moments for stream in streams}.values():
        moments.combine(peers)
    leading = [stream.moments.leading(stream.index, stream.candidates) for stream in streams]
    for stream, (_, values) in zip(streams, leading, strict=True):
        stream.moments.values[stream.index, : stream.candidates] = values
    worths = [stream.worth(settings.ranking) for stream in streams]
    given = budget.spent(streams, worths)
    position = {name: i for i, stream in enumerate(streams) for name in stream.group.layers}
    generator = torch.Generator().manual_seed(settings.seed)
    results = {}
    for name, limit in budget.limits.items():
        i = position[name]
        stream, (vectors, values) = streams[i], leading[i]
        moments, index = stream.moments, stream.index
        results[name] = LayerResult(
            components=choose_rows(moments, index, vectors[: given[name]], settings, generator),
            explained=worths[i][:limit].float(),
            squared_singular_values=values[:limit].cpu(),
            total=float(moments.variance[index]),
            rows=float(moments.mass[index]),
            batches=stream.batches,
            converged_after=stream.converged_after,
            captured=float(stream.captured[given[name] - 1]) if given[name] else 0.0,
            angle=angles[i],
            group=stream.group.layers[0],
            mean=moments.mean[index].float().cpu(),
        )
    return results


def _warn(streams: Sequence[_Stream], settings: EvaSettings, taken: int) -> None:
    late = [f"{stream.group.layers[0]} ({stream.measure:.3f})" for stream in streams if not stream.converged]
    if late and taken >= settings.max_batches:
        warnings.warn(
            f"EVA stopped after {taken} batches with {len(late)} layers still moving (in brackets their measure of "
            f"convergence, tau={settings.tau}): {', '.join(late)}.",
            stacklevel=3,
        )
    constant = [name for s in streams if s.moments.constant[s.index] for name in s.group.layers]
    if constant:
        warnings.warn(
            f"The inputs of {len(constant)} layers never change, so EVA has no direction to give them; what rank they get "
            f"starts in arbitrary ones: {', '.join(constant)}.",
            stacklevel=3,
        )


_ENDED = object()


def _nothing() -> None:
    """What a process without a batch does while others still have some."""


def _deferring_errors(take: Callable[[Any], Callable[[], None]], batch: Any, peers: Peers) -> Callable[[], None]:
    """`take(batch)`; among several processes an error is raised by what it returns, when all can hear of it."""
    if peers.count == 1:
        return take(batch)
    try:
        return take(batch)
    except Exception as error:  # noqa: BLE001 (raised a little later, whatever it is)
        return partial(_raise, error)


def _raise(error: Exception) -> None:
    raise error


def _limited(batches: Iterable[Any], most: int, peers: Peers, updates: _Updates) -> Iterator[Any]:
    """At most this many batches; among several processes, `_ENDED` in place of a batch until all have run out."""
    if peers.count == 1:
        yield from islice(batches, most)
        return
    batches = chain(batches, repeat(_ENDED))
    for number in range(most):
        updates.wait()  # its messages and these must not cross
        batch = peers.attempt(partial(next, batches))
        some = peers.how_many(batch is not _ENDED)
        if number == 0 and some < peers.count:
            raise UserError("EVA was given no batch of data in one of the processes: give each at least one.")
        if not some:
            return
        yield batch


class _Updates:
    """Runs updates one after another: on CUDA in a thread and on a stream of their own, beside the next forward pass."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1) if self._beside(device) else None
        self.pending: Future[None] | None = None

    @staticmethod
    def _beside(device: torch.device) -> bool:
        return device.type == "cuda"

    def start(self, update: Callable[[], None]) -> None:
        if self.thread is None:
            update()
            return
        ready = self.stream and torch.cuda.current_stream(self.stream.device).record_event()
        self.pending = self.thread.submit(self._run, update, ready)

    @torch.no_grad()
    def _run(self, update: Callable[[], None], ready: Any) -> None:
        with self._on_stream():
            if self.stream:
                self.stream.wait_event(ready)
            update()
            if self.stream:
                self.stream.synchronize()  # before the activations are freed

    def _on_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def wait(self) -> None:
        """Until the update that was started is done; raise what it raised."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def __enter__(self) -> _Updates:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self.thread is not None:
                self.thread.shutdown()
