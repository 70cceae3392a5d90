"""Explained Variance Adaptation (EVA, arXiv 2410.07170): activations of the new task -> LoRA's A matrices.

For each adapted weight W (k x d) with inputs X (n x d), X - mean(X) = U S V^T.

- A becomes the first r rows of V^T, the subspace that captures most variance (theorem 3.1).
- r follows explained variance, with the sum over all layers fixed (Eq. 6).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eva_rl.adapter.eva.covariance import Covariance
from eva_rl.adapter.eva.directions import choose_rows
from eva_rl.adapter.eva.kinds import Reader, first_argument, readers_of
from eva_rl.adapter.eva.moments import Moments
from eva_rl.adapter.eva.observe import (
    Group,
    Room,
    Rows,
    Seen,
    as_it_was,
    discover,
    gradient_weights,
    masked_rows,
    observe,
)
from eva_rl.adapter.eva.peers import Peers
from eva_rl.adapter.eva.ranks import explained, redistribute
from eva_rl.adapter.eva.settings import EvaSettings
from eva_rl.adapter.eva.streaming import OVERSAMPLING, StreamingSvd
from eva_rl.adapter.eva.tokens import call, shapes
from eva_rl.errors import UserError

PATIENCE = 8
"""Batches for which EVA waits for layers that none has reached yet."""


@dataclass(frozen=True)
class LayerResult:
    """What EVA found for one layer."""

    components: Tensor  #: (rank, d) float32: A's rows, orthonormal unless the settings say otherwise
    explained: Tensor  #: (candidates,) what each candidate component is worth, as ranked
    squared_singular_values: Tensor  #: (candidates,) S^2 of the rows seen, about their mean if centred
    total: float
    """The sum of all S^2, candidates or not."""
    rows: float
    """How many rows were seen, or the sum of their weights where they have weights."""
    batches: int
    """Batches taken in, by this process."""
    converged_after: int | None
    """Batches until the components had converged, at the rank the layer has, or None if they had not."""
    captured: float
    """How much variance this process's components are expected to capture, as a share of what the best would, see
    `EvaSettings`. This is claimed of rows like those seen, and not of what no batch has shown."""
    angle: float
    """The largest principal angle, in degrees, between the layer's subspace and that of a batch before, in this process."""
    group: str
    """The first of the layers that read the same tensor."""
    mean: Tensor  #: (d,) float32: of the rows seen; zero if not centred

    def facts(self) -> dict[str, Any]:
        """What a reader of `eva.json` wants to know, as plain numbers.

        The spectrum is in shares of the total variance.
        """
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
    captured: Tensor  #: (candidates,) as in `Change`
    cosines: Tensor  #: (candidates,)
    seen: bool = False
    """Whether any batch of any process has reached it."""
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


class Budget:
    """What the layers' ranks may cost together."""

    def __init__(self, ranks: Mapping[str, int], readers: Mapping[str, Reader], settings: EvaSettings):
        by_weights = settings.budget == "weights"
        self.ranks = ranks
        self.costs = {name: r.width + r.outputs if by_weights else 1 for name, r in readers.items()}
        self.limits = {
            name: min(round(ranks[name] * settings.rho), r.width) if r.redistributed else ranks[name]
            for name, r in readers.items()
        }
        self.fixed = {name for name, r in readers.items() if not r.redistributed}

    def spent(self, streams: Sequence[_Stream], worths: Sequence[Tensor]) -> dict[str, int]:
        """Each layer's rank, given what its stream's components are worth. Layers that were never seen take no part."""
        worth = {name: w for s, w in zip(streams, worths, strict=True) for name in s.group.layers if s.seen}
        shared = {name: worth[name][:limit] for name, limit in self.limits.items() if name in worth.keys() - self.fixed}
        total = sum(self.ranks[name] * self.costs[name] for name in shared)
        kept = {name: self.ranks[name] for name in worth.keys() & self.fixed}
        return kept | redistribute(shared, total, self.costs) if shared else kept


