"""Which adapter is for these observations.

It is the one whose task's subspace explains most of what the base makes of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from eva_rl.adapter import load_adapter
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from eva_rl.library.sketch import ROWS, Sketch, activations, load_sketch, spread
from eva_rl.model import load_notes
from eva_rl.spaces import flatten, parts_of, spaces_from_text

if TYPE_CHECKING:
    from eva_rl.batch import Batch
    from eva_rl.interface import Interface
    from eva_rl.library.index import Library
    from eva_rl.model import DecisionTransformer

DRAWS = 20
"""Runs of a task's kept observations that the threshold is found with."""
PRIOR = 4
"""Observations that what is known of a task's own spread counts for, beside those that were given."""
FEW = 3
"""Tasks that a library needs before one of them can be held out to see what other tasks' shares are like."""


@dataclass(frozen=True)
class Match:
    """How well one adapter fits."""

    name: str
    task: str
    share: float
    """How much of the activations' squared distance from the library's mean the task's mean and components explain.
    At 1 they explain all of it. Below 0 the mean of all tasks is nearer."""
    low: float
    high: float
    """The share's 95 % interval, as if the observations were independent. Those of one episode are not quite."""


@dataclass(frozen=True)
class Ranking:
    """Adapters, the best first, and from which share on one fits."""

    matches: tuple[Match, ...]
    threshold: float
    observations: int
    """How many were looked at."""

    @property
    def best(self) -> Match | None:
        """The first if it fits, or None if none does."""
        return self.matches[0] if self.matches[0].share >= self.threshold else None


@dataclass(frozen=True)
class Distances:
    """What A tasks' subspaces leave of n observations' activations in L layers."""

    errors: Tensor  #: (A, L, n) float64 squared distances to each task's affine subspace
    spread: Tensor  #: (L, n) squared distances to the mean over tasks

    def shares(self) -> Tensor:
        """(A,) of the activations explained, the mean over layers."""
        return 1 - self.losses().mean(-1)

    def losses(self) -> Tensor:
        """(A, n) each observation's part in 1 - share, whose mean it is."""
        scale = self.spread.mean(-1)[:, None].clamp(min=1e-30)  # (L, 1)
        return (self.errors / scale).mean(1)


def rank(
    library: Library,
    data: Trajectories | np.ndarray | Mapping[str, Any] | tuple,
    transitions: int | None = None,
    interface: str | None = None,
) -> Ranking:
    """Rank a library's adapters for these observations.

    Let x be what a layer of the base reads of one observation. Let m_i and V_i be the mean and the components of task
    i's sketch in that layer, and m the mean of all m_i. The share that task i explains is
    1 - sum |(I - V_i^T V_i)(x - m_i)|^2 / sum |x - m|^2, with both sums over the observations, and then the mean over
    layers. Both sums are over a set, so no order matters.

    The threshold is the one that best tells two kinds of share apart. One is what a task's subspace explains of
    observations it has not seen. The other is what the best of the other tasks' subspaces explains of them, as if that
    task were unknown.

    Raises:
        UserError: see `Library.which`.
    """
    from eva_rl.library.index import INDEX

    if transitions is not None and transitions < 1:
        raise UserError(f"transitions must be at least 1, got {transitions}.")
    sketches, observations, interface = _matching(library, data, interface)
    observations = spread(observations[:transitions], ROWS)
    model, names = library.base.transformer, list(sketches)
    layers = list(next(iter(sketches.values())).means)
    found = distances(list(sketches.values()), activations(model, interface, observations, layers))
    known = (*names, (library.folder / INDEX).stat().st_mtime_ns, len(observations))
    if known not in library.calibrations:
        kept = [activations(model, interface, sketch.observations, layers) for sketch in sketches.values()]
        library.calibrations[known] = calibrate(list(sketches.values()), kept, len(observations))
    threshold, spreads = library.calibrations[known]
    losses, entries = found.losses(), {entry.name: entry for entry in library.entries}
    matches = []
    for name, own, known in zip(names, losses, spreads, strict=True):
        half = 1.96 * _deviation(own, known) / len(own) ** 0.5
        share = 1 - float(own.mean())
        matches.append(Match(name, entries[name].task, share, share - half, share + half))
    matches.sort(key=lambda match: (-match.share, match.name))
    return Ranking(tuple(matches), threshold, len(observations))


