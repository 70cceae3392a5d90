"""Files -> what they hold -> a Minari dataset, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from eva_rl.convert.episodes import Columns, Episode, Format, Unread
from eva_rl.convert.formats import find_format
from eva_rl.convert.lerobot import from_hub
from eva_rl.convert.taken import Column, Summary, Taken, take
from eva_rl.data import check_new_id, write_dataset
from eva_rl.errors import UserError, in_one_line

CHOICES = 1000
"""Values that whole numbers may take to be choices."""


@dataclass(frozen=True)
class Found:
    """What was found in the files and written."""

    dataset_id: str
    kind: str
    summary: Summary
    observation_space: gym.Space
    action_space: gym.Space
    left_out: list[tuple[str, str]]
    """What was not taken over, and why."""


def convert(
    source: str,
    dataset_id: str,
    kind: str | None = None,
    columns: Columns | None = None,
    actions: str | None = None,
    environment: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Found:
    """Write the episodes in `source` as the Minari dataset `dataset_id`.

    Args:
        source: a file or folder, or a LeRobot dataset of the Hugging Face Hub.
        kind: the format. By default, the one that the files look like.
        columns: what is taken for what, where the format's own choice is not wanted.
        actions: `continuous` or `discrete`. By default, whole numbers in one column are discrete.
        environment: the id of a registered environment, whose spaces the data have. It is to be rolled out.
        skip_bad: leave out episodes that can't be used, instead of refusing all.

    Raises:
        UserError: if the files can't be read or used, naming file, episode and column, or if the dataset is there.
    """
    if actions not in (None, "continuous", "discrete"):
        raise UserError(f"actions must be continuous or discrete, got {actions}.")
    check_new_id(dataset_id, overwrite)
    path = _located(source, kind)
    format = find_format(path, kind)
    given = columns or Columns()
    left_out: list[tuple[str, str]] = []
    summary = Summary()
    bad = left_out if skip_bad else None
    for _ in _episodes(path, format, given, summary, bad):
        pass
    if not summary.lengths:
        why = f" that can be used; the first, {left_out[0][0]}: {left_out[0][1]}" if left_out else "."
        raise UserError(f"source={source} holds no episode{why}")
    left_out[:0] = format.left_out(path, given.over(format.columns))
    spaces = _spaces(summary, actions, environment)
    episodes = _as_kept(_episodes(path, format, given, Summary(), [] if skip_bad else None), *spaces)
    about = f"{len(summary.lengths)} episodes, converted from {format.name} files."
    write_dataset(dataset_id, episodes, *spaces, about, environment, overwrite)
    return Found(dataset_id, format.name, summary, *spaces, left_out)


def _located(source: str, kind: str | None) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.count("/") == 1 and not source.startswith((".", "/", "~")) and kind in (None, "lerobot"):
        return from_hub(source)
    raise UserError(f"source={source} is neither a file nor a folder: name one that is there.")


def _episodes(
    path: Path, format: Format, given: Columns, summary: Summary, bad: list[tuple[str, str]] | None
) -> Iterator[Taken]:
    """The episodes that can be used.

    The others are noted in `bad` or, if that is None, refused.
    """
    if given.episode and format.columns.episode is None:
        raise UserError(
            f"columns.episode was given, but {format.name} files tell episodes apart themselves: leave it out."
        )
    columns = given.over(format.columns)
    try:
        for episode in (reading := format.read(path, columns)):
            try:
                if isinstance(episode, Unread):
                    raise episode.error
                taken = take(episode, columns, given, format)
                summary.add(taken)
            except UserError as error:
                if bad is None and not (summary.lengths or _any_usable(reading, columns, given, format)):
                    raise  # to leave all of them out would hide why
                if bad is None:
                    raise UserError(f"{error} (skip_bad=true leaves such episodes out.)") from error
                bad.append((episode.where, str(error).removeprefix(episode.where).lstrip(", ")))
                continue
            yield summary.in_order(taken)
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"'{path}' can't be read ({in_one_line(error)[:200]}): get it again.") from error


def _any_usable(episodes: Iterator[Episode | Unread], columns: Columns, given: Columns, format: Format) -> bool:
    """Whether any of these episodes could be taken."""
    with suppress(UserError, OSError, ValueError, MemoryError):  # no more of them can be read
        for episode in episodes:
            with suppress(UserError):
                if isinstance(episode, Episode):
                    take(episode, columns, given, format)
                    return True
    return False


def _spaces(summary: Summary, actions: str | None, environment: str | None) -> tuple[gym.Space, gym.Space]:
    """The spaces of observations and actions: the environment's, or as wide as nobody can know them narrower."""
    done = {name: column for name, column in summary.columns.items() if column.role == "actions"}
    if environment is not None:
        observation_space, action_space = _spaces_of(environment)
        _refuse_batches(done, action_space.shape)
        return observation_space, action_space
    _refuse_batches(done)
    seen = {name: column for name, column in summary.columns.items() if column.role == "observations"}
    if _in_one(seen):
        observation_space = _box(seen)
    else:
        observation_space = gym.spaces.Dict({key: _box({name: seen[name]}) for name, key in _keys(seen).items()})
    if _are_choices(done, actions):
        low, high = (int(f(getattr(c, n) for c in done.values())) for f, n in ((min, "low"), (max, "high")))
        if not high - low < CHOICES:
            raise UserError(
                f"The actions in '{next(iter(done))}' are whole numbers from {low} to {high} where at most {CHOICES} choices were expected: "
                "set actions=continuous."
            )
        first = min(low, 0)
        size = sum(int(np.prod(column.shape)) for column in done.values())
        if size == 1:
            return observation_space, gym.spaces.Discrete(high - first + 1, start=first)
        return observation_space, gym.spaces.MultiDiscrete([high - first + 1] * size, start=[first] * size)
    shape = next(iter(done.values())).shape if len(done) == 1 else ()
    shape = shape or (sum(int(np.prod(column.shape)) for column in done.values()),)
    return observation_space, gym.spaces.Box(-np.inf, np.inf, shape, np.float32)


