"""Minari dataset -> packed tensors, once, and the statistics that a model needs of them."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from eva_rl.errors import UserError, in_one_line
from eva_rl.interface import Interface, TaskStatistics
from eva_rl.prepared import leaves, loses_digits, members_of, shape_of
from eva_rl.spaces import (
    Part,
    action_choices,
    action_parts,
    action_rows,
    dtype_of,
    first_choice,
    flatten,
    nested,
    parts_of,
    spaces_to_text,
)

COPIED = 2 * 2**30
"""Bytes of observations up to which chosen episodes are copied in memory."""
SMALL_PART = 0.1
"""The share of its bounds below which the range of an action is scaled by the data.
Scaled by the bounds, too little would be left to learn from."""


@dataclass(frozen=True)
class Trajectories:
    """All episodes of one task, end to end: episode e is rows `starts[e]` to `starts[e + 1]` (excluded)."""

    task: str
    observations: Tensor  #: (N, obs) flat: float32, uint8 where bytes hold all of it, or float64 where float32 doesn't; may be mapped from disk
    actions: Tensor  #: (N, act) float32, choices among them where there are several parts; or int64 choices: (N,) of one, (N, components)
    rewards: Tensor  #: (N,) float32
    returns_to_go: Tensor  #: (N,) float32
    starts: Tensor  #: (E + 1,) int64
    observation_space: gym.Space
    action_space: gym.Space
    successes: Tensor | None = None  #: (E,) bool
    labels: Tensor | None = None  #: as actions: what a model is to predict, where that is not the action that was taken

    @property
    def lengths(self) -> Tensor:
        return self.starts.diff()  # (E,)

    @property
    def episode_returns(self) -> Tensor:
        return self.returns_to_go[self.starts[:-1]]  # (E,)

    def best(self, share: float) -> Trajectories:
        """This share of the episodes, at least one: those of the highest return, in their order.

        Of equal ones the first are taken. (%BC of Chen et al. 2021, section 5.1, but for whole episodes)
        """
        count = max(1, round(share * len(self.lengths)))
        return self._of(self.episode_returns.argsort(descending=True, stable=True)[:count].sort().values)

    def successful(self) -> Trajectories:
        """The episodes that solved the task.

        All are taken where success is unknown. Where none succeeded, all are taken too, with a warning.

        A clone of failures fails: what is learned from them contradicts the rest. (Filtered cloning)
        """
        if self.successes is None or bool(self.successes.all()):
            return self
        if not self.successes.any():
            warnings.warn(f"No demonstration of '{self.task}' solved the task: all are learned from.", stacklevel=2)
            return self
        return self._of(self.successes.nonzero().flatten())

    def chosen(self, filter: str) -> Trajectories:
        """The episodes that a run learns from: `successful` ones, `all`, or the `best` of a share such as `0.1`."""
        if filter == "successful":
            return self.successful()
        return self if filter == "all" else self.best(float(filter))

    def _of(self, kept: Tensor) -> Trajectories:
        """These episodes, by their numbers in rising order, (m,)."""
        if len(kept) == len(self.lengths):
            return self
        rows = torch.cat([torch.arange(int(self.starts[e]), int(self.starts[e + 1])) for e in kept.tolist()])
        names = ("observations", "actions", "rewards", "returns_to_go", "labels")
        columns = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{name: column if column is None else _taken(column, rows) for name, column in columns.items()},
            starts=torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths[kept].cumsum(0)]),
            successes=None if self.successes is None else self.successes[kept],
        )

    def statistics(self) -> TaskStatistics:
        return TaskStatistics(
            episodes=len(self.lengths),
            return_max=float(self.episode_returns.max()),
            return_mean=float(self.episode_returns.mean()),
            success_rate=None if self.successes is None else float(self.successes.float().mean()),
            return_typical=self._typical_return(),
            return_deciles=tuple(
                torch.quantile(self.episode_returns.double(), torch.linspace(0, 1, 11).double()).tolist()
            ),
        )

    def _typical_return(self) -> float | None:
        """The median return of the successful episodes, or of all where success is unknown.

        None where none succeeded.
        """
        returns = self.episode_returns if self.successes is None else self.episode_returns[self.successes]
        return float(returns.median()) if len(returns) else None


def _taken(column: Tensor, rows: Tensor) -> Tensor:
    """A copy of these rows.

    A copy of more than `COPIED` bytes lies in a file without a name, and is mapped from there.
    """
    shape, kind = (len(rows), *column.shape[1:]), column[:0].numpy().dtype
    if math.prod(shape) * kind.itemsize <= COPIED:
        return column[rows]
    with tempfile.TemporaryFile() as file:
        try:
            for some in rows.split(2**14):
                column[some].numpy().tofile(file)  # not into a map, where a full disk would end the process
            file.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise UserError(
                f"The chosen demonstrations can't be kept in {where} ({in_one_line(error)}): set TMPDIR."
            ) from error
        return torch.from_numpy(np.memmap(file, kind, mode="c", shape=shape))


def returns_to_go(rewards: np.ndarray) -> np.ndarray:
    """Undiscounted sums of the rewards (T,) from each step to the end, summed in float64. (Chen et al. 2021, eq. 2)"""
    return np.cumsum(rewards[::-1].astype(np.float64))[::-1].astype(np.float32)


def pack(
    task: str, episodes: Iterable[Mapping[str, Any]], observation_space: gym.Space, action_space: gym.Space
) -> Trajectories:
    """Join episodes, each of observations (T or T + 1, ...), actions (T, ...), rewards (T,) and success or None.

    Observations are flattened (see `eva_rl.spaces`). One after the last action is dropped: nothing was done there.

    Raises:
        UserError: if an episode is empty, of other shapes, or holds NaN or infinite numbers. The error names it.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for episode in checked(task, episodes, observation_space, action_space):
        for name, values in episode.items():
            columns.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items() if name != "success"}
    return joined_up(task, joined, columns, observation_space, action_space)


