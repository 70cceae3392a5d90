"""Logs for the fuzzer: files of each format that `eva_rl.convert` reads, and how they are converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

Episode = dict[str, np.ndarray]


def episodes() -> list[Episode]:
    """Three short episodes: observations (T, 3), actions (T, 2), rewards (T,)."""
    rng = np.random.default_rng(0)
    shapes = {"observations": (3,), "actions": (2,), "rewards": ()}
    return [{name: rng.normal(size=(length, *shape)) for name, shape in shapes.items()} for length in (5, 7, 6)]


def joined() -> Episode:
    """All steps in a row, with the number of each step's episode."""
    found = episodes()
    numbers = np.repeat(np.arange(len(found)), [len(episode["rewards"]) for episode in found])
    return {name: np.concatenate([episode[name] for episode in found]) for name in found[0]} | {"episode": numbers}


def make_npz(folder: Path) -> None:
    folder.mkdir()
    for number, episode in enumerate(episodes()):
        np.savez(folder / f"episode_{number}.npz", allow_pickle=False, **episode)


def make_csv(folder: Path) -> None:
    folder.mkdir()
    columns = joined()
    names = ["observations_0", "observations_1", "observations_2", "actions_0", "actions_1", "rewards", "episode"]
    table = np.column_stack([columns["observations"], columns["actions"], columns["rewards"], columns["episode"]])
    np.savetxt(folder / "log.csv", table, delimiter=",", header=",".join(names), comments="")


def make_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    columns = {name: list(values) if values.ndim > 1 else values for name, values in joined().items()}
    parquet.write_table(pyarrow.table(columns), folder / "log.parquet")


def make_robomimic(folder: Path) -> None:
    import h5py

    folder.mkdir()
    with h5py.File(folder / "demo.hdf5", "w") as file:
        for number, episode in enumerate(episodes()):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = len(episode["rewards"])
            for name, values in episode.items():
                demo.create_dataset("obs/state" if name == "observations" else name, data=values)


def make_d4rl(folder: Path) -> None:
    import h5py

    folder.mkdir()
    columns = joined()
    last = np.append(np.diff(columns.pop("episode")) != 0, True)
    with h5py.File(folder / "d4rl.hdf5", "w") as file:
        for name, values in (columns | {"terminals": last, "timeouts": ~last & False}).items():
            file.create_dataset(name, data=values)


def make_lerobot(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    found = episodes()
    features = {name: {"dtype": "float32", "shape": [n]} for name, n in (("observation.state", 3), ("action", 2))}
    info = {"codebase_version": "v2.1", "total_episodes": len(found), "features": features, "fps": 10}
    info["total_frames"] = sum(len(episode["rewards"]) for episode in found)
    (folder / "meta/info.json").write_text(json.dumps(info))
    for number, episode in enumerate(found):
        steps = np.arange(len(episode["rewards"]))
        columns = {
            "observation.state": list(episode["observations"]),
            "action": list(episode["actions"]),
            "next.reward": episode["rewards"],
            "frame_index": steps,
            "episode_index": np.full(len(steps), number),
        }
        parquet.write_table(pyarrow.table(columns), folder / f"data/chunk-000/episode_{number:06d}.parquet")


def use_logs(folder: Path) -> None:
    from eva_rl.convert.conversion import convert
    from eva_rl.convert.episodes import Columns
    from eva_rl.data import load_dataset
    from eva_rl.data.collection import datasets_root_at

    source = next(folder.glob("*.hdf5"), folder)
    tables = (folder / "log.csv").exists()
    columns = Columns(observations=("observations_*",), actions=("actions_*",)) if tables else None
    with TemporaryDirectory() as place, datasets_root_at(Path(place)):
        convert(str(source), "mine/logs-v0", columns=columns)
        load_dataset("mine/logs-v0", "mine")


MAKERS: dict[str, Callable[[Path], None]] = {
    "npz": make_npz,
    "csv": make_csv,
    "parquet": make_parquet,
    "robomimic": make_robomimic,
    "d4rl": make_d4rl,
    "lerobot": make_lerobot,
}
