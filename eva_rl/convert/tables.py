"""Folders of .npz, .npy, .csv or .parquet files: a file an episode, or a column that says which.

- .npz: an array (T, ...) for each column.
- .npy: a table, its columns being the fields of a structured array or the numbers 0, 1, ... of a plain one; or a folder an episode, with
  a file for each column.
- .csv: a line of names, then a line a step.
- .parquet: columns of numbers, or of lists of numbers.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.convert import parquet
from eva_rl.convert.episodes import Columns, Episode, Format, matching
from eva_rl.errors import UserError, in_one_line

ENDINGS = (".npz", ".npy", ".csv", ".parquet")


def _files(path: Path) -> list[Path]:
    """The files, or folders of .npy files, to read, in the order of their names and numbers."""
    if path.is_file():
        return [path] if path.suffix in ENDINGS else []
    if not path.is_dir():
        return []
    tables = [file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file()]
    folders = [folder for folder in path.iterdir() if folder.is_dir() and any(folder.glob("*.npy"))]
    return sorted(tables or folders, key=_natural)


def _natural(path: Path) -> list[Any]:
    """Names with their numbers as numbers, so that episode 10 comes after episode 9."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in path.name).split()
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _read(path: Path, columns: Columns) -> Iterator[Episode]:
    seen: dict[Any, Path] = {}
    for file in _files(path):
        table = _table(file)
        names = matching(columns.episode or (), table)
        if not names:
            yield Episode(str(file), "", table)
            continue
        whole = Episode(str(file), "", table)
        numbers = np.asarray(table[names[0]])
        lengths = {name: len(values) for name, values in table.items()}
        for name, length in lengths.items():
            if length != len(numbers):
                raise UserError(
                    f"{whole.where}, column '{name}' has {length} rows, but '{names[0]}' has {len(numbers)}: give each a row a step."
                )
        for number in dict.fromkeys(numbers.tolist()):
            if number in seen:
                raise UserError(
                    f"{whole.where}, episode {number} stands in '{seen[number]}' too: number the episodes of all files through."
                )
            seen[number] = file
            rows = np.flatnonzero(numbers == number)
            yield Episode(str(file), str(number), {name: _rows(values, rows) for name, values in table.items()})


def _rows(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]


def _table(file: Path) -> dict[str, Any]:
    """A file's columns by name.

    Raises:
        UserError: if it can't be read.
    """
    if file.suffix == ".parquet":
        return parquet.read(file)
    try:
        if file.is_dir():
            return {part.stem: np.load(part, allow_pickle=False) for part in sorted(file.glob("*.npy"), key=_natural)}
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        if file.suffix == ".npy":
            return _structured(np.load(file, allow_pickle=False), file)
        return _csv(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, csv.Error) as error:
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
        names = next(rows, [])
        if not names or len(set(names)) < len(names):
            raise UserError(f"'{file}' has no first line of names that differ: add one.")
        cells = [row for row in rows if row]
    for number, row in enumerate(cells, 2):
        if len(row) != len(names):
            raise UserError(f"'{file}', line {number} has {len(row)} cells where {len(names)} were expected.")
    return {name: _numbers([row[i].strip() for row in cells]) for i, name in enumerate(names)}


WORDS = {"true": "1", "false": "0"}


def _numbers(cells: list[str]) -> Any:
    """Cells as whole or real numbers; as they stand where they are neither. Empty ones are NaN."""
    cells = [WORDS.get(cell.lower(), cell) or "nan" for cell in cells]
    for kind in (np.int64, np.float64):
        try:
            return np.array(cells, dtype=np.str_).astype(kind) if cells else np.zeros(0)
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
        episode=("episode|episode_id|episode_index",),
    ),
)