def joined_up(
    task: str,
    joined: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[np.ndarray]],
    observation_space: gym.Space,
    action_space: gym.Space,
) -> Trajectories:
    """The trajectories whose columns were joined.

    Only the lengths and successes of the episodes are read from `columns`.
    """
    return Trajectories(
        task=task,
        **{name: torch.from_numpy(values) for name, values in joined.items()},
        starts=torch.from_numpy(np.cumsum([0, *map(len, columns["rewards"])])),
        observation_space=observation_space,
        action_space=action_space,
        successes=_solved(columns["success"]),
    )


def _solved(told: Sequence[np.ndarray | None]) -> Tensor | None:
    """Which episodes were solved, (E,) bool, or None where none of them says.

    Some environments mention success only where there is one.
    """
    if all(episode is None for episode in told):
        return None
    return torch.tensor([episode is not None and bool((episode > 0).any()) for episode in told])


def checked(
    task: str, episodes: Iterable[Mapping[str, Any]], observation_space: gym.Space, action_space: gym.Space
) -> Iterator[dict[str, Any]]:
    """The columns of each episode as they are kept: observations (T, obs), actions, rewards, returns_to_go, success.

    Raises:
        UserError: see `pack`.
    """
    number, labelled, lost = -1, None, set()
    for number, episode in enumerate(episodes):
        columns = _columns(f"Episode {number} of the dataset of '{task}'", episode, observation_space, action_space)
        lost |= set(_lost_digits(observation_space, episode["observations"]))
        if number == 0:
            labelled = "labels" in columns
        if labelled != ("labels" in columns):
            raise UserError(
                f"Some episodes of the dataset of '{task}' say what the expert meant and others don't: collect it again."
            )
        yield columns
    if number < 0:
        raise UserError(f"The dataset of '{task}' holds no episode: collect or download it again.")
    if lost:
        warnings.warn(
            f"The observations of '{task}' hold numbers (number {', '.join(map(str, sorted(lost)[:5]))} of the flat observation) whose "
            "differences float32 can't hold at their size, so that they tell a model nothing: subtract their first value, or leave them "
            "out.",
            stacklevel=2,
        )


def _columns(
    name: str, episode: Mapping[str, Any], observation_space: gym.Space, action_space: gym.Space
) -> dict[str, Any]:
    """One episode's columns (see `checked`), where `name` is what a `UserError` calls it."""
    rewards, actions = np.asarray(episode["rewards"], np.float32), episode["actions"]
    if rewards.ndim == 2 and rewards.shape[1] == 1:  # arrays of one, as some environments return them
        rewards = rewards[:, 0]
    _check_sizes(name, episode["observations"], actions, rewards, observation_space, action_space)
    _check_choices(name, actions, action_space)
    try:
        observations = flatten(observation_space, episode["observations"])[: len(rewards)]
    except UserError as error:
        raise UserError(f"{name}: {error}.") from error
    actions = _as_kept(actions, action_space)
    if not all(np.isfinite(values).all() for values in (observations, rewards, actions)):
        raise UserError(f"{name} holds NaN or infinite numbers: remove it.")
    columns = {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "returns_to_go": returns_to_go(rewards),
        "success": None if episode.get("success") is None else np.asarray(episode["success"]),
    }
    if episode.get("labels") is not None:
        columns["labels"] = _checked_labels(name, _as_kept(episode["labels"], action_space), actions)
    return columns