def _spaces_of(environment: str) -> tuple[gym.Space, gym.Space]:
    try:
        env = gym.make(environment)
        env.close()
    except Exception as error:
        raise UserError(f"environment={environment} can't be made ({in_one_line(error)[:200]}).") from error
    try:
        assert env.spec is not None, "it has no spec"
        env.spec.to_json()
    except Exception as error:
        raise UserError(
            f"environment={environment} is registered in a way that no dataset can state ({in_one_line(error)[:200]}): register it with "
            "entry_point='module:Class' and plain keywords, or leave environment= out and set episodes=0 in finetune."
        ) from error
    return env.observation_space, env.action_space


def _refuse_batches(done: Mapping[str, Column], known: tuple[int, ...] | None = None) -> None:
    """Refuse actions (N, T, A): they are N episodes in one array rather than N steps of T x A numbers."""
    for name, column in done.items():
        if len(column.shape) > 1 and column.shape != known:
            raise UserError(
                f"Column '{name}' has an action of shape {column.shape} in each row where one row of numbers was expected: if the rows are "
                "episodes, split the arrays along axis 0, a file for each episode."
            )


def _are_choices(done: Mapping[str, Column], actions: str | None) -> bool:
    whole = all(column.dtype.kind in "iub" for column in done.values())
    if actions == "discrete" and not whole:
        raise UserError(f"actions=discrete was given, but '{next(iter(done))}' does not hold whole numbers alone.")
    single = sum(int(np.prod(column.shape)) for column in done.values()) == 1
    return whole and (actions == "discrete" or (actions is None and single))


def _in_one(columns: Mapping[str, Any]) -> bool:
    """Whether these columns (T, ...) make up one array: a single one, or one number each."""
    return len(columns) == 1 or all(not column.shape for column in columns.values())


def _keys(columns: Mapping[str, Any]) -> dict[str, str]:
    """The columns' keys in a Dict: without what all of them begin with, and without slashes, which HDF5 would split at.

    Raises:
        UserError: if two columns would have one key.
    """
    names = list(columns)
    head = 0
    while all(head < len(name) and name[head] == names[0][head] for name in names):
        head += 1
    head = max(names[0].rfind(mark, 0, head) + 1 for mark in "./")
    keys = {name: name[head:].replace("/", ".") for name in names}
    known: dict[str, str] = {}
    for name, key in keys.items():
        if known.setdefault(key, name) != name:
            raise UserError(
                f"Columns '{known[key]}' and '{name}' would both be called '{key}' in the dataset: rename one, or name columns that differ "
                "with columns.observations=[...]."
            )
    return keys


