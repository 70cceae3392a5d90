"""Members of observation spaces that are changed before a model sees them, or that are kept in float64.

Text becomes the numbers of its words, and large pictures become smaller ones. Numbers such as seconds since 1970 are
kept in float64. How this is done is found from a dataset, and kept with its spaces in a checkpoint. So rollouts and
policies do the same to what an environment shows.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np

MOST_WORDS = 2**15 - 2
"""Words that are numbered, the most frequent ones."""
LONGEST = 64
"""Words of a text that are read, from its start."""
PADDING, UNKNOWN = 0, 1
FIRST = 2
"""The number of the first word."""
SMALLEST_IMAGE = 32
"""Pixels a side. Smaller pictures of whole numbers are taken for grids of cells."""
LARGEST_PICTURE = 128
"""Pixels a side. Larger pictures are reduced to at most so many."""
MOST_CHANNELS = 4
"""Channels of a picture that is reduced, be they its last axis or its first."""
LARGE = 2.0**20
"""Numbers up to this one differ, where they mean to, by more than float32 tells apart."""
EPISODES_SEEN = 32
"""Episodes that are read for numbers that float32 can't hold. More would be a second reading of large datasets."""


class Prepared(gym.Space):
    """A space that says how its observations are changed."""

    @abstractmethod
    def numbers(self, observations: Any) -> np.ndarray:
        """An observation as the environment shows it, or any number along leading axes, as numbers (..., *seen)."""

    @property
    @abstractmethod
    def seen(self) -> tuple[int, ...]:
        """The shape of what a model sees."""


class Words(gym.spaces.Text, Prepared):
    """A Text whose words have numbers: 0 behind its end, 1 for a word that is not among `words`, the others from 2 on.

    Lower and upper case are the same word, and punctuation marks are words.
    """

    def __init__(self, text: gym.spaces.Text, words: Iterable[str], length: int):
        charset = "".join(sorted(text.character_set))
        super().__init__(text.max_length, min_length=text.min_length, charset=charset)
        self.words, self.length = tuple(words), length
        self._numbers = {word: number for number, word in enumerate(self.words, FIRST)}

    @property
    def seen(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def values(self) -> int:
        """How many numbers there are."""
        return len(self.words) + FIRST

    def numbers(self, observations: Any) -> np.ndarray:
        """A text, or any number along leading axes, as (..., length) int64.

        Words beyond `length` are left out.
        """
        found = np.asarray(observations)
        if found.dtype.kind not in "UO" or not all(isinstance(text, str) for text in found.ravel().tolist()):
            raise TypeError(f"{found.dtype} is no text")
        different, which = np.unique(found, return_inverse=True)  # a mission is the same in all steps
        rows = np.full((len(different), self.length), PADDING)
        for row, text in zip(rows, different, strict=True):
            known = [self._numbers.get(word, UNKNOWN) for word in words_of(text)[: self.length]]
            row[: len(known)] = known
        return rows[which.reshape(found.shape)]

    def __repr__(self) -> str:
        return f"Text({len(self.words)} words, {self.length} at once)"

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Words) and (self.words, self.length) == (other.words, other.length)
        return same and super().__eq__(other)

    __hash__ = None


