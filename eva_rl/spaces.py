"""Gymnasium's spaces as a model sees them: the parts of an observation, and observations as flat rows of numbers.

Observations are kept, sent and sampled flat. A model cuts the row into its parts again and embeds each as its kind
asks. Nothing here needs torch: simulators' processes import it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import gymnasium as gym
import numpy as np

from eva_rl.errors import UserError
from eva_rl.prepared import (
    LONGEST,
    SMALLEST_IMAGE,
    Exact,
    Prepared,
    Smaller,
    Words,
    leaves,
    members_of,
    plane_of,
    shape_of,
)

SUCCESS = ("success", "is_success")
"""The names under which environments say whether a task is solved."""
LARGEST = 2**26
"""Numbers in an observation or action that a text may describe. A damaged one could ask for more than memory holds."""


@dataclass(frozen=True)
class Part:
    """One of the things an observation consists of."""

    kind: Literal["vector", "image", "grid", "tokens", "choice"]
    shape: tuple[int, ...]
    """(n,) for a vector or tokens, (channels, height, width) for images and grids, and () for a choice."""
    values: int = 0
    """How many values each number of a grid, of tokens or of a choice may take, counted from 0."""
    channels_last: bool = False
    """Whether the environment shows images or grids as (height, width, channels)."""
    wide: bool = field(default=False, compare=False)
    """Whether a vector's numbers are kept in float64, as float32 does not hold what they differ by."""

    @property
    def size(self) -> int:
        """Numbers in the flat observation."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        sizes = " x ".join(map(str, self.shape))
        return f"{self.kind} {sizes}".rstrip() + (f" of {self.values}" if self.values else "")


@dataclass(frozen=True)
class ActionPart:
    """One of the things that an action of a Dict or Tuple consists of."""

    kind: Literal["continuous", "discrete", "multi_discrete"]
    size: int
    """Numbers in the row of an action."""
    choices: tuple[int, ...] = ()
    """The choices of each of these numbers, or empty where they are real."""

    @property
    def outputs(self) -> int:
        """Numbers that predict it: one for each of a component's choices."""
        return sum(self.choices) or self.size

    def __str__(self) -> str:
        return " x ".join(map(str, self.choices)) + " choices" if self.choices else f"{self.size} numbers"


def parts_of(space: gym.Space) -> tuple[Part, ...]:
    """The parts of the space's observations, in the order of their flat form.

    A Dict's parts come in the order of its sorted keys (Minari keeps no other).

    - vector: boxes of real numbers, bytes in one dimension, MultiBinary.
    - image: bytes in two or three dimensions, at least 32 pixels a side, reduced where the space says so.
    - grid: smaller ones, where each number of a cell is one of so many values.
    - tokens: whole numbers from 0 in one dimension, MultiDiscrete, and a text whose words have numbers.
    - choice: Discrete.

    Raises:
        UserError: if the space has parts of other kinds.
    """
    if isinstance(space, gym.spaces.Dict):
        return tuple(part for key in sorted(space) for part in parts_of(space[key]))
    if isinstance(space, gym.spaces.Tuple):
        return tuple(part for member in space for part in parts_of(member))
    if isinstance(space, gym.spaces.Discrete):
        return (Part("choice", (), int(space.n)),)
    if isinstance(space, gym.spaces.MultiDiscrete) and not space.nvec.size:
        raise UserError(f"Observations of {space} can't be embedded: there is nothing in them.")
    if isinstance(space, gym.spaces.MultiDiscrete):
        return (Part("tokens", (space.nvec.size,), int(space.nvec.max())),)
    if isinstance(space, gym.spaces.MultiBinary):
        return (Part("vector", (math.prod(space.shape),)),)
    if isinstance(space, Words):
        return (Part("tokens", (space.length,), space.values),)
    if not isinstance(space, gym.spaces.Box):
        raise UserError(
            f"Observations of {space} can't be embedded: Box, Discrete, MultiDiscrete, MultiBinary, a dataset's Text, and Dict or "
            "Tuple of those can."
        )
    if space.dtype == np.uint8 and len(space.shape) in (2, 3):
        return (_picture(space, space.seen if isinstance(space, Smaller) else space.shape),)
    whole = np.issubdtype(space.dtype, np.integer) and space.dtype != np.uint8
    if whole and len(space.shape) == 1 and (space.low == 0).all() and space.high.max() < 2**16:
        return (Part("tokens", space.shape, int(space.high.max()) + 1),)
    return (Part("vector", (math.prod(space.shape),), wide=isinstance(space, Exact)),)


