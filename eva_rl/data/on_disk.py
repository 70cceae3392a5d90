"""Trajectories larger than memory: packed on disk once, episode by episode, and mapped from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from filelock import FileLock

from eva_rl.data.trajectories import Trajectories, checked, joined_up
from eva_rl.files import make_folder, replacing, write_arrays
from eva_rl.spaces import dtype_of, parts_of

COLUMNS = ("actions", "rewards", "returns_to_go", "labels")
"""What is kept of each step besides its observation. Labels are kept where the dataset has them."""


def pack_on_disk(
    folder: Path,
    stamp: Mapping[str, Any],
    task: str,
    episodes: Iterable[Mapping[str, Any]],
    observation_space: gym.Space,
    action_space: gym.Space,
) -> Trajectories:
    """As `pack`, with the observations in a file of `folder`.

    The folder is made unless it is there and has the same `stamp`. It appears whole or not at all. No more than one
    episode is in memory at a time.

    Raises:
        UserError: as in `pack`, or if the disk is full.
    """
    stamp = {"format": 1, **stamp}
    spaces = observation_space, action_space
    with suppress(FileNotFoundError):  # another run may be replacing it
        if _stamp_of(folder) == stamp:
            found = _mapped(folder, task, *spaces)
            if _stamp_of(folder) == stamp:  # all of one version
                return found
    lock = FileLock(make_folder(folder.parent) / f".{folder.name}.lock")
    with lock:  # one run packs, the others wait for it
        try:
            if _stamp_of(folder) != stamp:
                with replacing(folder) as temporary:
                    temporary.mkdir()
                    _write(temporary, checked(task, episodes, *spaces))
                    (temporary / "stamp.json").write_text(json.dumps(stamp, allow_nan=False))
            return _mapped(folder, task, *spaces)
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it makes another


def _stamp_of(folder: Path) -> Any:
    """What the packed dataset in this folder says it was made of, or None where it does not say."""
    try:
        return json.loads((folder / "stamp.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _mapped(folder: Path, task: str, observation_space: gym.Space, action_space: gym.Space) -> Trajectories:
    with np.load(folder / "columns.npz", allow_pickle=False) as arrays:
        joined = {name: arrays[name] for name in COLUMNS if name in arrays}
        columns = {
            "rewards": np.split(joined["rewards"], np.cumsum(arrays["lengths"])[:-1]),
            "success": [None if solved < 0 else np.array([solved]) for solved in arrays["solved"]],
        }
    parts = parts_of(observation_space)
    shape = (len(joined["rewards"]), sum(part.size for part in parts))
    # Copy on write: torch wants memory that it could write to.
    observations = np.memmap(folder / "observations.bin", dtype_of(parts), mode="c", shape=shape)
    return joined_up(task, {"observations": observations, **joined}, columns, observation_space, action_space)


def _write(folder: Path, episodes: Iterable[Mapping[str, Any]]) -> None:
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    solved = []  # -1: the dataset does not say
    with (folder / "observations.bin").open("wb") as file:
        for episode in episodes:
            file.write(np.ascontiguousarray(episode["observations"]).data)
            for name, parts in columns.items():
                parts.extend([episode[name]] if name in episode else [])
            solved.append(-1 if episode["success"] is None else int((episode["success"] > 0).any()))
    lengths = [len(part) for part in columns["rewards"]]
    joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    write_arrays(folder / "columns.npz", {"lengths": lengths, "solved": solved, **joined})
