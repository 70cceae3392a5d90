"""Folders of .npz, .npy, .csv or .parquet files: one file for each episode, or a column that tells episodes apart.

- .npz: an array (T, ...) for each column.
- .npy: a table, or a folder for each episode with a file for each column. The columns of a table are the fields of a
  structured array, or the numbers 0, 1, ... of a plain one.
- .csv: a line of names, then a line for each step.
- .parquet: columns of numbers, of lists of numbers, or of pictures as Hugging Face's datasets keep them.
"""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from eva_rl.convert import parquet
from eva_rl.convert.episodes import DAMAGED, Columns, Episode, Format, Unread, matching, refuse_missing, unread
from eva_rl.errors import UserError, in_one_line

ENDINGS = (".npz", ".npy", ".csv", ".parquet")

BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, TokenError, csv.Error)
"""What numpy and csv raise for a damaged file.
A broken zip's compression raises a `RuntimeError`, and a broken header a `TokenError`."""

EPISODE = ("episode|episode_id|episode_index",)
"""What tells episodes apart, unless the user says."""


def _files(path: Path) -> list[Path]:
    """The files, or folders of .npy files, to read, in the order of their names and numbers."""
    if path.is_file():
        return [path] if path.suffix.lower() in ENDINGS else []
    if not path.is_dir():
        return []
    tables = [file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file()]
    folders = [folder for folder in path.iterdir() if folder.is_dir() and _parts(folder)]
    return sorted(tables or folders, key=_natural)


def _parts(folder: Path) -> list[Path]:
    """The .npy files of a folder that is an episode."""
    return sorted((file for file in folder.glob("*") if file.suffix.lower() == ".npy"), key=_natural)


def _left_out(path: Path, columns: Columns) -> list[tuple[str, str]]:
    if not path.is_dir():
        return []
    within = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    missed = sorted(set(within) - set(_files(path)), key=_natural)
    return [
        (f"{folder.name}/", "it is a folder within the folder; source= names it to take it alone") for folder in missed
    ]