def _deviation(losses: Tensor, known: float) -> float:
    """The standard deviation of one observation's loss.

    The losses given are pooled with what is known of the task's own spread, which counts as much as `PRIOR` of them.
    """
    n = len(losses)
    own = float(losses.var()) if n > 1 else 0.0
    return float(((n - 1) * own + PRIOR * known**2) / (n - 1 + PRIOR)) ** 0.5


def distances(sketches: Sequence[Sketch], seen: Mapping[str, Tensor]) -> Distances:
    """How far activations (n, d) of each layer lie from each task's subspace, and from the mean over tasks."""
    errors, totals = [], []
    for layer, x in seen.items():
        means = torch.stack([sketch.means[layer] for sketch in sketches]).double()  # (A, d)
        basis = torch.stack([sketch.components[layer] for sketch in sketches]).double()  # (A, k, d)
        center = means.mean(0)
        x, means = x.double() - center, means - center
        totals.append(x.square().sum(-1))  # (n,)
        to_mean = totals[-1] - 2 * means @ x.T + means.square().sum(-1)[:, None]  # (A, n)
        inside = (x @ basis.flatten(0, 1).T).view(len(x), *basis.shape[:2])  # (n, A, k)
        inside = inside - (basis @ means[..., None])[..., 0]
        errors.append((to_mean - inside.square().sum(-1).T).clamp(min=0))
    return Distances(torch.stack(errors, 1), torch.stack(totals))


def calibrate(
    sketches: Sequence[Sketch], kept: Sequence[Mapping[str, Tensor]], count: int
) -> tuple[float, list[float]]:
    """The share from which on a task fits `count` observations, and the spread of each task's losses.

    The spread is the standard deviation of one observation's loss.

    Args:
        kept: the activations of each task's observations that its sketch has not seen.
    """
    own, others, spreads = [], [], []
    for number, seen in enumerate(kept):
        found = distances(sketches, seen)
        spreads.append(float(found.losses()[number].std()) if found.errors.shape[-1] > 1 else 0.0)
        rest = [i for i in range(len(sketches)) if i != number]
        without = distances([sketches[i] for i in rest], seen) if len(sketches) >= FEW else None
        for part in _runs(found.errors.shape[-1], count):
            own.append(float(_part(found, part).shares()[number]))
            if without is not None:
                others.append(float(_part(without, part).shares().max()))
    return threshold_between(np.array(own), np.array(others)), spreads


def _runs(total: int, count: int) -> list[slice]:
    """Runs of neighbours among so many observations, evenly spread."""
    count = min(count, total)
    starts = np.unique(np.linspace(0, total - count, min(DRAWS, total - count + 1)).astype(int))
    return [slice(start, start + count) for start in starts]


def _part(found: Distances, part: slice) -> Distances:
    return Distances(found.errors[..., part], found.spread[..., part])


def threshold_between(fitting: np.ndarray, others: np.ndarray) -> float:
    """The number that best tells the two apart, an error of either kind weighing the same.

    Without others, nearly all that fit reach it.

    Args:
        fitting: (n,) shares where the task is known.
        others: (m,) shares of the best where it is not. Empty in a small library.
    """
    if not len(others):
        return float(np.quantile(fitting, 0.05))
    edges = np.unique(np.concatenate([fitting, others]))
    candidates = np.concatenate([edges[:1], (edges[:-1] + edges[1:]) / 2, edges[-1:]])
    right = [(fitting >= edge).mean() + (others < edge).mean() for edge in candidates]
    best = np.flatnonzero(np.isclose(right, max(right)))
    return float(candidates[best].mean())  # the middle of those that are equally good