class Smaller(gym.spaces.Box, Prepared):
    """A Box of bytes whose pictures are reduced: each block of `block` x `block` pixels to its mean.

    The pictures are (height, width), (height, width, channels) or (channels, height, width). Rows and columns that make up no whole block are left
    out, at the bottom and on the right.
    """

    def __init__(self, box: gym.spaces.Box, block: int):
        super().__init__(box.low, box.high, box.shape, np.uint8)
        self.block = block

    @property
    def channels_first(self) -> bool:
        return len(self.plane) < len(self.shape)

    @property
    def plane(self) -> tuple[int, ...]:
        return plane_of(self.shape)

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape of a reduced picture."""
        height, width, *channels = self.plane
        reduced = (height // self.block, width // self.block, *channels)
        return (self.shape[0], *reduced) if self.channels_first else reduced

    def numbers(self, observations: Any) -> np.ndarray:
        """Pictures (..., *shape) as (..., *seen) uint8."""
        pictures = np.asarray(observations)
        leading = pictures.shape[: pictures.ndim - len(self.shape)]
        if pictures.shape != (*leading, *self.shape) or pictures.dtype != np.uint8:
            raise TypeError(f"an array of {pictures.dtype} of shape {pictures.shape} is no picture of {self}")
        height, width, *channels = self.seen[1:] if self.channels_first else self.seen
        whole = pictures.reshape(-1, *self.plane)[:, : height * self.block, : width * self.block]
        blocks = whole.reshape(-1, height, self.block, width, self.block, *channels)
        sums = blocks.sum((2, 4), dtype=np.uint32)  # (n, height, width, *channels)
        area = self.block**2
        return ((sums + area // 2) // area).astype(np.uint8).reshape(*leading, *self.seen)

    def __repr__(self) -> str:
        return f"{super().__repr__()} reduced to {' x '.join(map(str, self.seen))}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Smaller) and self.block == other.block and super().__eq__(other)

    __hash__ = None


class Exact(gym.spaces.Box, Prepared):
    """A Box whose numbers differ by less than float32 tells apart at their size.

    They stay float64 until their mean is taken off.
    """

    def __init__(self, box: gym.spaces.Box):
        super().__init__(box.low, box.high, box.shape, box.dtype.type)

    @property
    def seen(self) -> tuple[int, ...]:
        return self.shape

    def numbers(self, observations: Any) -> np.ndarray:
        """Numbers (..., *shape) as float64."""
        return np.asarray(observations).astype(np.float64)

    def __repr__(self) -> str:
        return f"{super().__repr__()} in float64"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exact) and super().__eq__(other)

    __hash__ = None


def loses_digits(space: gym.Space, values: Any) -> np.ndarray:
    """Which of its numbers (size,) differ over an episode (T, *shape) by less than float32 resolves at their size."""
    exact = isinstance(space, gym.spaces.Box) and space.dtype in (np.float64, np.int64, np.uint64)
    if not exact or isinstance(space, Prepared):
        return np.zeros(0, bool)
    numbers = np.asarray(values, np.float64).reshape(len(values), -1)
    spread = numbers.std(0)
    with np.errstate(over="ignore", invalid="ignore"):
        lost = np.abs(numbers - numbers.astype(np.float32)).max(0)
    return (lost > 0.01 * spread) & (spread > 0) & (np.abs(numbers).max(0) > LARGE)


def words_of(text: str) -> list[str]:
    """A text's words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def prepared(space: gym.Space, episodes: Callable[[], Iterable[Any]]) -> gym.Space:
    """The space with its members prepared.

    Large pictures are reduced, and words are numbered, the most frequent first. Numbers are kept in float64 if one of
    the first `EPISODES_SEEN` episodes shows that they need it.

    Args:
        episodes: makes an iterable of observations with a leading axis. Called where there is text, or float64.
    """
    members = [_reduced(member) for member in members_of(space)]
    if any(isinstance(member, gym.spaces.Box) and member.dtype.itemsize == 8 for member in members):
        members = _exact(space, members, islice(episodes(), EPISODES_SEEN))
    if any(map(_without_numbers, members)):
        members = _with_words(space, members, episodes())
    return _rebuilt(space, iter(members))


def prepared_as(space: gym.Space, known: gym.Space) -> gym.Space:
    """The space prepared as `known` is, where that has the same structure, or else the space as it is."""
    own, others = members_of(space), members_of(known)
    if len(own) != len(others):
        return space
    pairs = zip(own, others, strict=True)
    return _rebuilt(space, iter([k if isinstance(k, Prepared) and _alike(o, k) else o for o, k in pairs]))


class PreparedEnv:
    """Makes an environment whose space says how a model sees it, and whose observations stay as they were."""

    def __init__(self, make_env: Callable[..., gym.Env], space: gym.Space):
        self.make_env, self.space = make_env, space

    def __call__(self, *args: Any, **keywords: Any) -> gym.Env:
        env = self.make_env(*args, **keywords)
        env.observation_space = prepared_as(env.observation_space, self.space)
        return env


def shape_of(space: gym.Space) -> tuple[int, ...]:
    """The shape of a space of arrays.

    Raises:
        TypeError: of any other space, which has none.
    """
    if space.shape is None:
        raise TypeError(f"{space} has no shape")
    return space.shape


