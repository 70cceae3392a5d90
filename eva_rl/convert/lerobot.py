"""LeRobot's folders, of versions 2 and 3: `meta/info.json`, and Parquet files below `data/`.

A row is a frame. `episode_index` says which episode it belongs to, and `frame_index` which of its frames it is. Version
2 has one file for each episode, and version 3 has many episodes in a file. Columns are named `observation.<name>`,
`action`, `next.reward`, `next.done` and `next.success`. Pictures that are stored in the Parquet files are read, but
videos are not. A name such as `lerobot/pusht` that is no folder is a dataset of the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.convert import parquet
from eva_rl.convert.episodes import DAMAGED, Columns, Episode, Format, Unread, matching, unread
from eva_rl.errors import UserError
from eva_rl.files import read_json

VERSIONS = ("v2", "v3")


def from_hub(name: str) -> Path:
    """The folder of a dataset of the Hub, without its videos.

    Raises:
        UserError: if there is none of that name, or the Hub can't be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*", "meta/**", "data/**"]))
    except Exception as error:
        raise UserError(
            f"source={name} is neither a file nor a folder, and no dataset of the Hugging Face Hub that can be had "
            f"({type(error).__name__}): check the name, or connect to the internet."
        ) from error


def _recognises(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


def _info(path: Path) -> dict[str, Any]:
    info = read_json(path / "meta" / "info.json")
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if not str(version).startswith(VERSIONS):
        raise UserError(f"'{path}' is a LeRobot folder of version {version} where v2.0, v2.1 or v3.0 was expected.")
    if not isinstance(info.get("features") or {}, dict):
        raise UserError(f"'{path}', meta/info.json has no names below 'features': get the folder again.")
    return info


def _read(path: Path, columns: Columns) -> Iterator[Episode | Unread]:
    info, episodes, frames, whole = _info(path), set(), 0, True
    files = sorted((path / "data").rglob("*.parquet"))
    if not files:
        raise UserError(f"'{path}' holds no Parquet file below data/: get the whole folder.")
    for file in files:
        for episode in _of_file(file, columns):
            if isinstance(episode, Unread):
                whole = False
            elif episode.number in episodes:
                raise UserError(
                    f"'{file}', episode {episode.number} stands in another file too: get the whole folder again."
                )
            else:
                episodes.add(episode.number)
                frames += len(episode.columns["frame_index"])
            yield episode
    for what, found in (("total_episodes", len(episodes)), ("total_frames", frames)):
        if whole and info.get(what, found) != found:
            raise UserError(
                f"'{path}' states {what}={info[what]} in meta/info.json, but its files hold {found}: get the whole folder."
            )


def _of_file(file: Path, columns: Columns) -> Iterator[Episode | Unread]:
    """A file's episodes, each with the columns that are taken for something and `frame_index`."""
    try:
        known = dict.fromkeys(parquet.columns_of(file))
        wanted = {name for names in columns for name in matching(names or (), known)} | {"frame_index"}
        for needed in ("episode_index", "frame_index"):
            if needed not in known:
                raise UserError(f"'{file}' has no column '{needed}', which LeRobot's files have.")
        table = parquet.read(file, sorted(wanted | {"episode_index"}))
        numbers, order = (_whole_numbers(table, name, file) for name in ("episode_index", "frame_index"))
    except DAMAGED as error:
        yield unread(f"'{file}'", error)
        return
    for number in dict.fromkeys(numbers.tolist()):
        rows = np.flatnonzero(numbers == number)
        rows = rows[np.argsort(order[rows], kind="stable")]
        try:
            if order[rows].tolist() != list(range(len(rows))):
                raise UserError(f"'{file}', episode {number}, column 'frame_index' has gaps: get the folder again.")
            frames = {name: _frames(table[name], rows) for name in sorted(wanted)}
            episode = Episode(str(file), str(number), frames)
        except DAMAGED as error:
            episode = unread(f"'{file}', episode {number}", error)
        yield episode


def _whole_numbers(table: dict[str, Any], name: str, file: Path) -> np.ndarray:
    """A column (N,) that numbers things.

    Raises:
        UserError: if it holds anything else.
    """
    found = np.asarray(table[name])
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise UserError(
            f"'{file}', column '{name}' holds {found.dtype} where whole numbers were expected: get it again."
        )
    return found


def _frames(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]


def _left_out(path: Path, columns: Columns) -> list[tuple[str, str]]:
    features = _info(path).get("features") or {}
    videos = [name for name, about in features.items() if isinstance(about, dict) and about.get("dtype") == "video"]
    return [(name, "it is a video; only pictures within the Parquet files are read") for name in videos]


FORMAT = Format(
    "lerobot",
    _recognises,
    _read,
    Columns(
        observations=("observation.*",),
        actions=("action|action.*",),
        rewards=("next.reward|reward",),
        terminations=("next.done",),
        truncations=("next.truncated",),
        success=("next.success",),
    ),
    left_out=_left_out,
)