@dataclass(frozen=True)
class Reading:
    """How a batch goes through the model, and which of its rows count."""

    forward: Callable[[nn.Module, Any], Any] = call
    """Runs the model on a batch. It should send those rows through each layer that training will send through it."""
    token_mask: Callable[[Any], Tensor | Sequence[Tensor]] | None = None
    """For a batch, a boolean tensor of the shape of the layers' inputs without the last dimension: only rows where it is True
    count. Several tensors: a layer's is the one of its inputs' shape. None: all rows count."""
    rows: Callable[[Any, Room], Rows] | None = None
    """Chooses a batch's rows in another way than by a mask, see `Rows`."""
    share: bool = True
    """False: `rows` treats layers that read the same tensor differently."""
    loss: Callable[[Any], Tensor] | None = None
    """The loss of a batch, for `weighting="gradient"`."""

    def chosen(self, batch: Any, room: Room) -> Rows:
        """Chooses the rows of this batch that count."""
        if self.rows is not None:
            return self.rows(batch, room)
        return masked_rows(None if self.token_mask is None else self.token_mask(batch), room)


@torch.no_grad()
def eva_init(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Mapping[str, int],
    settings: EvaSettings,
    reading: Reading = Reading(),
    *,
    together: bool = True,
    progress: bool = False,
    strict: bool = False,
) -> dict[str, LayerResult]:
    """Run batches through `model` until every layer's components have converged, and share out the ranks.

    Where `torch.distributed` is initialised, every process calls this with batches of its own, and with the same ranks
    and settings. Each gets the result for the rows of all. An error in one is raised in all.

    Args:
        model: any module. It runs in evaluation mode and is left as it was, even when something raises an error.
        batches: consumed one by one, no more than `settings.max_batches`.
        ranks: the nominal rank for each layer's name in `model.named_modules()`. Together the ranks are the budget.
            Layers may be linear layers, GPT-2's Conv1D, convolutions, or `nn.MultiheadAttention` with its `out_proj`.
            They may run any number of times in a batch.
        reading: how batches go through the model, and which of their rows count.
        together: False: leave other processes out of it.
        progress: show a progress bar.
        strict: raise an error rather than warn if a layer can have no directions.

    Returns:
        For each layer A's rows, as many as the rank it was given, possibly 0. A layer of a kind that EVA has no directions
        for, or that no batch reached, is not among them, and a warning names it.

    Raises:
        UserError: if there are no batches, a layer is narrower than its rank, or its activations are not finite.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    peers = Peers(device, together)
    peers.check_alike("ranks or settings", (sorted(ranks.items()), settings))
    readers = peers.attempt(lambda: _checked_readers(model, ranks, settings, reading.loss, strict))
    run = _Run(model, readers, ranks, settings, peers, reading)
    needed: Sequence[_Stream] = ()  # as of the last update waited for, so that no result depends on timing
    taken, bar = 0, tqdm(total=settings.max_batches, desc="EVA", unit="batch", leave=False, disable=not progress)
    with as_it_was(model), bar, _Updates(device) as updates:
        for batch in _limited(batches, settings.max_batches, peers, updates, run.sharded):
            take = partial(run.take, needed, updates.thread is None)
            update = _nothing if batch is _ENDED else _deferring_errors(take, batch, peers)
            updates.wait()
            needed = run.needed(taken)
            if taken and not needed:
                break
            updates.start(partial(run.step, update))
            taken += 1
            bar.update()
            if updates.thread is None or taken == 1:
                updates.wait()
                needed = run.needed(taken)
                if not needed:
                    break
            bar.set_postfix_str(run.progress(), refresh=False)
    if not taken:
        raise UserError("EVA was given no batch of data: the dataset is empty.")
    run.check_rows(taken, strict)
    results = _share_out(run.streams, run.budget, readers, settings, peers)
    _warn(run.streams, settings, taken)
    return results


def _checked_readers(
    model: nn.Module, ranks: Mapping[str, int], settings: EvaSettings, loss: Any, strict: bool
) -> dict[str, Reader]:
    """How to read the layers that can be read, with a warning that names the others."""
    if settings.weighting == "gradient" and loss is None:
        raise UserError("weighting=gradient needs the loss of a batch: give `loss`.")
    readers, refused = readers_of(model, ranks)
    if refused and (strict or not readers):
        raise UserError(next(iter(refused.values())))
    if refused:
        warnings.warn(f"{LEFT}: {_listed(list(refused))}. {next(iter(refused.values()))}", stacklevel=6)
    for name, rank in ranks.items():
        if name in readers and not 1 <= rank <= readers[name].width:
            raise UserError(
                f"Rank {rank} was asked for layer '{name}', whose inputs have {readers[name].width} dimensions."
            )
    other = [name for name, r in readers.items() if r.read is not first_argument]
    if settings.weighting == "gradient" and other:
        raise UserError(f"weighting=gradient is for linear layers; '{other[0]}' is none: leave it out of the adapter.")
    return readers


LEFT = "Some layers keep their usual initialisation, as EVA has no directions for them"


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class _Run:
    """What `eva_init` is given, and what it knows while batches go by."""

    model: nn.Module
    readers: Mapping[str, Reader]
    ranks: Mapping[str, int]
    settings: EvaSettings
    peers: Peers
    reading: Reading
    streams: list[_Stream] = field(default_factory=list)
    steady: dict[str, bool] = field(default_factory=dict)
    """For each layer: did it run exactly once in every pass that was seen to its end?"""
    whole: set[Any] = field(default_factory=set)
    """The shapes of the batches of those passes."""
    ran: bool = False

    def __post_init__(self) -> None:
        self.budget = Budget(self.ranks, self.readers, self.settings)
        self.sharded = _is_sharded(self.model)

    def take(self, active: Sequence[_Stream], alone: bool, batch: Any) -> Callable[[], Any]:
        """Run the model on a batch for these streams, and return what there is to do with its activations.

        `alone`: no update is still reading the rows of the last batch.
        """
        run = partial(self.reading.forward, self.model, batch)
        room = _room(active, self.settings) if alone else _no_room
        chosen = self.reading.chosen(batch, room)
        weighted = self.settings.weighting == "gradient"
        groups, weights, shape = [stream.group for stream in active], None, shapes(batch)
        first = not self.steady
        if first:
            groups, seen = discover(self.model, self.readers, run, chosen, self.reading.share and not weighted)
        elif not weighted:
            cut = not self.sharded and shape in self.whole and all(self.steady[group.layers[0]] for group in groups)
            seen = observe(self.model, groups, self.readers, run, chosen, cut)
        if weighted:
            assert self.reading.loss is not None  # `_checked_readers` has looked
            seen, weights = gradient_weights(
                self.model, groups, self.readers, partial(self.reading.loss, batch), chosen
            )
        self.whole.add(shape)
        self.ran |= any(s.calls for s in seen.values())
        self.steady |= {name: self.steady.get(name, True) and s.calls == 1 for name, s in seen.items()}
        return (lambda: (groups, seen, weights)) if first else partial(_update, active, seen, weights)

    def step(self, update: Callable[[], Any]) -> None:
        """Do the update, then see how far the components have come."""
        found = self.peers.attempt(update)
        if not self.streams:
            groups, seen, weights = found
            groups = _agreed(groups, seen, self.readers, self.peers)
            self.streams = _make_streams(groups, seen, self.readers, self.budget, self.settings, self.model)
            self.peers.attempt(partial(_update, self.streams, seen, weights))
        _judge(self.streams, self.budget, self.settings, self.peers)

    def needed(self, taken: int) -> Sequence[_Stream]:
        """The streams up to the last one, in the order of the forward pass, that has not converged.

        Those before it take the batch in even where they have converged: its forward pass is run for the last one anyway.
        """
        waiting = taken < min(PATIENCE, self.settings.max_batches)
        moving = [not s.converged if s.seen else waiting for s in self.streams]
        last = max((i for i, moves in enumerate(moving) if moves), default=-1)
        return self.streams[: last + 1]

    def progress(self) -> str:
        """For the bar."""
        return f"{sum(s.converged for s in self.streams)}/{len(self.streams)} inputs converged"

    def check_rows(self, taken: int, strict: bool) -> None:
        """Tell of layers without rows.

        Raises:
            UserError: if these are all the layers, or with `strict`.
        """
        silent = [name for s in self.streams if not s.seen for name in s.group.layers]
        if silent and len(silent) == len(self.readers):
            if self.ran:
                raise UserError("EVA was given no rows: the mask leaves out every token of every batch.")
            raise UserError(f"The layer '{silent[0]}' did not run in the forward pass: leave it out of the adapter.")
        if silent and strict:
            raise UserError(
                f"The layer '{silent[0]}' did not run in {taken} batches: leave it out of the adapter, or give EVA more."
            )
        if silent:
            warnings.warn(f"{LEFT}: {_listed(silent)} did not run in {taken} batches.", stacklevel=4)


def _is_sharded(model: nn.Module) -> bool:
    """Whether this process holds parts of weights (FSDP2, tensor parallelism, DeepSpeed's ZeRO-3), so that all processes have to
    run each forward pass, to its end."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def _agreed(
    groups: Sequence[Group], seen: Mapping[str, Seen], readers: Mapping[str, Reader], peers: Peers
) -> Sequence[Group]:
    """The groups that hold in all processes, in one order: data may lead them through other layers."""
    if peers.count == 1:
        return groups
    number = {name: i if seen[name].calls else -1 for i, g in enumerate(groups) for name in g.layers}
    mine = torch.tensor([number[name] for name in readers], device=peers.device)
    numbers = peers.gather(mine).T.tolist()  # for each layer its group's number in each process
    members: dict[tuple[Any, ...], list[str]] = {}
    for name, key in zip(readers, numbers, strict=True):
        members.setdefault(tuple(key) if max(key) >= 0 else (name,), []).append(name)

    def position(key: tuple[Any, ...]) -> float:
        ran = [number for number in key if isinstance(number, int) and number >= 0]
        return sum(ran) / len(ran) if ran else len(readers)

    return [Group(tuple(members[key])) for key in sorted(members, key=position)]