def _matching(library: Library, data: Any, asked: str | None = None) -> tuple[dict[str, Sketch], Tensor, str]:
    """The sketches of adapters that read such observations, the observations, and their interface.

    The sketches come by name, and the observations flat. If an interface was asked for, it is that one.
    """
    from eva_rl.library.index import SKETCH

    entries = [entry for entry in library.entries if entry.sketch]
    if not entries:
        raise UserError(f"'{library.folder}' holds no adapter with a sketch: add one first.")
    interfaces = {entry.name: load_notes(library.folder / "adapters" / entry.name).interface.name for entry in entries}
    refusal = UserError(f"'{library.folder}' holds no adapter that acts through the interface '{asked}'.")
    for name in dict.fromkeys(interfaces.values()):
        if asked not in (None, name):
            continue
        interface = library.base.model.interfaces[name]
        try:
            observations = rows_of(data, interface)
        except UserError as error:
            refusal = error
            continue
        widths = {n: m.in_features for n, m in library.base.model.named_modules() if isinstance(m, nn.Linear)}
        own = [entry.name for entry in entries if interfaces[entry.name] == name]
        sketches = {n: load_sketch(library.folder / "adapters" / n / SKETCH, interface, widths) for n in own}
        return sketches, observations, name
    raise refusal


def rows_of(data: Trajectories | Tensor | np.ndarray | Mapping[str, Any] | tuple, interface: Interface) -> Tensor:
    """Observations as flat rows (n, obs).

    A tensor is flat already.

    Raises:
        UserError: if they are not the interface's, there are none, or they are not finite.
    """
    if isinstance(data, Trajectories):
        if parts_of(data.observation_space) != interface.parts:
            raise UserError(
                f"The observations of '{data.task}' must be {interface.in_words}, got {data.observation_space}."
            )
        return data.observations
    space = spaces_from_text(interface.spaces)[0] if interface.spaces else None
    try:
        if isinstance(data, Tensor):
            rows = data.cpu().numpy()
        elif space is not None:
            rows = flatten(space, data)
        else:
            rows = np.asarray(data, np.float32)
    except UserError as error:
        raise UserError(f"Observations must be {interface.in_words}, got {error}.") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"Observations were given that are none of {interface.in_words}.") from error
    if rows.ndim != 2 or rows.shape[1] != interface.observation_size or not len(rows):
        raise UserError(
            f"Observations must be of shape (n, {interface.observation_size}), n at least 1, got {rows.shape}."
        )
    if not np.isfinite(rows).all():
        raise UserError("Observations with NaN or infinite numbers were given: leave them out.")
    return torch.from_numpy(np.ascontiguousarray(rows))


def losses(library: Library, names: Sequence[str], batches: Sequence[Batch]) -> Tensor:
    """The loss of each of these adapters in each batch, (A, batches).

    This is the other way to choose, which needs actions and runs every adapter.

    Raises:
        UserError: if an adapter can't be loaded.
    """
    found = torch.zeros(len(names), len(batches))
    for number, name in enumerate(names):
        model = copy.deepcopy(library.base.transformer)
        folder = library.path(name)
        model.connect(load_notes(folder).interface, f"The adapter in '{folder}'")
        model = cast("DecisionTransformer", load_adapter(model, folder).eval())
        with torch.no_grad():
            found[number] = torch.stack([model.loss(batch) for batch in batches])
    return found


def nearest(library: Library, observations: Tensor) -> list[str]:
    """For each flat observation (n, obs) by itself, the name of the adapter whose task explains most of it.

    The adapter is named whether it fits or not.

    Raises:
        UserError: see `Library.which`.
    """
    sketches, rows, interface = _matching(library, observations)
    names, layers = list(sketches), list(next(iter(sketches.values())).means)
    found = distances(list(sketches.values()), activations(library.base.transformer, interface, rows, layers))
    shares = 1 - (found.errors / found.spread.clamp(min=1e-30)).mean(1)  # (A, n)
    return [names[number] for number in shares.argmax(0).tolist()]
