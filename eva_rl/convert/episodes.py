"""What every format in this folder gives: episodes as columns by name, and what of them is taken for what.

A new format is one new file with a module-level `FORMAT = Format(...)`. To be found, the file only has to be here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.convert.parquet import are_pictures, picture
from eva_rl.errors import UserError, did_you_mean, in_one_line

ROLES = ("observations", "actions", "rewards", "terminations", "truncations", "success", "episode")
"""What a column may be taken for."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are taken for each role.

    A pattern such as `obs/*` names several columns, and `a|b` names the first of the two that is there. None stands for
    the format's own columns, and an empty tuple for no column.
    """

    observations: tuple[str, ...] | None = None
    actions: tuple[str, ...] | None = None
    rewards: tuple[str, ...] | None = None
    terminations: tuple[str, ...] | None = None
    truncations: tuple[str, ...] | None = None
    success: tuple[str, ...] | None = None
    episode: tuple[str, ...] | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, Any], where: str) -> Columns:
        """From what a file of settings holds.

        Raises:
            UserError: if it names a role that does not exist, or holds anything but names.
        """
        for role, names in mapping.items():
            if role not in ROLES:
                raise UserError(f"{where} names '{role}', which no column can be. {did_you_mean(str(role), ROLES)}")
            if not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
                raise UserError(f"{where} gives {names} for '{role}' where names of columns were expected.")
        return cls(**{role: tuple(n) if isinstance(n, list) else (n,) for role, n in mapping.items()})

    def over(self, other: Columns) -> Columns:
        """These, and the other's where these say nothing."""
        return Columns(*(theirs if mine is None else mine for mine, theirs in zip(self, other, strict=True)))

    def __iter__(self) -> Iterator[tuple[str, ...] | None]:
        return (getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Episode:
    """One episode as it stands in the user's files."""

    file: str
    number: str
    """Its name or number within the file, or an empty text where a file is an episode."""
    columns: Mapping[str, Any]
    """Arrays (T, ...), by name. Those taken for observations or success may have a row more."""
    final: Mapping[str, Any] | None = None
    """What was observed after the last action, by the names of the columns it continues (...)."""

    @property
    def where(self) -> str:
        """The file and episode, to stand in a sentence."""
        return f"'{self.file}'" + (f", episode {self.number}" if self.number else "")

    @property
    def listed(self) -> str:
        """The names of its columns, to stand in a sentence."""
        names = list(self.columns)
        return ", ".join(repr(name) for name in names[:12]) + (" and others" if len(names) > 12 else "") or "no column"


@dataclass(frozen=True)
class Unread:
    """An episode, or a file of episodes, that can't be read, although the ones after it may be readable."""

    where: str
    error: UserError


def unread(where: str, error: Exception) -> Unread:
    """What stands in the place of an episode whose reading raised this."""
    if not isinstance(error, UserError):
        error = UserError(f"{where} can't be read ({in_one_line(error)[:200]}): get it again.")
    return Unread(where, error)


DAMAGED = (UserError, OSError, ValueError, MemoryError)
"""What reading a damaged file raises."""


@dataclass(frozen=True)
class Format:
    """How files of one kind are recognised and read."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Columns], Iterator[Episode | Unread]]
    """The episodes at a path, one after the other.
    Where one alone can't be read, it gives an `Unread` and goes on. Where none can be read, it may raise a `UserError`,
    and `OSError` or `ValueError` for a damaged file."""
    columns: Columns
    """What is taken for what, unless the user says."""
    ends_inside: bool = False
    """Whether columns may say of steps before an episode's last one that it ended there, which is ignored."""
    left_out: Callable[[Path, Columns], list[tuple[str, str]]] = lambda path, columns: []
    """What of the files is not read, and why."""


def matching(names: tuple[str, ...], known: Mapping[str, Any]) -> list[str]:
    """The columns that names and patterns stand for, in their order.

    Of alternatives, `a|b`, the first that is there counts.
    """
    found: dict[str, None] = {}
    for name in names:
        for option in [name] if name in known else name.split("|"):
            own = [option] if option in known else [k for k in known if fnmatchcase(k, option)]
            if own:
                found.update(dict.fromkeys(own))
                break
    return list(found)


def refuse_missing(episode: Episode, role: str, given: tuple[str, ...] | None) -> None:
    """Refuse an episode that lacks a column which the user named for this role."""
    for name in given or ():
        if not matching((name,), episode.columns):
            raise UserError(
                f"{episode.where} has no column '{name}', which columns.{role} names: it has {episode.listed}."
            )


def stacked(episode: Episode, name: str) -> np.ndarray:
    """A column as one array of numbers (T, ...).

    Pictures that are kept as files within the column are opened.

    Raises:
        UserError: if its rows differ in shape, or hold text or other objects.
    """
    values = episode.columns[name]
    if are_pictures(values):
        values = [_picture(episode, name, step, cell) for step, cell in enumerate(values)]
    try:
        column = np.asarray(values if isinstance(values, np.ndarray) and values.dtype != object else list(values))
    except ValueError as error:
        raise UserError(f"{episode.where}, column '{name}' has rows of several shapes: give all the same.") from error
    if column.dtype.kind in "OUSV":
        text = next((v for v in np.ravel(column) if not _is_number(v)), None)
        if text is not None or column.dtype.kind == "V":
            raise UserError(f"{episode.where}, column '{name}' holds '{_shortened(text)}' where numbers were expected.")
        column = column.astype(np.float64)
    if column.ndim == 0:
        raise UserError(f"{episode.where}, column '{name}' is one number where one for each step was expected.")
    return column


def _picture(episode: Episode, name: str, step: int, cell: Any) -> np.ndarray:
    try:
        return picture(cell)
    except ValueError as error:
        raise UserError(
            f"{episode.where}, column '{name}' holds no picture that can be read at step {step}: mend or remove it."
        ) from error


def _shortened(cell: Any) -> str:
    text = " ".join(str(cell).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