def _make_streams(
    groups: Sequence[Group],
    seen: Mapping[str, Seen],
    readers: Mapping[str, Reader],
    budget: Budget,
    settings: EvaSettings,
    model: nn.Module,
) -> list[_Stream]:
    """A stream for each group, where those of equal shape share one stack of statistics."""
    method = {"streaming": StreamingSvd, "covariance": Covariance}[settings.method]
    stacks = defaultdict(list)
    for number, group in enumerate(groups):
        name = group.layers[0]
        rows, width = seen[name].rows, readers[name].width
        like = rows if seen[name].calls else _weight_of(model, readers[name], rows)
        candidates = max(budget.limits[name] for name in group.layers)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32  # alike in all processes, seen or not
        stacks[width, candidates, dtype, like.device].append((number, group))
    streams: list[tuple[int, _Stream]] = []
    for (width, candidates, dtype, device), members in stacks.items():
        k = min(candidates + OVERSAMPLING, width)
        moments = method(len(members), width, k, settings.center, dtype, device, settings.seed)
        zeros = torch.zeros(candidates, dtype=torch.float64)
        streams += [(n, _Stream(group, moments, i, zeros, zeros)) for i, (n, group) in enumerate(members)]
    return [stream for _, stream in sorted(streams, key=lambda pair: pair[0])]