def _check_sizes(
    name: str,
    observations: Any,
    actions: Any,
    rewards: np.ndarray,
    observation_space: gym.Space,
    action_space: gym.Space,
) -> None:
    """Raise a `UserError` unless these are of one length, one observation more at most, and of the spaces' shapes."""
    length, seen = len(rewards), _lengths(observation_space, observations)
    if length == 0:
        raise UserError(f"{name} is empty: remove it.")
    done = _lengths(action_space, actions)
    if done != {length} or len(seen) > 1 or not seen <= {length, length + 1}:
        raise UserError(
            f"{name} has {length} rewards, {' or '.join(map(str, sorted(done)))} actions and {' or '.join(map(str, sorted(seen)))} observations, where as many "
            "were expected, or one observation more."
        )
    shapes = _shapes(observation_space, observations), _shapes(action_space, actions), rewards.shape[1:]
    expected = _expected(observation_space), _expected(action_space), ()
    if shapes != expected:
        raise UserError(
            f"{name} has observations, actions and rewards of the shapes {shapes}, where the dataset's spaces ask for {expected}."
        )


def _check_choices(name: str, actions: Any, space: gym.Space) -> None:
    """Raise a `UserError` unless all choices among the actions (T, ...) are those there are."""
    for member, values in leaves(space, actions):
        if not isinstance(member, gym.spaces.Box) and not all(map(member.contains, np.unique(values, axis=0))):
            raise UserError(f"{name} has actions outside {member}.")


def _checked_labels(name: str, labels: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The expert's own actions, if there is a finite one for each action taken."""
    if labels.shape != actions.shape or not np.isfinite(labels).all():
        raise UserError(
            f"{name} has {len(labels)} actions of the expert, where one finite action for each of its {len(actions)} steps was "
            "expected: collect it again."
        )
    return labels


def _lost_digits(space: gym.Space, observations: Any) -> Iterator[int]:
    """The numbers of the flat observation that differ by less than float32 tells apart at their size.

    Seconds since 1970 are an example.
    """
    first = 0
    for member, values in leaves(space, observations):
        yield from (first + int(at) for at in np.flatnonzero(loses_digits(member, values)))
        first += sum(part.size for part in parts_of(member))


def _as_kept(actions: Any, space: gym.Space) -> np.ndarray:
    """Actions (T, ...) as choices counted from 0, as flat float32, or, if they have several parts, as rows of both."""
    if action_choices(space):
        return np.asarray(actions).astype(np.int64) - first_choice(space)
    return action_rows(space, actions).astype(np.float32)


def _members(space: gym.spaces.Dict | gym.spaces.Tuple) -> list[tuple[Any, gym.Space]]:
    """The keys and spaces of a Dict or Tuple."""
    return list(space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space))


def _lengths(space: gym.Space, observations: Any) -> set[int]:
    if nested(space):
        return {n for key, member in _members(space) for n in _lengths(member, observations[key])}
    return {len(observations)}


def _shapes(space: gym.Space, observations: Any) -> Any:
    if nested(space):
        return {key: _shapes(member, observations[key]) for key, member in _members(space)}
    return np.shape(observations)[1:]


def _expected(space: gym.Space) -> Any:
    if nested(space):
        return {key: _expected(member) for key, member in _members(space)}
    return tuple(space.shape or ())  # a text has none