def members_of(space: gym.Space) -> list[gym.Space]:
    """The members of a Dict or Tuple that have no members themselves, in the order of the flat observation.

    For any other space, that space itself.
    """
    return [member for member, _ in leaves(space, None)]


def _alike(space: gym.Space, known: gym.Space) -> bool:
    if isinstance(known, Words):
        return isinstance(space, gym.spaces.Text)
    if isinstance(known, Exact):
        return isinstance(space, gym.spaces.Box) and space.shape == known.shape
    return isinstance(space, gym.spaces.Box) and (space.shape, space.dtype) == (known.shape, known.dtype)


def plane_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What of a picture is reduced at a time: (height, width), or (height, width, channels) where channels come last."""
    return shape[1:] if len(shape) == 3 and shape[0] <= MOST_CHANNELS < shape[2] else shape


def _reduced(space: gym.Space) -> gym.Space:
    """A picture that is larger than `LARGEST_PICTURE` reduced by the smallest whole factor that does."""
    if not isinstance(space, gym.spaces.Box) or isinstance(space, Prepared):
        return space
    if space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return space
    if len(space.shape) == 3 and min(space.shape[0], space.shape[2]) > MOST_CHANNELS:  # who knows where they are
        return space
    sides = plane_of(space.shape)[:2]
    block = -(-max(sides) // LARGEST_PICTURE)
    return Smaller(space, block) if block > 1 and min(sides) // block >= SMALLEST_IMAGE else space


def _without_numbers(space: gym.Space) -> TypeGuard[gym.spaces.Text]:
    return isinstance(space, gym.spaces.Text) and not isinstance(space, Words)


def _needs_float64(space: gym.Space, values: Any) -> TypeGuard[gym.spaces.Box]:
    return len(values) > 0 and bool(loses_digits(space, values).any())


def _exact(space: gym.Space, members: list[gym.Space], episodes: Iterable[Any]) -> list[gym.Space]:
    """The members, those kept in float64 that an episode shows to need it."""
    for episode in episodes:
        shown = [values for _, values in leaves(space, episode)]
        members = [Exact(m) if _needs_float64(m, v) else m for m, v in zip(members, shown, strict=True)]
    return members


def _with_words(space: gym.Space, members: list[gym.Space], episodes: Iterable[Any]) -> list[gym.Space]:
    """The members, their texts' words numbered as these observations have them."""
    texts = {number: member for number, member in enumerate(members) if _without_numbers(member)}
    counts: dict[int, Counter[str]] = {number: Counter() for number in texts}
    lengths = dict.fromkeys(texts, 1)
    for episode in episodes:
        shown = [values for _, values in leaves(space, episode)]
        for number in texts:
            for text, times in Counter(np.asarray(shown[number]).ravel().tolist()).items():
                words = words_of(text)
                counts[number].update({word: times * n for word, n in Counter(words).items()})
                lengths[number] = max(lengths[number], min(len(words), LONGEST))
    found = {number: Words(text, _most_frequent(counts[number]), lengths[number]) for number, text in texts.items()}
    return [found.get(number, member) for number, member in enumerate(members)]


def _most_frequent(counts: Counter[str]) -> list[str]:
    """In an order that does not depend on that of the episodes."""
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]]


def leaves(space: gym.Space, observation: Any) -> Iterator[tuple[gym.Space, Any]]:
    """The innermost members in the order of the flat observation, and what was observed in them, if anything was."""
    if isinstance(space, gym.spaces.Dict):
        for key in sorted(space):
            yield from leaves(space[key], observation and observation[key])
    elif isinstance(space, gym.spaces.Tuple):
        for number, member in enumerate(space):
            yield from leaves(member, observation and observation[number])
    else:
        yield space, observation


def _rebuilt(space: gym.Space, members: Iterator[gym.Space]) -> gym.Space:
    """The space with its innermost members replaced in turn."""
    if isinstance(space, gym.spaces.Dict):
        return gym.spaces.Dict({key: _rebuilt(space[key], members) for key in sorted(space)})
    if isinstance(space, gym.spaces.Tuple):
        return gym.spaces.Tuple([_rebuilt(member, members) for member in space])
    return next(members)