def _weight_of(model: nn.Module, reader: Reader, otherwise: Tensor) -> Tensor:
    """Some parameter of a layer: its rows will be of this kind, and on this device."""
    parameters = model.get_submodule(reader.module).parameters()
    return next((p for p in parameters if p.is_floating_point() and p.device.type != "meta"), otherwise)


def _update(streams: Sequence[_Stream], seen: Mapping[str, Seen], weights: Mapping[str, Tensor] | None) -> None:
    """Take the rows of one batch into the statistics, all of equal shape in one call."""
    buckets = defaultdict(list)
    for stream in streams:
        stream.batches += 1
        rows = seen[stream.group.layers[0]].rows
        if len(rows):
            buckets[id(stream.moments), len(rows)].append((stream, rows))
    for members in buckets.values():
        moments = members[0][0].moments
        stacked = moments.stack([rows for _, rows in members])  # (A, n, d)
        if weights is None:
            stacked_weights = None
        else:
            stacked_weights = torch.stack([weights[stream.group.layers[0]] for stream, _ in members]).to(moments.dtype)
        indices = torch.tensor([stream.index for stream, _ in members], device=stacked.device)
        change = moments.update(indices, stacked, stacked_weights)
        finite, captured, cosines = change.finite.tolist(), change.captured.cpu(), change.cosines.cpu()
        for i, (stream, _) in enumerate(members):
            if not finite[i]:
                raise UserError(
                    f"The inputs of layer '{stream.group.layers[0]}' are NaN or infinite, or too large to be squared: look "
                    "for extreme values in the dataset."
                )
            stream.seen = True
            stream.captured, stream.cosines = captured[i, : stream.candidates], cosines[i, : stream.candidates]