def _natural(path: Path) -> list[Any]:
    """Names with their numbers as numbers, so that episode 10 comes after episode 9."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in path.name).split()
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _read(path: Path, columns: Columns) -> Iterator[Episode | Unread]:
    seen: dict[Any, Path] = {}
    for file in _files(path):
        try:
            episodes = _episodes(file, columns)
        except DAMAGED as error:
            yield unread(f"'{file}'", error)
            continue
        for key, episode in episodes:
            if key in seen:
                raise UserError(
                    f"'{file}', episode {episode.number} stands in '{seen[key]}' too: number the episodes of all files through, or "
                    "set columns.episode=[] if each file is one."
                )
            if key:
                seen[key] = file
            yield episode


def _episodes(file: Path, columns: Columns) -> Iterable[tuple[tuple[Any, ...], Episode]]:
    """A file's episodes and what tells them apart, nothing where the file is one.

    Raises:
        UserError: if it can't be read, or its rows can't be shared out.
    """
    whole = Episode(str(file), "", _table(file))
    if columns.episode != EPISODE:
        refuse_missing(whole, "episode", columns.episode)
    names = matching(columns.episode or (), whole.columns)
    if not names:
        return [((), whole)]
    runs = _runs(whole, names)
    if len(runs) == 1:
        return [(key, replace(whole, number=_number(key))) for key in runs]
    shared = _shared(whole, columns, max((rows.stop for rows in runs.values()), default=0))
    return (
        (key, replace(whole, number=_number(key), columns={name: values[rows] for name, values in shared.items()}))
        for key, rows in runs.items()
    )


def _number(key: tuple[Any, ...]) -> str:
    return "/".join(map(str, key))


def _runs(whole: Episode, names: list[str]) -> dict[tuple[Any, ...], slice]:
    """The rows of each episode, by what the columns that tell episodes apart hold there.

    Raises:
        UserError: if such a column is of another shape or has empty cells, or if an episode comes back after another.
    """
    numbers = [_numbers_of(whole, name) for name in names]
    steps = max(len(column) for column in numbers)
    for name, column in zip(names, numbers, strict=True):
        if len(column) not in (1, steps):
            raise UserError(f"{whole.where}, column '{name}' has {len(column)} rows where {steps} were expected.")
    numbers = [np.broadcast_to(column, steps) for column in numbers]
    changes = np.flatnonzero(np.any([column[1:] != column[:-1] for column in numbers], 0)) + 1
    starts = [0, *changes.tolist()] if steps else []
    runs: dict[tuple[Any, ...], slice] = {}
    for start, end in zip(starts, [*starts[1:], steps], strict=False):
        key = tuple(column[start : start + 1].tolist()[0] for column in numbers)
        if key in runs:
            raise UserError(
                f"{whole.where}, episode {_number(key)} comes back at row {start}, after another: give each episode a number "
                "of its own, or sort the rows by episode."
            )
        runs[key] = slice(start, end)
    return runs


def _numbers_of(whole: Episode, name: str) -> np.ndarray:
    """A column that tells episodes apart (N,), or (1,) where one value stands for the whole file."""
    column = np.atleast_1d(np.asarray(whole.columns[name]))
    if column.size != len(column):
        raise UserError(
            f"{whole.where}, column '{name}' has rows of shape {column.shape[1:]} where one number or name was expected."
        )
    column = column.reshape(-1)
    empty = column != column  # NaN
    if column.dtype.kind in "OU":
        empty = np.array([cell is None or cell == "" for cell in column])
    if empty.any():
        raise UserError(
            f"{whole.where}, column '{name}' is empty in row {int(empty.argmax())}: say of which episode it is."
        )
    return column


def _shared(whole: Episode, columns: Columns, steps: int) -> dict[str, Any]:
    """The columns that have a row a step, to be shared out to episodes.

    Raises:
        UserError: if a column that is taken for something has not.
    """
    lengths = {name: np.shape(v)[:1] if isinstance(v, np.ndarray) else (len(v),) for name, v in whole.columns.items()}
    roles = replace(columns, episode=None)  # one value of that may stand for all rows
    for name in (name for role in roles for name in matching(role or (), whole.columns)):
        if lengths[name] != (steps,):
            raise UserError(
                f"{whole.where}, column '{name}' has {lengths[name][0] if lengths[name] else 'no'} rows where {steps} were expected, for "
                "several episodes: give it a row a step."
            )
    return {name: values for name, values in whole.columns.items() if lengths[name] == (steps,)}


def _table(file: Path) -> dict[str, Any]:
    """A file's columns by name.

    Raises:
        UserError: if it can't be read.
    """
    kind = file.suffix.lower()
    if kind == ".parquet":
        return parquet.read(file)
    try:
        if file.is_dir():
            return {part.stem: np.load(part, allow_pickle=False) for part in _parts(file)}
        if kind == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        if kind == ".npy":
            return _structured(np.load(file, allow_pickle=False), file)
        return _csv(file)
    except BROKEN as error:
        hint = "save it without pickle" if "pickle" in str(error) else "get it again"
        raise UserError(f"'{file}' can't be read ({in_one_line(error)[:200]}): {hint}.") from error


def _structured(array: np.ndarray, file: Path) -> dict[str, np.ndarray]:
    if array.dtype.names:
        return {name: array[name] for name in array.dtype.names}
    if array.ndim != 2:
        raise UserError(f"'{file}' holds an array of shape {array.shape} where rows of columns were expected.")
    return {str(number): array[:, number] for number in range(array.shape[1])}


def _csv(file: Path) -> dict[str, Any]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines)
        names = [name.strip() for name in next(rows, [])]
        if not names or len(set(names)) < len(names):
            raise UserError(f"'{file}' has no first line of names that differ: add one.")
        cells = []
        for row in filter(None, rows):
            if len(row) != len(names):
                raise UserError(
                    f"'{file}', line {rows.line_num} has {len(row)} cells where {len(names)} were expected."
                )
            cells.append(row)
    return {name: _numbers([row[i].strip() for row in cells]) for i, name in enumerate(names)}


WORDS = {"true": "1", "false": "0"}


def _numbers(cells: list[str]) -> Any:
    """Cells as whole or real numbers, or as they stand where they are neither.

    Empty ones are NaN.
    """
    words = [WORDS.get(cell.lower(), cell) or "nan" for cell in cells]
    for kind in (np.int64, np.float64):
        try:
            return np.array(words, dtype=np.str_).astype(kind) if words else np.zeros(0)
        except (ValueError, OverflowError):
            continue
    return cells


FORMAT = Format(
    "tables",
    lambda path: bool(_files(path)),
    _read,
    Columns(
        observations=("observations|observation|obs|state|states|observation[._/]*|obs[._/]*|state[._/]*",),
        actions=("actions|action|act|actions[._/]*|action[._/]*|act[._/]*",),
        rewards=("rewards|reward|rew",),
        terminations=("terminations|terminated|terminals|terminal|dones|done",),
        truncations=("truncations|truncated|timeouts|timeout",),
        success=("success|successes|is_success",),
        episode=EPISODE,
    ),
    left_out=_left_out,
)