def _picture(space: gym.spaces.Box, shown: tuple[int, ...]) -> Part:
    height, width, *channels = shown
    channels_last = True
    if channels and (space.channels_first if isinstance(space, Smaller) else _channels_first(shown)):
        channels, height, width, channels_last = [shown[0]], *shown[1:], False
    shape = (channels[0] if channels else 1, height, width)
    if min(height, width) >= SMALLEST_IMAGE:
        return Part("image", shape, channels_last=channels_last)
    return Part("grid", shape, int(space.high.max()) + 1, channels_last)


def _channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a picture's channels are its first axis.

    They are if the last two axes make a square, or else if the first axis is shorter than the last. A square tells more
    than the lengths: a grid may have more kinds of things, a channel each, than rows.
    """
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):
        return shape[1] == shape[2]
    return shape[0] < shape[-1]


def dtype_of(parts: tuple[Part, ...]) -> str:
    """The type of flat observations.

    Bytes where they hold all of it, `float64` where a part needs that, and `float32` otherwise.
    """
    if any(part.wide for part in parts):
        return "float64"
    return "uint8" if all(p.kind == "image" or 0 < p.values <= 256 for p in parts) else "float32"


def flatten(space: gym.Space, observation: Any, parts: tuple[Part, ...] | None = None) -> np.ndarray:
    """One observation, or any number along leading axes, as rows (..., size) of numbers.

    A Dict's observations are a dict, whose values have the same leading axes. `parts` are the space's own, where they
    are known already.

    Raises:
        UserError: if numbers lie outside their space where each of them has an embedding.
    """
    columns, parts = _columns(space, observation), parts_of(space) if parts is None else parts
    rows = columns[0] if len(columns) == 1 else np.concatenate(columns, -1)
    check_values(parts, rows)  # before a cast could hide it
    return rows.astype(dtype_of(parts), copy=False)


def check_values(parts: tuple[Part, ...], rows: np.ndarray) -> None:
    """Raise a `UserError` unless embeddings have rows for all numbers of these flat observations (..., size)."""
    first = 0
    for part in parts:
        own = rows[..., first : first + part.size]
        first += part.size
        if part.values and own.size and not 0 <= own.min() <= own.max() < part.values:
            raise UserError(
                f"observations of a {part} hold numbers from {own.min():g} to {own.max():g}, which are outside their space"
            )


def _columns(space: gym.Space, observation: Any) -> list[np.ndarray]:
    if isinstance(space, gym.spaces.Dict):
        return [column for key in sorted(space) for column in _columns(space[key], observation[key])]
    if isinstance(space, gym.spaces.Tuple):
        return [column for i, member in enumerate(space) for column in _columns(member, observation[i])]
    if isinstance(space, gym.spaces.Box):
        _check_box(space, observation)
    if isinstance(space, Prepared):
        numbers = space.numbers(observation)
        return [numbers.reshape(*numbers.shape[: numbers.ndim - len(space.seen)], math.prod(space.seen))]
    numbers = np.asarray(observation)
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        numbers = numbers - space.start
    shape = shape_of(space)
    return [numbers.reshape(*numbers.shape[: numbers.ndim - len(shape)], math.prod(shape))]


def _check_box(space: gym.spaces.Box, observation: Any) -> None:
    """Raise a `UserError` unless arrays have the space's shape, after any leading axes, and pictures hold bytes."""
    numbers, shape = np.asarray(observation), shape_of(space)
    if numbers.ndim >= len(shape) and numbers.shape[numbers.ndim - len(shape) :] != shape:
        raise UserError(f"observations of shape {numbers.shape}, where they end in {shape}")
    if space.dtype != np.uint8 or len(shape) not in (2, 3) or numbers.dtype in (np.uint8, np.bool_) or not numbers.size:
        return
    if not (0 <= numbers.min() <= numbers.max() <= 255) or (numbers % 1 != 0).any():  # NaN is none of these
        raise UserError("pictures of other numbers than 0 to 255")


def one_number(value: Any) -> float | None:
    """A number, or an array of one, as a float, or None for anything else, NaN included."""
    found = np.asarray(value)
    if found.size != 1 or found.dtype.kind not in "biuf" or np.isnan(found).any():
        return None
    return float(found.reshape(-1)[0])


def solved_in(info: Mapping[str, Any]) -> bool | None:
    """Whether a step's info says that the task is solved, or None where it does not say, or not in one number."""
    found = next((one_number(info[name]) for name in SUCCESS if name in info), None)
    return None if found is None else found > 0


def successes_in(infos: Mapping[str, Any] | None) -> np.ndarray | None:
    """Whether the task is solved in each state (T,), by an episode's infos.

    None where they do not say, or not in numbers.
    """
    infos = infos or {}
    for name in SUCCESS:
        if name in infos:
            found = np.asarray(infos[name])
            known = found.size and found.dtype.kind in "biuf" and not np.isnan(found).any()
            return found if known else None
    return None