def _judge(streams: Sequence[_Stream], budget: Budget, settings: EvaSettings, peers: Peers) -> None:
    """Decide which streams have converged, at the ranks their layers would be given now."""
    subspace = settings.convergence == "subspace"
    measures = [(stream.captured if subspace else stream.cosines).double() for stream in streams]
    worths = _worths(streams, settings.ranking)
    for stream, seen in zip(streams, peers.any(torch.tensor([s.seen for s in streams])).tolist(), strict=True):
        stream.seen = seen
    if peers.count > 1:
        means = peers.mean(torch.cat([*measures, *worths])).cpu()
        means = means.split([stream.candidates for stream in streams] * 2)
        measures, worths = means[: len(streams)], means[len(streams) :]
        if subspace:  # the loss left shrinks with the number of rows, and all rows are merged
            shared = [1 - (1 - measure) / peers.count for measure in measures]
            measures = [torch.where(m > 0, s, 0) for m, s in zip(measures, shared, strict=True)]  # 0: no estimate yet
    given = budget.spent(streams, worths)
    for stream, measure in zip(streams, measures, strict=True):
        if not stream.seen:
            continue
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


def _stacks(streams: Sequence[_Stream]) -> list[Moments]:
    """Each of the streams' stacks of statistics once, in the same order in all processes."""
    return list(dict.fromkeys(stream.moments for stream in streams))


def _worths(streams: Sequence[_Stream], ranking: str) -> list[Tensor]:
    """For each stream (candidates,): what its components are worth at present.

    A stack is read once, as a GPU is waited for each time.
    """
    read = {m: [t.cpu() for t in (m.values, m.variance, m.mass, m.constant)] for m in _stacks(streams)}
    worths = []
    for stream in streams:
        values, variance, mass, constant = (of[stream.index] for of in read[stream.moments])
        values, total = values[: stream.candidates], float(variance)
        if constant:
            values, total = torch.zeros_like(values), 0.0
        worths.append(explained(values, float(mass), total, ranking))
    return worths


def _no_room(name: str, count: int) -> None:
    """Rows are written wherever there is memory."""


def _room(streams: Sequence[_Stream], settings: EvaSettings) -> Room:
    """Where the rows of these streams would be stacked: written there at once, they need not be copied again.

    Not the second part of a layer's rows, nor rows that are not as many as the others'.
    """
    stacks = defaultdict(list)
    if settings.weighting == "none":
        for stream in streams:
            stacks[id(stream.moments)].append(stream)
    counts: dict[int, int] = {}
    place = {s.group.layers[0]: (s, i, len(stack)) for stack in stacks.values() for i, s in enumerate(stack)}

    def room(name: str, count: int) -> Tensor | None:
        stream, position, of = place.pop(name, (None, 0, 0))
        if stream is None or counts.setdefault(id(stream.moments), count) != count:
            return None
        return stream.moments.room(of, count)[position]

    return room


def _share_out(
    streams: Sequence[_Stream],
    budget: Budget,
    readers: Mapping[str, Reader],
    settings: EvaSettings,
    peers: Peers,
) -> dict[str, LayerResult]:
    angles = [stream.moments.angle(stream.index, stream.rank) for stream in streams]
    for moments in _stacks(streams):
        moments.combine(peers)
    leading = [stream.moments.leading(stream.index, stream.candidates) for stream in streams]
    for stream, (_, values) in zip(streams, leading, strict=True):
        stream.moments.values[stream.index, : stream.candidates] = values
    worths = _worths(streams, settings.ranking)
    given = budget.spent(streams, worths)
    position = {name: i for i, stream in enumerate(streams) for name in stream.group.layers}
    generator = torch.Generator().manual_seed(settings.seed)
    results = {}
    for name, limit in budget.limits.items():
        i = position[name]
        if not streams[i].seen:
            continue
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
    streams = [stream for stream in streams if stream.seen]
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
    """`take(batch)`, with any error put off where there are several processes.

    The function returned raises it when all processes can hear of it.
    """
    if peers.count == 1:
        return take(batch)
    try:
        return take(batch)
    except Exception as error:  # noqa: BLE001 (raised a little later, whatever it is)
        return partial(_raise, error)


def _raise(error: Exception) -> None:
    raise error


def _limited(batches: Iterable[Any], most: int, peers: Peers, updates: _Updates, sharded: bool) -> Iterator[Any]:
    """At most this many batches.

    Among several processes, `_ENDED` takes the place of a batch until all have run out. If the model is `sharded`, the
    batches end once one process has run out, as no process can run the model alone.
    """
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
        if not some or (sharded and some < peers.count):
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
        """Wait until the update that was started is done, and raise what it raised."""
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
