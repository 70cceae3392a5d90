"""`runs.jsonl`: one row for each finished run below a folder, in place of as many files.

A row is the run's result.json on one line, after `run`, its folder below that of the file. Rows are sorted by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from eva_rl import files
from eva_rl.errors import UserError
from eva_rl.files import write_text

ROWS = "runs.jsonl"


@dataclass(frozen=True)
class Row:
    """A line of a `runs.jsonl`."""

    file: Path
    run: str
    """The run's folder below the file's. What was in it may be gone."""
    content: Any
    """As in result.json, not checked. None where the line is no row."""

    @property
    def place(self) -> Path:
        return self.file.parent / self.run


def read_rows(file: Path, below: str = "") -> Iterator[Row]:
    """The rows of a file, or those of runs at or below one folder, whose lines alone are then parsed.

    A line that is no row has its number for its `run`.

    Raises:
        OSError: if the file can't be read.
    """
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith((_begins(below, '"'), _begins(below, "/"))) if below else line.strip():
                try:
                    row = json.loads(line)
                    run = row.pop("run")
                    whole = isinstance(run, str) and _is_below(run)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    whole, run, row = False, "", None
                yield Row(file, run, row) if whole else Row(file, f"line {number}", None)


def _begins(run: str, end: str) -> str:
    """What the row of this run, or those of the runs below it, begin with."""
    return f'{{"run": {json.dumps(run)[:-1]}{end}'


def _is_below(run: str) -> bool:
    """Whether this is the name of a folder below another."""
    parts = PurePosixPath(run).parts
    return bool(parts) and not PurePosixPath(run).is_absolute() and ".." not in parts


def rows_at(folder: Path) -> Iterator[Row]:
    """The rows of runs at or below a folder, in files of its own parents."""
    for parent in folder.resolve().parents:
        if (file := parent / ROWS).is_file():
            yield from read_rows(file, folder.resolve().relative_to(parent).as_posix())


def find_row(run_dir: Path) -> Row | None:
    """The row of one run in the `runs.jsonl` of any of its folder's parents, or None where none has it."""
    return next((row for row in rows_at(run_dir) if row.place == run_dir.resolve() and row.content is not None), None)


def check_run_folder(path: Path, resume: bool = False) -> None:
    """As `eva_rl.files.check_run_folder`, for a run whose result may stand in a `runs.jsonl`.

    Raises:
        UserError: if files can't be written there, or there is the result of a run that this one does not resume.
    """
    files.check_run_folder(path, resume)
    if not resume and (row := find_row(path)):
        raise UserError(f"'{row.file}' has the result of '{row.run}': set another run_dir, or resume=true.")


def write_rows(file: Path, rows: Mapping[str, Any]) -> None:
    """Write the results of runs by their folders, sorted, all or none of them."""
    lines = (json.dumps({"run": run, **rows[run]}, allow_nan=False) for run in sorted(rows))
    write_text(file, "".join(f"{line}\n" for line in lines))