def _box(columns: Mapping[str, Column]) -> gym.spaces.Box:
    """The space of these columns, in which pictures of bytes stay bytes and all else is a vector of real numbers.

    The vector is in float64 where the files have more than float32 holds.
    """
    first = next(iter(columns.values()))
    if len(columns) == 1 and first.dtype == np.uint8 and len(first.shape) in (2, 3):
        return gym.spaces.Box(0, 255, first.shape, np.uint8)
    kinds = [column.dtype for column in columns.values()]
    wide = any((kind.kind == "f" and kind.itemsize > 4) or (kind.kind in "iu" and kind.itemsize > 2) for kind in kinds)
    shape = first.shape if len(columns) == 1 and first.shape else (len(columns),)
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float64 if wide else np.float32)


def _as_kept(episodes: Iterator[Taken], observation_space: gym.Space, action_space: gym.Space) -> Iterator[dict]:
    """The fields of Minari's episodes, in the shapes and types of the spaces."""
    for taken in episodes:
        steps = len(taken)
        ends = np.arange(steps) == steps - 1
        yield {
            "observations": _in_space(taken, "observations", taken.observations, observation_space),
            "actions": _in_space(taken, "actions", taken.actions, action_space),
            "rewards": np.zeros(steps) if taken.rewards is None else taken.rewards.astype(np.float64),
            "terminations": ends & taken.terminated,
            "truncations": ends & (not taken.terminated),
            "infos": None if taken.success is None else {"success": taken.success},
        }


def _in_space(taken: Taken, role: str, columns: Mapping[str, np.ndarray], space: gym.Space) -> Any:
    if isinstance(space, gym.spaces.Dict):
        keys = {key: name for name, key in _keys(columns).items()} if len(columns) > 1 else {n: n for n in columns}
        missing = sorted(set(space) - set(keys))
        if missing:
            raise UserError(f"{taken.where} has no column for the {role} '{missing[0]}' of the environment.")
        return {key: _in_space(taken, role, {keys[key]: columns[keys[key]]}, space[key]) for key in space}
    rows = [values.reshape(len(values), -1) for values in columns.values()]
    joined = rows[0] if len(rows) == 1 else np.concatenate(rows, 1)
    if space.shape is None or joined.shape[1] != int(np.prod(space.shape)):
        raise UserError(
            f"{taken.where} has {role} of {joined.shape[1]} numbers ({', '.join(columns)}) where {space} was expected: name other columns "
            f"with columns.{role}=[...]."
        )
    joined = joined.reshape(len(joined), *space.shape)
    with np.errstate(invalid="ignore"):  # numbers that no whole one of this type stands for: they are refused below
        kept = joined.astype(space.dtype)
    if np.issubdtype(space.dtype, np.integer) and (other := kept != joined).any():
        raise UserError(
            f"{taken.where} has {role} ({', '.join(columns)}) such as {joined[other][0]:g} where {space} takes whole numbers of {space.dtype}: "
            "bring them to its units."
        )
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete) and not all(
        map(space.contains, np.unique(kept, axis=0))
    ):
        raise UserError(f"{taken.where} has {role} ({', '.join(columns)}) outside {space}.")
    if role == "actions" and isinstance(space, gym.spaces.Box):
        return _within(kept, space, f"{taken.where} has {role} ({', '.join(columns)})")
    return kept


def _within(actions: np.ndarray, space: gym.spaces.Box, what: str) -> np.ndarray:
    """The actions (T, ...) on or between their bounds.

    Those that rounding alone put beyond a bound are moved onto it.
    """
    clipped = np.clip(actions, space.low, space.high)
    beyond = ~np.isclose(actions, clipped, rtol=1e-5, atol=1e-6)
    if beyond.any():
        raise UserError(
            f"{what} such as {actions[beyond][0]:g} outside {space}: bring them to its units, clip them, or leave environment= out."
        )
    return clipped