def interface_of(name: str, trajectories: Sequence[Trajectories], std_floor: float = 0.01) -> Interface:
    """The interface of training trajectories that share their spaces, every task weighing the same.

    No observation dimension's standard deviation is taken to be less than `std_floor` times the median over the
    dimensions that move at all. Without a floor, a dimension that rests during pretraining would be divided by nearly
    zero. In a target task where it moves, it would then drown every other input. So a base for unseen tasks wants a
    high floor (pretraining takes 1.5). A single task's own statistics need one only against division by zero.

    Actions of a bounded space are scaled to [-1, 1] by its bounds, and others by their mean and standard deviation.
    Actions that use less than a tenth of their bounds are also scaled by mean and standard deviation, with a warning.

    Raises:
        UserError: if the trajectories' spaces differ, or the floor is not above 0.
    """
    if not std_floor > 0:
        raise UserError(f"std_floor must be a number above 0, got {std_floor}.")
    first = trajectories[0]
    parts, space = parts_of(first.observation_space), first.action_space
    choices, acts = action_choices(space), action_parts(space)
    for other in trajectories[1:]:
        if parts_of(other.observation_space) != parts or other.action_space != first.action_space:
            raise UserError(
                f"The tasks '{first.task}' and '{other.task}' differ in their spaces "
                f"({first.observation_space}, {first.action_space} and {other.observation_space}, "
                f"{other.action_space}): give them interfaces of their own, or train them apart."
            )
    shown = next((t for t in trajectories if t.observations.dtype == torch.float64), first).observation_space
    parts = parts_of(shown)
    mean, std = _moments(trajectories, parts)
    moving = std[std > (1e-6 if dtype_of(parts) != "float64" else 1e-15) * (1 + mean.abs())]
    std = std.clamp(min=std_floor * float(moving.median()) if len(moving) else 1.0)
    action_mean, action_scale = ((), ()) if choices else _action_scales(trajectories)
    kind = "parts" if acts else "continuous"
    return Interface(
        name=name,
        observation_size=first.observations.shape[1],
        action_kind=("discrete" if first.actions.ndim == 1 else "multi_discrete") if choices else kind,
        action_size=sum(part.outputs for part in acts) or sum(choices) or first.actions.shape[1],
        observation_mean=tuple(mean.tolist()),
        observation_std=tuple(std.tolist()),
        action_mean=action_mean,
        action_scale=action_scale,
        return_scale=max(float(t.returns_to_go.abs().max()) for t in trajectories) or 1.0,
        reward_scale=max(float(t.rewards.abs().max()) for t in trajectories) or 1.0,
        parts=parts,
        choices=choices,
        spaces=spaces_to_text(shown, first.action_space),
        action_parts=acts,
    )


def _moments(trajectories: Sequence[Trajectories], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the vectors' dimensions, (vectors,) each, every task weighing the same."""
    ends = np.cumsum([part.size for part in parts])
    columns = [slice(end - p.size, end) for p, end in zip(parts, ends, strict=True) if p.kind == "vector"]
    if not columns:
        return torch.zeros(0), torch.zeros(0)
    means, squares = [], []
    first = torch.cat([trajectories[0].observations[:1, at] for at in columns], 1).double()
    origin = (
        first if any(part.wide for part in parts) else torch.zeros_like(first)
    )  # squares of large numbers lose digits
    for own in trajectories:
        total = torch.zeros(2, sum(at.stop - at.start for at in columns), dtype=torch.float64)
        for rows in own.observations.split(2**16):  # they may be mapped from disk
            vectors = torch.cat([rows[:, at] for at in columns], 1).double() - origin  # (n, vectors)
            total += torch.stack([vectors.sum(0), vectors.square().sum(0)])
        means.append(total[0] / len(own.observations))
        squares.append(total[1] / len(own.observations))
    mean = torch.stack(means).mean(0)
    return mean + origin[0], (torch.stack(squares).mean(0) - mean.square()).clamp(min=0).sqrt()


def _action_scales(trajectories: Sequence[Trajectories]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Centre and half-width of the range of each number in an action's row, which are 0 and 1 for choices."""
    actions = torch.cat([t.actions for t in trajectories]).double()
    members = members_of(trajectories[0].action_space)
    columns = actions.split([math.prod(shape_of(member)) for member in members], 1)
    mean, scale = [], []
    for member, own in zip(members, columns, strict=True):
        real = isinstance(member, gym.spaces.Box)
        found = (
            _action_range(trajectories[0].task, member, own)
            if real
            else (np.zeros(own.shape[1]), np.ones(own.shape[1]))
        )
        mean, scale = mean + found[0].tolist(), scale + found[1].tolist()
    return tuple(mean), tuple(scale)


def _action_range(task: str, space: gym.spaces.Box, actions: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half-width of the range of actions (N, act), from the space if it is bounded, else from the data."""
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    bounded = np.isfinite(low) & np.isfinite(high) & (high > low)
    used = (actions.max(0).values - actions.min(0).values).numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        width = high - low
        small = bounded & (used < SMALL_PART * width) & ((used > 0) | (width > 20))
    if small.any():
        at = int(np.argmax(small))
        warnings.warn(
            f"The actions of '{task}' use a small part of their bounds (number {at}: {used[at]:.3g} of {width[at]:.3g}): "
            "where they do, they are scaled by their mean and standard deviation.",
            stacklevel=2,
        )
    bounded &= ~small
    low, high = np.where(bounded, low, 0), np.where(bounded, high, 0)
    mean = np.where(bounded, (low + high) / 2, actions.mean(0).numpy())
    largest = actions.abs().max(0).values.numpy()
    least = np.where(
        largest > 0, np.minimum(1e-3, 1e-3 * largest), 1e-3
    )  # what hardly moves is no reason to magnify noise
    scale = np.where(bounded, (high - low) / 2, np.maximum(actions.std(0, correction=0).numpy(), least))
    return mean, scale
