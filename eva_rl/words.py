"""Text in observations: the words of a dataset, numbered, so that an embedding has a row for each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

MOST_WORDS = 2**15 - 2
"""Words that are numbered, the most frequent ones."""
LONGEST = 64
"""Words of a text that are read, from its start."""
PADDING, UNKNOWN = 0, 1
FIRST = 2
"""The number of the first word."""


class Words(gym.spaces.Text):
    """A Text whose words have numbers: 0 behind its end, 1 for a word that is not among `words`, the others from 2 on.

    Lower and upper case are the same word; punctuation marks are words.
    """

    def __init__(self, text: gym.spaces.Text, words: Iterable[str], length: int):
        charset = "".join(sorted(text.character_set))
        super().__init__(text.max_length, min_length=text.min_length, charset=charset)
        self.words, self.length = tuple(words), length
        self._numbers = {word: number for number, word in enumerate(self.words, FIRST)}

    @property
    def values(self) -> int:
        """How many numbers there are."""
        return len(self.words) + FIRST

    def numbers(self, texts: Any) -> np.ndarray:
        """A text, or any number along leading axes, as (..., length) int64; words behind `length` are left out."""
        found = np.asarray(texts)
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


def words_of(text: str) -> list[str]:
    """A text's words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def members_of(space: gym.Space) -> list[gym.Space]:
    """The members of a Dict or Tuple that have no members, in the order of the flat observation; any other space itself."""
    return [member for member, _ in _leaves(space, None)]


def has_text(space: gym.Space) -> bool:
    """Whether there is text in the space whose words have no numbers yet."""
    return any(map(_without_numbers, members_of(space)))


def with_words(space: gym.Space, observations: Iterable[Any]) -> gym.Space:
    """The space with the words of these observations numbered, the most frequent first; each has a leading axis."""
    counts: dict[int, Counter[str]] = {}
    lengths: dict[int, int] = {}
    for episode in observations:
        for number, (member, texts) in enumerate(_leaves(space, episode)):
            if not _without_numbers(member):
                continue
            for text, times in Counter(np.asarray(texts).ravel().tolist()).items():
                words = words_of(text)
                counts.setdefault(number, Counter()).update({word: times * n for word, n in Counter(words).items()})
                lengths[number] = max(lengths.get(number, 1), min(len(words), LONGEST))
    spaces = iter(
        Words(member, _most_frequent(counts.get(number, Counter())), lengths.get(number, 1))
        if _without_numbers(member)
        else member
        for number, member in enumerate(members_of(space))
    )
    return _rebuilt(space, spaces)


def _most_frequent(counts: Counter[str]) -> list[str]:
    """In an order that does not depend on that of the episodes."""
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]]


def numbered_as(space: gym.Space, known: gym.Space) -> gym.Space:
    """The space with its words numbered as in `known`, where that is a space of the same structure; else as it is."""
    own, others = members_of(space), members_of(known)
    if len(own) != len(others):
        return space
    pairs = zip(own, others, strict=True)
    return _rebuilt(
        space, iter([k if isinstance(k, Words) and isinstance(o, gym.spaces.Text) else o for o, k in pairs])
    )


class Numbered:
    """Makes an environment whose words have numbers; its observations are as they were."""

    def __init__(self, make_env: Any, space: gym.Space):
        self.make_env, self.space = make_env, space

    def __call__(self, *args: Any, **keywords: Any) -> gym.Env:
        env = self.make_env(*args, **keywords)
        env.observation_space = numbered_as(env.observation_space, self.space)
        return env


def _without_numbers(space: gym.Space) -> bool:
    return isinstance(space, gym.spaces.Text) and not isinstance(space, Words)


def _leaves(space: gym.Space, observation: Any) -> Iterator[tuple[gym.Space, Any]]:
    """The members that have no members, in the order of the flat observation, and what was observed in them if anything was."""
    if isinstance(space, gym.spaces.Dict):
        for key in sorted(space):
            yield from _leaves(space[key], observation and observation[key])
    elif isinstance(space, gym.spaces.Tuple):
        for number, member in enumerate(space):
            yield from _leaves(member, observation and observation[number])
    else:
        yield space, observation


def _rebuilt(space: gym.Space, members: Iterator[gym.Space]) -> gym.Space:
    """The space with its innermost members replaced in turn."""
    if isinstance(space, gym.spaces.Dict):
        return gym.spaces.Dict({key: _rebuilt(space[key], members) for key in sorted(space)})
    if isinstance(space, gym.spaces.Tuple):
        return gym.spaces.Tuple([_rebuilt(member, members) for member in space])
    return next(members)