def first_choice(space: gym.Space) -> Any:
    """What the choices of a space of choices are counted from."""
    return space.start if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete) else 0


def action_choices(space: gym.Space) -> tuple[int, ...]:
    """How many choices each component of a discrete action has.

    Empty for continuous actions, and for those of several parts.

    Raises:
        UserError: if actions are neither a Box nor choices, nor a Dict or Tuple of those.
    """
    if nested(space):
        if action_parts(space):
            return ()
        raise UserError(f"Actions of {space} were met, in which there is nothing to do.")
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1 and space.nvec.size:
        return tuple(int(n) for n in space.nvec)
    if isinstance(space, gym.spaces.MultiBinary) and len(space.shape) == 1:
        return (2,) * space.shape[0]
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return ()
    raise UserError(
        f"Actions of {space} were met where a Box of real numbers, Discrete, MultiDiscrete, MultiBinary of one dimension, or a Dict or Tuple of those was "
        "expected."
    )


def nested(space: gym.Space) -> TypeGuard[gym.spaces.Dict | gym.spaces.Tuple]:
    """Whether the space has members."""
    return isinstance(space, gym.spaces.Dict | gym.spaces.Tuple)


def action_parts(space: gym.Space) -> tuple[ActionPart, ...]:
    """The parts of a Dict's or Tuple's actions, in the order of their rows, or none for other spaces.

    Raises:
        UserError: see `action_choices`.
    """
    return tuple(map(_action_part, members_of(space))) if nested(space) else ()


def _action_part(space: gym.Space) -> ActionPart:
    choices = action_choices(space)
    kind = "discrete" if isinstance(space, gym.spaces.Discrete) else "multi_discrete" if choices else "continuous"
    return ActionPart(kind, math.prod(shape_of(space)), choices)


def action_numbers(space: gym.Space) -> int:
    """Numbers in the row of an action."""
    return sum(math.prod(shape_of(member)) for member in members_of(space))


def to_action(space: gym.Space, row: np.ndarray) -> Any:
    """The environment's action for a row (act,) of numbers in its units, or of choices counted from 0.

    Numbers are clipped to the bounds of a `Box`.
    """
    if nested(space):
        members = members_of(space)
        cuts = np.cumsum([math.prod(shape_of(member)) for member in members])[:-1]
        return assembled(space, map(to_action, members, np.split(row, cuts)))
    if isinstance(space, gym.spaces.Discrete):
        return space.start + int(row[0])
    if not isinstance(space, gym.spaces.Box):
        return getattr(space, "start", 0) + row.astype(space.dtype)
    return np.clip(row.reshape(space.shape), space.low, space.high).astype(space.dtype)


def assembled(space: gym.Space, values: Iterator[Any]) -> Any:
    """A value of the space of those of its innermost members, in turn."""
    if isinstance(space, gym.spaces.Dict):
        return {key: assembled(space[key], values) for key in sorted(space)}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(assembled(member, values) for member in space)
    return next(values)


def together(space: gym.Space, actions: Sequence[Any]) -> Any:
    """n actions as one of arrays with a leading axis of n, as vector environments take them."""
    if not nested(space):
        return np.stack(actions)
    columns = zip(*([value for _, value in leaves(space, action)] for action in actions), strict=True)
    return assembled(space, map(np.stack, columns))


def action_row(space: gym.Space, action: Any) -> np.ndarray:
    """The row (act,) float64 of an environment's action, the inverse of `to_action`."""
    return action_rows(space, action).reshape(-1)


def action_rows(space: gym.Space, actions: Any) -> np.ndarray:
    """The rows (..., act) float64 of an environment's action, or of any number along leading axes."""
    columns = []
    for member, values in leaves(space, actions):
        numbers, shape = np.asarray(values, np.float64), shape_of(member)
        leading = numbers.shape[: numbers.ndim - len(shape)]
        numbers = numbers if isinstance(member, gym.spaces.Box) else numbers - first_choice(member)
        columns.append(numbers.reshape(*leading, math.prod(shape)))
    return columns[0] if len(columns) == 1 else np.concatenate(columns, -1)


def spaces_to_text(observation_space: gym.Space, action_space: gym.Space) -> str:
    """Both spaces as JSON, to stand in a checkpoint: who loads it needs no environment to know them."""
    return json.dumps({"observation": _to_json(observation_space), "action": _to_json(action_space)})


def spaces_from_text(text: str) -> tuple[gym.Space, gym.Space]:
    """The spaces of observations and actions that `spaces_to_text` wrote, of the kinds it writes and no others.

    Raises:
        ValueError: if it is not such a text.
    """
    try:
        fields = json.loads(text)
        members = fields["observation"], fields["action"]
        if sum(map(_numbers, members)) > LARGEST:
            raise ValueError(f"a description of spaces of more than {LARGEST} numbers")
        return _from_json(members[0]), _from_json(members[1])
    except (KeyError, TypeError, AttributeError, AssertionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"no description of spaces: {error!r}") from error


