"""Folders -> the finished runs in them, and the same packed: one row a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eva_rl.errors import UserError
from eva_rl.run.result import RunResult
from eva_rl.run.rows import ROWS, Row, read_rows, rows_at, write_rows
from eva_rl.run.scores import Scores, failures_counted
from eva_rl.study.labels import FACTS, in_words


def read_results(folders: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """The result of every complete fine-tuning run below these folders, and a sentence for each one left out.

    A run is a row of a `runs.jsonl` in, below or above a folder, or a folder of its own that no row names.

    Where a run did not roll out the base, its zero-shot scores are those of the run of the same base, task, seed and
    episodes that trained nothing, if there is one. Of two runs made alike, down to the seed, the second is left out.

    Raises:
        UserError: if a folder does not exist.
    """
    results: dict[str, RunResult] = {}
    places: dict[str, Path] = {}
    left_out: list[str] = []
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for folder in folders:
        found, amiss = _contents(folder)
        left_out += amiss
        if not found and len(folders) > 1:
            left_out.append(f"{folder}: there are no runs below it")
        for place in sorted(found):
            result, wrong = _result(found[place], (place if len(folders) > 1 else place.relative_to(folder)).as_posix())
            if result is None:
                left_out.append(f"{place}: {wrong}")
                continue
            key = in_words(result.settings)
            if places.setdefault(key, place) == place:
                results[key] = result
            else:
                other = "" if _one_base(result, results[key]) else ", but for the weights of its base"
                left_out.append(f"{place}: the same run as {places[key]}{other}, left out")
    runs = sorted(results.values(), key=lambda r: (*(str(getattr(r, name)) for name in FACTS), str(r.settings)))
    return _with_zero_shot(_failures_counted(runs)), left_out


def pack(folder: Path) -> list[str]:
    """Add the finished runs below a folder to its `runs.jsonl`, which is made if it is not there.

    If a folder in between has a `runs.jsonl`, a run is added to the nearest of these. Runs' folders stay as they are. A
    report and `resume=true` need no more of them than the row.

    Returns:
        A sentence for each file.

    Raises:
        UserError: if a folder does not exist, or there is a `runs.jsonl` with a line that is no row.
    """
    files: dict[Path, dict[str, Any]] = {}
    rows, _ = _rows(folder)
    for run in sorted(_runs_below(folder)):
        content = _read(run)
        if run in rows or run == folder or _result(content, "")[0] is None:
            continue
        parents = list(run.parents)
        parents = parents[: parents.index(folder) + 1]
        file = next((parent / ROWS for parent in parents if (parent / ROWS).is_file()), folder / ROWS)
        files.setdefault(file, {})[run.relative_to(file.parent).as_posix()] = content
    for file, fresh in files.items():
        kept = list(read_rows(file)) if file.is_file() else []
        if wrong := next((row.run for row in kept if row.content is None), None):
            raise UserError(f"'{file}', {wrong}, is no row of a run: mend it, or take it out.")
        write_rows(file, {row.run: row.content for row in kept} | fresh)
    return [f"{file}: {len(fresh)} runs were added" for file, fresh in files.items()]


def _contents(folder: Path) -> tuple[dict[Path, Any], list[str]]:
    """What result.json says of each run below a folder, by its place, and a sentence for what is amiss in its rows."""
    rows, amiss = _rows(folder)
    found = {place: row.content for place, row in rows.items()}
    for run in _runs_below(folder):
        content = _read(run)
        if run not in rows:
            found[run] = content
        elif _result(content, "")[0] is not None and content != rows[run].content:
            amiss.append(f"{run}: left out, as {rows[run].file} has another result of it")
    return found, sorted(amiss)


def _rows(folder: Path) -> tuple[dict[Path, Row], list[str]]:
    """The rows of runs below a folder, by the places of these, and a sentence for each line that is none."""
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder: name one that holds runs.")
    found: dict[Path, Row] = {}
    amiss = []
    for row in rows_at(folder):  # lines of files above the folder that are no rows are not its own
        if row.content is not None:
            found.setdefault(folder / row.place.relative_to(folder.resolve()), row)
    for file in sorted(_files_below(folder)):
        for row in read_rows(file):
            if row.content is None or found.setdefault(row.place, row) is not row:
                amiss.append(f"{file}, {row.run}: no row of a run, or its second, left out")
    return found, amiss


def _result(content: Any, run: str) -> tuple[RunResult | None, str]:
    """The result of a complete run, or what is wrong with it."""
    if not isinstance(content, dict) or content.get("status") != "complete" or "zero_shot" not in content:
        return None, "not a complete fine-tuning run, left out"
    try:
        return RunResult.from_json(content, run), ""
    except TypeError as error:
        return None, f"left out, as its result.json is not as a run writes it ({error})"


def _read(run: Path) -> Any:
    """What the result.json of a run says, or None where there is none or it is not JSON."""
    try:
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _failures_counted(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs with the rate 0 where others of their task show that the task has rates, see `failures_counted`."""
    groups: dict[str, list[Scores]] = {}
    for run in runs:
        groups.setdefault(run.task, []).extend([run.scores, run.zero_shot, *run.curve.values()])
    counted = {task: iter(failures_counted(own)) for task, own in groups.items()}

    def next_of(run: RunResult) -> Scores:
        return next(counted[run.task])

    return [
        replace(run, scores=next_of(run), zero_shot=next_of(run), curve={step: next_of(run) for step in run.curve})
        for run in runs
    ]


def _with_zero_shot(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs, those that did not roll out the base with the scores of the run that trained nothing, if there is one."""
    untrained = {_place(run): run for run in runs if not run.trainable_parameters}
    found = []
    for run in runs:
        other = untrained.get(_place(run))
        lent = other is not None and run.zero_shot["episode_return"] is None and _one_base(run, other)
        found.append(replace(run, zero_shot=other.zero_shot) if other is not None and lent else run)
    return found


def _one_base(result: RunResult, other: RunResult) -> bool:
    """Whether two runs on a base of one name had, as far as they say, the same weights."""
    return None in (result.base_sha256, other.base_sha256) or result.base_sha256 == other.base_sha256


def _place(run: RunResult) -> tuple[Any, ...]:
    """What decides the scores of the base as it is."""
    settings: Mapping[str, Any] = run.settings
    asked = (settings.get(name) for name in ("episodes", "max_episode_steps", "trust_environment"))
    own = (run.base, run.task, run.seed, run.dataset, run.demonstrations, run.target_return)
    return (*own, *asked, settings["training"].get("precision"))


def _runs_below(folder: Path) -> Iterator[Path]:
    """The folders in which a run has begun.

    Raises:
        OSError: if a folder can't be read.
    """
    for place, names in _walk(folder):
        if not {"config.yaml", "result.json", ".lock"}.isdisjoint(names):
            yield place


def _files_below(folder: Path) -> Iterator[Path]:
    return (place / ROWS for place, names in _walk(folder) if ROWS in names)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """All folders, each with the names of its files.

    Runs may be under way, so that these come and go.
    """

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for place, inner, files in os.walk(folder, onerror=unless_gone):
        inner[:] = [name for name in inner if not name.startswith(".")]  # those are half written
        yield Path(place), files