def _to_json(space: gym.Space) -> dict[str, Any]:
    fields: dict[str, Any] = {"space": type(space).__name__}
    if isinstance(space, gym.spaces.Dict):
        return fields | {"members": {key: _to_json(member) for key, member in space.items()}}
    if isinstance(space, gym.spaces.Tuple):
        return fields | {"members": [_to_json(member) for member in space]}
    if isinstance(space, gym.spaces.Discrete):
        return fields | {"n": int(space.n), "start": int(space.start)}
    if isinstance(space, gym.spaces.MultiDiscrete):
        return fields | {"nvec": space.nvec.tolist(), "start": space.start.tolist(), "dtype": str(space.dtype)}
    if isinstance(space, gym.spaces.MultiBinary):
        return fields | {"shape": list(space.shape)}
    if isinstance(space, gym.spaces.Text):
        fields["characters"] = "".join(sorted(space.character_set))
        fields["lengths"] = [space.min_length, space.max_length]
        return fields | ({"words": list(space.words), "at_once": space.length} if isinstance(space, Words) else {})
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"The space {space} can't be kept in a checkpoint.")
    bounds = {"low": _bounds(space.low), "high": _bounds(space.high)}
    block = {"block": space.block} if isinstance(space, Smaller) else {}
    return fields | {"shape": list(space.shape), "dtype": str(space.dtype)} | bounds | block


def _bounds(values: np.ndarray) -> Any:
    """The bounds for JSON, as a single one where all are equal, as in images.

    Infinite ones become text, as JSON has no numbers for them.
    """
    flat = values.ravel()
    kept = flat[:1] if flat.size and (flat == flat[0]).all() else flat
    return [str(value) if np.isinf(value) else value.item() for value in kept]


def _numbers(fields: Mapping[str, Any]) -> int:
    """How many numbers a space holds, by its description, before anything of that size is made."""
    members = fields.get("members", ())
    members = members.values() if isinstance(members, dict) else members
    own = fields.get("shape", ())
    if not all(type(size) is int and size >= 0 for size in own):
        raise ValueError(f"no space has the shape {own}")
    return math.prod(own) + sum(map(_numbers, members))


def _block(fields: Mapping[str, Any]) -> int:
    """The side of the blocks that a picture is reduced by."""
    block, shape = fields["block"], fields["shape"]
    if type(block) is not int or fields["dtype"] != "uint8" or not 1 <= block <= min(plane_of(tuple(shape))[:2]):
        raise ValueError("a picture of bytes is reduced by blocks of one pixel to its side")
    return block


def _length(fields: Mapping[str, Any]) -> int:
    """How many words of a text are read."""
    length, words = fields["at_once"], fields["words"]
    if type(length) is not int or not 1 <= length <= LONGEST or not all(isinstance(word, str) for word in words):
        raise ValueError("the words of a text are no list of words, or not as many are read as there can be")
    return length


def _from_json(fields: Mapping[str, Any]) -> gym.Space:
    kind = fields["space"]
    if kind == "Dict":
        return gym.spaces.Dict({key: _from_json(member) for key, member in fields["members"].items()})
    if kind == "Tuple":
        return gym.spaces.Tuple([_from_json(member) for member in fields["members"]])
    if kind == "Discrete":
        return gym.spaces.Discrete(fields["n"], start=fields["start"])
    if kind == "MultiDiscrete":
        return gym.spaces.MultiDiscrete(fields["nvec"], np.dtype(fields["dtype"]).type, start=fields["start"])
    if kind == "MultiBinary":
        shape = fields["shape"]
        return gym.spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind in ("Text", "Words"):
        low, high = fields["lengths"]
        text = gym.spaces.Text(high, min_length=low, charset=fields["characters"])
        return Words(text, fields["words"], _length(fields)) if kind == "Words" else text
    if kind not in ("Box", "Smaller", "Exact"):
        raise ValueError(f"no space is called {kind!r}")
    shape, dtype = tuple(fields["shape"]), np.dtype(fields["dtype"])
    low, high = (
        np.array([float(v) if isinstance(v, str) else v for v in fields[side]], dtype) for side in ("low", "high")
    )
    low, high = (np.resize(side, shape) if side.size == 1 else side.reshape(shape) for side in (low, high))
    box = gym.spaces.Box(low, high, shape, dtype.type)
    if kind == "Exact":
        return Exact(box)
    return Smaller(box, _block(fields)) if kind == "Smaller" else box
