"""Users' files -> Minari datasets: each format as its public description has it, and bad files named by file, episode and column."""

import io
import json
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest

from eva_rl.convert.conversion import convert
from eva_rl.convert.episodes import Columns
from eva_rl.data import load_dataset
from eva_rl.errors import UserError

parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow  # noqa: E402
from PIL import Image  # noqa: E402

LENGTHS = (5, 7, 6)


def an_episode(number: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "observations": rng.normal(size=(length, 3)).astype(np.float32),
        "actions": rng.normal(size=(length, 2)).astype(np.float32),
        "rewards": rng.normal(size=length),
    }


EPISODES = [an_episode(number, length) for number, length in enumerate(LENGTHS)]


def flat(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of one number a step."""
    names = {"observations": "obs", "actions": "act"}
    return {
        f"{names[k]}_{i}" if v.ndim == 2 else "reward": v[:, i] if v.ndim == 2 else v
        for k, v in values.items()
        for i in range(v.shape[1] if v.ndim == 2 else 1)
    }


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(repr(float(cell)) for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def in_files(folder: Path, kind: str) -> None:
    """A file an episode."""
    folder.mkdir()
    for number, episode in enumerate(EPISODES, 8):  # so that 10 comes after 9
        path = folder / f"episode_{number}{kind}"
        if kind == ".npz":
            np.savez(path, **episode)
        elif kind == ".csv":
            write_csv(path, flat(episode))
        elif kind == ".parquet":
            columns = {k: list(v) if v.ndim > 1 else v for k, v in episode.items()}
            parquet.write_table(pyarrow.table(columns), path)
        elif kind == ".npy":
            columns = flat(episode)
            table = np.zeros(len(episode["rewards"]), [(name, "f8") for name in columns])
            for name, values in columns.items():
                table[name] = values
            np.save(path, table)
        else:
            path.mkdir()
            for name, values in episode.items():
                np.save(path / f"{name}.npy", values)


def in_one_file(folder: Path, kind: str) -> None:
    """All episodes in one file, with a column that tells them apart."""
    folder.mkdir()
    columns = {k: np.concatenate([flat(e)[k] for e in EPISODES]) for k in flat(EPISODES[0])}
    columns["episode"] = np.repeat(range(len(LENGTHS)), LENGTHS)
    if kind == ".csv":
        write_csv(folder / "log.csv", columns)
    else:
        parquet.write_table(pyarrow.table(columns), folder / "log.parquet")


def in_robomimic(path: Path, episodes=EPISODES, **changes) -> None:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_type": 1, "env_kwargs": {}})
        for number, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = len(episode["actions"])
            seen = episode["observations"]
            fields = {
                "actions": episode["actions"].astype(np.float64),
                "rewards": episode["rewards"],
                "dones": np.arange(len(seen)) >= len(seen) - 2,
                "states": np.zeros((len(seen), 9)),
                "obs/eef_pos": seen[:, :2],
                "obs/gripper": seen[:, 2:],
                "next_obs/eef_pos": np.concatenate([seen[1:, :2], [[8.0, 9.0]]]),
                "next_obs/gripper": np.concatenate([seen[1:, 2:], [[7.0]]]),
            } | changes
            for name, values in fields.items():
                if values is not None:
                    demo.create_dataset(name, data=values)
        file.create_group("mask").create_dataset("train", data=[b"demo_0"])


def in_d4rl(path: Path, timeouts: bool = True, rest: int = 0) -> None:
    with h5py.File(path, "w") as file:
        joined = {k: np.concatenate([e[k] for e in EPISODES] + [EPISODES[0][k][:rest]]) for k in EPISODES[0]}
        ends = np.zeros(sum(LENGTHS) + rest, bool)
        ends[np.cumsum(LENGTHS) - 1] = True
        joined["terminals"] = ends & (np.arange(len(ends)) > LENGTHS[0]) if timeouts else ends
        if timeouts:
            joined["timeouts"] = ends & ~joined["terminals"]
        joined["infos/qpos"] = np.zeros((len(ends), 4))
        for name, values in joined.items():
            file.create_dataset(name, data=values)


def in_lerobot(folder: Path, version: str, episodes=EPISODES) -> None:
    (folder / "meta").mkdir(parents=True)
    total = sum(len(e["rewards"]) for e in episodes)
    info = {"codebase_version": version, "total_episodes": len(episodes), "total_frames": total, "fps": 10}
    info["features"] = {
        "observation.state": {"dtype": "float32", "shape": [3]},
        "observation.images.top": {"dtype": "video", "shape": [3, 96, 96]},
        "action": {"dtype": "float32", "shape": [2]},
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    tables, first = [], 0
    for number, episode in enumerate(episodes):
        length = len(episode["rewards"])
        columns = {
            "observation.state": pyarrow.array(list(episode["observations"])),
            "action": pyarrow.array(list(episode["actions"])),
            "next.reward": episode["rewards"],
            "next.done": np.arange(length) == length - 1,
            "timestamp": np.arange(length) / 10,
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(first, first + length),
            "task_index": np.zeros(length, np.int64),
        }
        tables.append(pyarrow.table(columns))
        first += length
    if version.startswith("v2"):
        files = {f"episode_{number:06d}.parquet": table for number, table in enumerate(tables)}
    else:
        files = {"file-000.parquet": pyarrow.concat_tables(tables[:2]), "file-001.parquet": tables[2]}
    (folder / "data/chunk-000").mkdir(parents=True)
    for name, table in files.items():
        parquet.write_table(table, folder / "data/chunk-000" / name)


SOURCES = {
    "npz": lambda path: in_files(path, ".npz"),
    "npy": lambda path: in_files(path, ".npy"),
    "folders": lambda path: in_files(path, ""),
    "csv": lambda path: in_files(path, ".csv"),
    "parquet": lambda path: in_files(path, ".parquet"),
    "csv-column": lambda path: in_one_file(path, ".csv"),
    "parquet-column": lambda path: in_one_file(path, ".parquet"),
    "robomimic.hdf5": in_robomimic,
    "d4rl.hdf5": in_d4rl,
    "lerobot-2": lambda path: in_lerobot(path, "v2.1"),
    "lerobot-3": lambda path: in_lerobot(path, "v3.0"),
}
DEFAULTS = {"observations": ("observations|obs_*",), "actions": ("actions|act_*",)}
"""What tables name otherwise than by default."""


def columns_for(name: str) -> Columns | None:
    return None if "." in name or "lerobot" in name else Columns(**DEFAULTS)


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_gives_the_episodes_that_were_written(tmp_path, name):
    SOURCES[name](tmp_path / name)
    found = convert(str(tmp_path / name), "mine/logs-v0", columns=columns_for(name))
    assert found.summary.lengths == list(LENGTHS)
    trajectories = load_dataset("mine/logs-v0", "mine")
    for kept, key in ((trajectories.observations, "observations"), (trajectories.actions, "actions")):
        np.testing.assert_allclose(kept, np.concatenate([e[key] for e in EPISODES]), rtol=1e-6)
    np.testing.assert_allclose(trajectories.episode_returns, [e["rewards"].sum() for e in EPISODES], rtol=1e-5)
    for episode, length in zip(minari.load_dataset("mine/logs-v0").iterate_episodes(), LENGTHS, strict=True):
        assert (episode.terminations | episode.truncations).tolist() == [False] * (length - 1) + [True]


@pytest.mark.parametrize(
    ("name", "terminated"),
    [
        ("npz", [False] * 3),
        ("d4rl.hdf5", [False, True, True]),
        ("robomimic.hdf5", [True] * 3),
        ("lerobot-3", [True] * 3),
    ],
)
def test_an_episode_is_terminated_where_the_files_say_so_and_truncated_otherwise(tmp_path, name, terminated):
    SOURCES[name](tmp_path / name)
    convert(str(tmp_path / name), "mine/logs-v0")
    assert [bool(e.terminations[-1]) for e in minari.load_dataset("mine/logs-v0").iterate_episodes()] == terminated


@pytest.mark.parametrize("kind", [".csv", ".npz", ".parquet"])
def test_columns_are_joined_in_the_order_of_the_first_file(tmp_path, kind):
    columns = {"obs_x": [1.0, 2.0], "obs_y": [3.0, 4.0], "act_x": [0.1, 0.2], "act_y": [0.3, 0.4]}
    swapped = {name: columns[name] for name in ("act_y", "obs_y", "act_x", "obs_x")}
    for name, values in (("a", columns), ("b", swapped)):
        arrays = {k: np.array(v) for k, v in values.items()}
        if kind == ".csv":
            write_csv(tmp_path / f"{name}.csv", arrays)
        elif kind == ".npz":
            np.savez(tmp_path / f"{name}.npz", **arrays)
        else:
            parquet.write_table(pyarrow.table(arrays), tmp_path / f"{name}.parquet")
    convert(str(tmp_path), "mine/a-v0")
    kept = load_dataset("mine/a-v0", "mine")
    np.testing.assert_allclose(kept.observations, [[1, 3], [2, 4]] * 2)
    np.testing.assert_allclose(kept.actions, [[0.1, 0.3], [0.2, 0.4]] * 2)


def test_the_files_of_an_episodes_folder_are_taken_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "logs/0").mkdir(parents=True)
    for number in range(11):
        np.save(tmp_path / f"logs/0/obs_{number}.npy", np.full(3, float(number)))
    np.save(tmp_path / "logs/0/actions.npy", np.zeros((3, 1)))
    convert(str(tmp_path / "logs"), "mine/a-v0")
    assert load_dataset("mine/a-v0", "mine").observations[0].tolist() == list(range(11))


def test_what_followed_the_last_action_is_kept_where_the_files_hold_it(tmp_path):
    in_robomimic(tmp_path / "demo.hdf5")
    convert(str(tmp_path / "demo.hdf5"), "mine/logs-v0")
    [first, *_] = minari.load_dataset("mine/logs-v0").iterate_episodes()
    assert first.observations["eef_pos"][-1].tolist() == [8.0, 9.0]
    assert first.observations["gripper"][-1].tolist() == [7.0]


def test_a_raw_robosuite_recording_gives_its_states(tmp_path):
    gone = dict.fromkeys(("obs/eef_pos", "obs/gripper", "next_obs/eef_pos", "next_obs/gripper", "rewards", "dones"))
    in_robomimic(tmp_path / "demo.hdf5", **gone)
    found = convert(str(tmp_path / "demo.hdf5"), "mine/logs-v0")
    assert found.observation_space.shape == (9,)
    assert not found.summary.rewards
    assert load_dataset("mine/logs-v0", "mine").returns_to_go.abs().max() == 0


def test_an_array_beside_the_demonstrations_of_robomimic_does_not_matter(tmp_path):
    in_robomimic(tmp_path / "demo.hdf5")
    with h5py.File(tmp_path / "demo.hdf5", "a") as file:
        file["data/a_mean"] = np.zeros(3)  # before demo_0
    found = convert(str(tmp_path / "demo.hdf5"), "mine/logs-v0")
    assert found.summary.lengths == list(LENGTHS)
    assert found.left_out[0][0] == "states"


def test_columns_that_would_be_called_the_same_are_refused(tmp_path):
    in_robomimic(
        tmp_path / "d.hdf5", **{"obs/a/b": np.zeros((5, 2)), "obs/a.b": np.ones((5, 2))}, episodes=EPISODES[:1]
    )
    with pytest.raises(UserError, match=r"Columns 'obs/a.b' and 'obs/a/b' would both be called 'a.b'"):
        convert(str(tmp_path / "d.hdf5"), "mine/logs-v0")


def test_steps_after_the_last_end_are_left_out_and_said(tmp_path):
    in_d4rl(tmp_path / "d4rl.hdf5", rest=2)
    found = convert(str(tmp_path / "d4rl.hdf5"), "mine/logs-v0")
    assert found.summary.lengths == list(LENGTHS)
    assert found.left_out == [("the last 2 steps", "their episode has no end")]


def test_blanks_in_the_first_line_of_a_csv_file_are_no_part_of_the_names(tmp_path):
    (tmp_path / "a.csv").write_text("act, obs_x , obs_y, reward\n1, 2, 3, 4\n")
    found = convert(str(tmp_path / "a.csv"), "mine/a-v0")
    assert list(found.summary.columns) == ["obs_x", "obs_y", "act"]
    assert found.summary.returns == [4.0]
    (tmp_path / "a.csv").write_text("act, act\n1, 2\n")
    with pytest.raises(UserError, match="has no first line of names that differ"):
        convert(str(tmp_path / "a.csv"), "mine/b-v0")


def test_endings_in_capitals_are_read_and_folders_within_are_said_to_be_left_out(tmp_path):
    (tmp_path / "logs/more").mkdir(parents=True)
    for name in ("a.csv", "B.CSV", "more/c.csv"):
        (tmp_path / "logs" / name).write_text("obs,act\n1,2\n")
    found = convert(str(tmp_path / "logs"), "mine/a-v0")
    assert found.summary.lengths == [1, 1]
    assert [what for what, _ in found.left_out] == ["more/"]
    in_robomimic(tmp_path / "D.HDF5")
    assert convert(str(tmp_path / "D.HDF5"), "mine/b-v0").kind == "robomimic"


def test_a_column_is_not_taken_for_both_observations_and_actions(tmp_path):
    (tmp_path / "a.csv").write_text("q_1,q_2\n1,2\n3,4\n")
    with pytest.raises(UserError, match="column 'q_2' is taken for both observations and actions: name others"):
        convert(str(tmp_path / "a.csv"), "mine/a-v0", columns=Columns(observations=("q_*",), actions=("q_2",)))


def test_a_lerobot_folder_whose_features_have_no_names_is_refused(tmp_path):
    in_lerobot(tmp_path / "l", "v2.1")
    file = tmp_path / "l/meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"features": ["action"]}))
    with pytest.raises(UserError, match=r"meta/info.json has no names below 'features'"):
        convert(str(tmp_path / "l"), "mine/logs-v0")


def test_an_empty_list_takes_no_column_where_the_format_would(run, tmp_path):
    (tmp_path / "a.csv").write_text("obs,act,done,episode\n1,1,0,0\n2,2,1,0\n3,3,1,1\n")
    with pytest.raises(UserError, match=r"column 'done' says that it ends at step 1 of 3.* columns.terminations=\[\]"):
        convert(str(tmp_path / "a.csv"), "mine/a-v0", columns=Columns(episode=()))
    none = ["columns.terminations=[]", "columns.episode=[]"]
    status, _, err = run("convert.__main__", "source=a.csv", "dataset=mine/a-v0", *none)
    assert status == 0, err
    [episode] = minari.load_dataset("mine/a-v0").iterate_episodes()
    assert episode.terminations.tolist() == [False] * 3
    (tmp_path / "none.yaml").write_text("terminations: []\nepisode: []\n")
    status, _, err = run("convert.__main__", "source=a.csv", "dataset=mine/b-v0", "mapping=none.yaml")
    assert status == 0, err


MERGED = {
    "a name that is not there": ("run,obs,act\n0,1,1\n1,2,2\n", ("rum",), "has no column 'rum', which columns.episode names: it has 'run'"),
    "one of two not there": ("run,obs,act\n0,1,1\n1,2,2\n", ("run", "trial"), "has no column 'trial', which columns.episode names"),
    "a number that comes back": ("episode,obs,act\n0,1,1\n1,2,2\n0,3,3\n", None, "episode 0 comes back at row 2"),
    "an empty cell": ("episode,obs,act\n0,1,1\n,2,2\n", None, "column 'episode' is empty in row 1"),
    "an empty name": ("episode,obs,act\na,1,1\n,2,2\n", None, "column 'episode' is empty in row 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_rows_are_not_merged_to_an_episode_where_nothing_says_that_they_are_one(tmp_path, name):
    text, episode, sentence = MERGED[name]
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as raised:
        convert(str(tmp_path / "a.csv"), "mine/a-v0", columns=Columns(episode=episode))
    assert f"{tmp_path / 'a.csv'}" in str(raised.value)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("name", ["robomimic.hdf5", "d4rl.hdf5", "lerobot-2"])
def test_a_column_for_episodes_is_refused_where_the_format_tells_them_apart(tmp_path, name):
    SOURCES[name](tmp_path / name)
    with pytest.raises(UserError, match=r"columns.episode was given, but .* tell episodes apart themselves"):
        convert(str(tmp_path / name), "mine/a-v0", columns=Columns(episode=("actions",)))


def test_several_columns_tell_episodes_apart_together(tmp_path):
    (tmp_path / "a.csv").write_text("day,trial,obs,act\n0,a,1,1\n0,a,2,2\n0,b,3,3\n1,a,4,4\n1,a,5,x\n")
    keys = Columns(episode=("day", "trial"))
    with pytest.raises(UserError, match="episode 1/a, column 'act' holds 'x'"):
        convert(str(tmp_path / "a.csv"), "mine/a-v0", columns=keys)
    assert convert(str(tmp_path / "a.csv"), "mine/a-v0", columns=keys, skip_bad=True).summary.lengths == [2, 1]


ORDINARY = {
    "a number for all of the file": ({"episode": 3}, [5]),
    "a name for all of the file": ({"episode": "b"}, [5]),
    "a number, and what followed": ({"episode": 3, "observations": np.ones((6, 3))}, [5]),
    "a column of rows": ({"episode": np.array([[0], [0], [1], [1], [1]])}, [2, 3]),
    "another number beside it": ({"episode": np.array([0, 0, 1, 1, 1]), "fps": 30}, [2, 3]),
    "another array beside it": ({"episode": np.array([0, 0, 1, 1, 1]), "names": np.array(["a", "b"])}, [2, 3]),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_else_an_ordinary_log_holds_does_not_matter(tmp_path, name):
    more, lengths = ORDINARY[name]
    np.savez(tmp_path / "a.npz", **EPISODES[0] | more)
    assert convert(str(tmp_path / "a.npz"), "mine/a-v0").summary.lengths == lengths


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"rewards": np.ones(4)}, "column 'rewards' has 4 rows where 5 were expected, for several episodes"),
        ({"success": True}, "column 'success' has no rows where 5"),
        ({"episode": np.zeros((5, 2))}, r"column 'episode' has rows of shape \(2,\) where one number"),
    ],
)
def test_what_can_not_be_shared_out_to_a_files_episodes_is_refused(tmp_path, more, sentence):
    np.savez(tmp_path / "a.npz", **EPISODES[0] | {"episode": np.array([0, 0, 1, 1, 1])} | more)
    with pytest.raises(UserError, match=f"a.npz', {sentence}"):
        convert(str(tmp_path / "a.npz"), "mine/a-v0")


def png(picture: np.ndarray) -> dict:
    """As Hugging Face's datasets keep it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_pictures_in_parquet_are_kept_bit_for_bit_and_videos_are_said_to_be_left_out(tmp_path):
    shown = np.random.default_rng(0).integers(256, size=(4, 40, 48, 3), dtype=np.uint8)
    episode = {
        "rewards": np.ones(4),
        "actions": np.zeros((4, 2), np.float32),
        "observations": np.zeros((4, 3), np.float32),
    }
    in_lerobot(tmp_path / "l", "v2.0", [episode])
    [file] = (tmp_path / "l/data").rglob("*.parquet")
    table = parquet.read_table(file).append_column("observation.image", pyarrow.array([png(p) for p in shown]))
    parquet.write_table(table, file)
    found = convert(str(tmp_path / "l"), "mine/logs-v0")
    assert found.left_out[0][0] == "observation.images.top"
    [kept] = minari.load_dataset("mine/logs-v0").iterate_episodes()
    np.testing.assert_array_equal(kept.observations["image"][:-1], shown)
    assert load_dataset("mine/logs-v0", "mine").observations.shape == (4, 40 * 48 * 3 + 3)


def test_pictures_in_tables_of_parquet_are_kept_bit_for_bit(tmp_path):
    shown = np.random.default_rng(0).integers(256, size=(5, 40, 48, 3), dtype=np.uint8)
    columns = {"observation.image": [png(p) for p in shown], "action": [[0.1, 0.2]] * 5, "episode": [0, 0, 1, 1, 1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    convert(str(tmp_path / "a.parquet"), "mine/a-v0")
    kept = [episode.observations[:-1] for episode in minari.load_dataset("mine/a-v0").iterate_episodes()]
    np.testing.assert_array_equal(np.concatenate(kept), shown)
    columns["observation.image"][3]["bytes"] = b"no picture"
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"episode 1, column 'observation.image' holds no picture .* at step 1"):
        convert(str(tmp_path / "a.parquet"), "mine/b-v0")


def test_pictures_of_a_palette_are_kept_in_their_colours(tmp_path):
    shown = np.zeros((40, 48, 3), np.uint8)
    shown[:, 24:] = 200, 100, 50
    buffer = io.BytesIO()
    Image.fromarray(shown).quantize(2).save(buffer, "PNG")
    columns = {"obs": [{"bytes": buffer.getvalue(), "path": None}] * 2, "act": [0.1, 0.2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    convert(str(tmp_path / "a.parquet"), "mine/a-v0")
    [kept] = minari.load_dataset("mine/a-v0").iterate_episodes()
    np.testing.assert_array_equal(kept.observations[0], shown)


def test_a_long_cell_is_said_in_part(tmp_path):
    (tmp_path / "a.csv").write_text(f"obs,act\n1,2\n3,{'left ' * 1000}\n")
    with pytest.raises(UserError, match=r"holds 'left .*\.\.\.' where numbers") as raised:
        convert(str(tmp_path / "a.csv"), "mine/a-v0")
    assert len(str(raised.value)) < 120 + len(str(tmp_path))


def test_whole_numbers_in_one_column_are_choices(tmp_path):
    (tmp_path / "a.csv").write_text("x,action,done\n1.5,0,0\n2.5,2,0\n3.5,1,1\n")
    found = convert(str(tmp_path / "a.csv"), "mine/a-v0", columns=Columns(observations=("x",)))
    assert found.action_space == gym.spaces.Discrete(3)
    assert load_dataset("mine/a-v0", "mine").actions.tolist() == [0, 2, 1]
    found = convert(str(tmp_path / "a.csv"), "mine/a-v1", columns=Columns(observations=("x",)), actions="continuous")
    assert found.action_space == gym.spaces.Box(-np.inf, np.inf, (1,))


def test_an_environment_gives_the_spaces_and_is_named_in_the_dataset(tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.zeros((5, 3)), actions=np.ones((5, 1)), rewards=np.ones(5))
    convert(str(tmp_path / "a.npz"), "mine/a-v0", environment="Pendulum-v1")
    dataset = minari.load_dataset("mine/a-v0")
    assert dataset.env_spec.id == "Pendulum-v1"
    assert dataset.action_space == gym.spaces.Box(-2.0, 2.0, (1,))
    with pytest.raises(UserError, match=r"a.npz' has observations of 3 numbers \(observations\) where Box"):
        convert(str(tmp_path / "a.npz"), "mine/b-v0", environment="CartPole-v1")


def test_an_environment_that_no_dataset_can_state_is_refused_before_anything_is_written(
    tmp_path, datasets_root, monkeypatch
):
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("ByClass-v0", entry_point=type(gym.make("Pendulum-v1").unwrapped), max_episode_steps=200)
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 3)), actions=np.zeros((3, 1)))
    with pytest.raises(UserError, match="environment=ByClass-v0 is registered in a way that no dataset can state"):
        convert(str(tmp_path / "a.npz"), "mine/a-v0", environment="ByClass-v0")
    assert not any(datasets_root.rglob("mine"))


@pytest.mark.parametrize(
    ("environment", "size", "actions", "sentence"),
    [
        ("CartPole-v1", 4, [0, 0.2, 1], "such as 0.2 where Discrete"),
        ("CartPole-v1", 4, [0, 1e30, 1], "takes whole numbers"),
        ("CartPole-v1", 4, [0, 2, 1], "outside Discrete"),
        ("Pendulum-v1", 3, [[0.0], [3.0], [-9.0]], r"such as 3 outside Box\(-2.0, 2.0"),
    ],
)
def test_actions_that_the_environment_does_not_take_are_refused(tmp_path, environment, size, actions, sentence):
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, size)), actions=np.array(actions))
    with pytest.raises(UserError, match=rf"a.npz' has actions \(actions\).* {sentence}"):
        convert(str(tmp_path / "a.npz"), "mine/a-v0", environment=environment)


def test_actions_that_rounding_put_beyond_the_bounds_are_on_them(tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 3)), actions=np.array([[2.0000004], [0.5], [-2]]))
    convert(str(tmp_path / "a.npz"), "mine/a-v0", environment="Pendulum-v1")
    assert load_dataset("mine/a-v0", "mine").actions.tolist() == [[2.0], [0.5], [-2.0]]


class Grids(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2, 3), np.float32)


def test_episodes_stacked_in_one_array_are_no_steps_unless_the_environment_acts_in_that_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("Grids-v0", f"{__name__}:Grids")
    np.savez(tmp_path / "a.npz", observations=np.zeros((4, 6, 2)), actions=np.zeros((4, 6, 1)))
    for environment in (None, "Grids-v0"):  # of 6 numbers too
        with pytest.raises(UserError, match=r"Column 'actions' has an action of shape \(6, 1\).* along axis 0"):
            convert(str(tmp_path / "a.npz"), "mine/a-v0", environment=environment)
    np.savez(tmp_path / "a.npz", observations=np.zeros((4, 3)), actions=np.zeros((4, 2, 3)))
    assert convert(str(tmp_path / "a.npz"), "mine/a-v0", environment="Grids-v0").summary.lengths == [4]


class Pictures(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)


def test_pictures_in_other_units_than_the_environments_are_refused(tmp_path):
    gym.register("Pictures-v0", f"{__name__}:Pictures")
    try:
        for scale, dtype in ((1, np.float32), (400, np.int64)):
            shown = (np.random.default_rng(0).random((3, 40, 40, 3)) * scale).astype(dtype)
            np.savez(tmp_path / "a.npz", observations=shown, actions=np.array([0, 1, 1]))
            with pytest.raises(UserError, match=r"has observations .* takes whole numbers of uint8"):
                convert(str(tmp_path / "a.npz"), "mine/a-v0", environment="Pictures-v0")
    finally:
        del gym.registry["Pictures-v0"]


BAD = {
    "a length of its own": ({"rewards": np.ones(4)}, "column 'rewards' has 4 rows where 5 were expected"),
    "more observations": ({"observations": np.ones((7, 3))}, "column 'observations' has 7 rows where 5 or 6"),
    "no actions": ({"actions": None}, "has no column for actions"),
    "other shapes": ({"observations": np.ones((5, 4))}, "column 'observations' has rows of shape (4,) where the episodes before have (3,)"),
    "NaN": ({"observations": np.full((5, 3), np.nan)}, "column 'observations' holds NaN or infinite numbers (at step 0)"),
    "infinite": ({"rewards": np.array([0, 0, np.inf, 0, 0])}, "column 'rewards' holds NaN or infinite numbers (at step 2)"),
    "text": ({"actions": np.array([["1", "2"]] * 4 + [["3", "left"]])}, "column 'actions' holds 'left' where numbers"),
    "empty": ({"actions": np.ones((0, 2))}, "column 'actions' is empty"),
    "no rewards": ({"rewards": None}, "has other columns than the episodes before ('rewards')"),
    "rows of rewards": ({"rewards": np.ones((5, 2))}, "column 'rewards' has rows of shape (2,) where one number was expected"),
    "rows of success": ({"success": np.ones((5, 2))}, "column 'success' has rows of shape (2,) where one number was expected"),
    "success in words": ({"success": "yes"}, "column 'success' holds 'yes' where numbers were expected"),
    "no number for success": ({"success": np.nan}, "column 'success' holds NaN"),
    "ends inside": ({"dones": np.arange(5) == 1}, "column 'dones' says that it ends at step 1 of 5"),
}  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_an_episode_of_which_nobody_says_whether_it_succeeded_is_not_counted_as_failed(tmp_path, first):
    for number in (0, 1):
        np.savez(tmp_path / f"{number}.npz", **EPISODES[0] | ({"success": True} if first == (number == 0) else {}))
    with pytest.raises(
        UserError,
        match=r"1.npz' has other columns than the episodes before \('success'\).* or none, columns.success=\[\]",
    ):
        convert(str(tmp_path), "mine/logs-v0")
    convert(str(tmp_path), "mine/logs-v0", skip_bad=True)
    assert len(load_dataset("mine/logs-v0", "mine").successful().lengths) == 1
    convert(str(tmp_path), "mine/b-v0", columns=Columns(success=()))
    assert len(load_dataset("mine/b-v0", "mine").successful().lengths) == 2  # where none say, all are learned from


@pytest.mark.parametrize("name", BAD)
def test_a_bad_episode_is_named_by_file_and_column_and_nothing_is_written(tmp_path, datasets_root, name):
    changes, sentence = BAD[name]
    (tmp_path / "logs").mkdir()
    np.savez(tmp_path / "logs/0.npz", **EPISODES[0])
    np.savez(tmp_path / "logs/1.npz", **{k: v for k, v in (EPISODES[0] | changes).items() if v is not None})
    with pytest.raises(UserError) as raised:
        convert(str(tmp_path / "logs"), "mine/logs-v0")
    assert sentence in str(raised.value)
    assert str(tmp_path / "logs/1.npz") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not [path for path in datasets_root.rglob("*") if path.is_file()]
    found = convert(str(tmp_path / "logs"), "mine/logs-v0", skip_bad=True)
    assert found.summary.lengths == [5]
    assert sentence.partition("(")[0] in found.left_out[0][1]


def test_where_every_episode_is_bad_the_reason_is_said_and_to_leave_all_out_is_not_advised(tmp_path):
    SOURCES["npz"](tmp_path / "npz")
    meant = Columns(observations=("pos_*",))
    with pytest.raises(UserError, match=r"has no column 'pos_\*'.*it has 'observations'") as raised:
        convert(str(tmp_path / "npz"), "mine/logs-v0", columns=meant)
    assert "skip_bad" not in str(raised.value)
    with pytest.raises(UserError, match=r"no episode that can be used; the first, '.*npz': has no column 'pos_\*'"):
        convert(str(tmp_path / "npz"), "mine/logs-v0", columns=meant, skip_bad=True)


@pytest.mark.parametrize("bad", [0, 1])
def test_to_leave_an_episode_out_is_advised_where_others_can_be_used(tmp_path, bad):
    for number in (0, 1):
        np.savez(tmp_path / f"{number}.npz", **EPISODES[0] | ({"rewards": np.ones(4)} if number == bad else {}))
    with pytest.raises(UserError, match=rf"{bad}.npz', column 'rewards' has 4 rows .*skip_bad=true leaves such"):
        convert(str(tmp_path), "mine/logs-v0")


def test_a_bad_episode_within_a_file_is_named(tmp_path):
    in_robomimic(tmp_path / "d.hdf5", [EPISODES[0], EPISODES[1] | {"rewards": np.full(7, np.nan)}])
    with pytest.raises(UserError, match=r"d.hdf5', episode demo_1, column 'rewards' holds NaN"):
        convert(str(tmp_path / "d.hdf5"), "mine/logs-v0")
    (tmp_path / "a.csv").write_text("episode,obs,action\n0,1,1\n0,2,0\n1,1,x\n")
    with pytest.raises(UserError, match=r"a.csv', episode 1, column 'action' holds 'x'"):
        convert(str(tmp_path / "a.csv"), "mine/logs-v0")


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8])
def test_truncated_files_are_named_and_nothing_is_written(tmp_path, datasets_root, name, keep):
    if "csv" in name and keep:
        pytest.skip("half a table is a table")
    SOURCES[name](tmp_path / name)
    files = [tmp_path / name] if (tmp_path / name).is_file() else sorted((tmp_path / name).rglob("*.*"))
    file = [path for path in files if path.is_file() and path.suffix != ".json"][-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(UserError) as raised:
        convert(str(tmp_path / name), "mine/logs-v0", columns=columns_for(name))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not [path for path in datasets_root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", SOURCES)
def test_files_with_broken_bytes_are_converted_or_refused_in_one_sentence(tmp_path, name):
    SOURCES[name](tmp_path / name)
    files = sorted(path for path in (tmp_path / name, *(tmp_path / name).rglob("*")) if path.is_file())
    rng = np.random.default_rng(0)
    for _ in range(12):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        broken = np.frombuffer(whole, np.uint8).copy()
        broken[rng.integers(len(whole), size=20)] = rng.integers(256, size=20)
        file.write_bytes(broken.tobytes())
        said = str(tmp_path)
        try:
            convert(str(tmp_path / name), "mine/logs-v0", columns=columns_for(name), skip_bad=True, overwrite=True)
        except UserError as error:
            said = str(error)
        assert str(tmp_path) in said
        assert "\n" not in said
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["npz", "npy", "folders", "parquet", "lerobot-2", "lerobot-3"])
def test_a_file_that_can_not_be_read_is_left_out_where_bad_episodes_are(tmp_path, name):
    SOURCES[name](tmp_path / name)
    file = sorted(path for path in (tmp_path / name).rglob("*.*") if path.is_file() and path.suffix != ".json")[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="skip_bad=true leaves such episodes out"):
        convert(str(tmp_path / name), "mine/logs-v0")
    found = convert(str(tmp_path / name), "mine/logs-v0", skip_bad=True)
    assert len(load_dataset("mine/logs-v0", "mine").lengths) == len(found.summary.lengths) == 2
    assert str(file if name != "folders" else file.parent) in found.left_out[-1][0]
    assert "can't be read" in found.left_out[-1][1]


def test_a_damaged_demonstration_within_a_file_is_left_out_where_bad_episodes_are(tmp_path):
    in_robomimic(tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        del file["data/demo_1/actions"]
        where = file["data/demo_1"].create_dataset("actions", data=np.ones((7, 2)), chunks=(7, 2), compression="gzip")
        start = where.id.get_chunk_info(0).byte_offset
    with (tmp_path / "d.hdf5").open("r+b") as raw:
        raw.seek(start)
        raw.write(bytes(8))
    found = convert(str(tmp_path / "d.hdf5"), "mine/logs-v0", skip_bad=True)
    assert found.summary.lengths == [5, 6]
    assert found.left_out[-1][0].endswith("episode demo_1")


def test_a_broken_line_is_named_by_its_number_in_the_file_and_its_episode_left_out(tmp_path):
    (tmp_path / "0.csv").write_text("obs,act\n1,2\n")
    (tmp_path / "1.csv").write_text("obs,act\n1,2\n\n\n3")
    with pytest.raises(UserError, match=r"1.csv', line 5 has 1 cells where 2 were expected"):
        convert(str(tmp_path), "mine/logs-v0")
    found = convert(str(tmp_path), "mine/logs-v0", skip_bad=True)
    assert found.summary.lengths == [1]
    assert found.left_out == [(f"'{tmp_path / '1.csv'}'", "line 5 has 1 cells where 2 were expected.")]


def test_what_a_skipped_episode_holds_does_not_count_for_the_spaces(tmp_path):
    same = {"observations": np.zeros((2, 3))}
    np.savez(tmp_path / "0.npz", **same, act_a=np.array([0, 1]), act_b=np.array([1, 0]))
    np.savez(tmp_path / "1.npz", **same, act_a=np.array([0.5, 9]), act_b=np.ones((2, 2)))
    found = convert(str(tmp_path), "mine/logs-v0", skip_bad=True, actions="discrete")
    assert found.action_space == gym.spaces.MultiDiscrete([2, 2])


def test_pickled_arrays_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.array([{"x": 1}] * 3, object), actions=np.ones((3, 1)))
    with pytest.raises(UserError, match=r"a.npz' can't be read .*save it without pickle"):
        convert(str(tmp_path / "a.npz"), "mine/a-v0")


def test_a_lerobot_folder_that_lacks_an_episode_is_refused(tmp_path):
    in_lerobot(tmp_path / "l", "v2.1")
    (tmp_path / "l/data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(UserError, match=r"states total_episodes=3 in meta/info.json, but its files hold 2"):
        convert(str(tmp_path / "l"), "mine/logs-v0")


def test_an_episode_of_a_million_steps_is_converted(tmp_path):
    steps = 10**6
    np.savez(tmp_path / "a.npz", observations=np.zeros((steps, 1), np.float32), actions=np.zeros(steps, np.int64))
    assert convert(str(tmp_path / "a.npz"), "mine/a-v0").summary.lengths == [steps]
    assert len(load_dataset("mine/a-v0", "mine").rewards) == steps


@pytest.mark.parametrize(
    "dataset_id", ["logs", "mine/logs", "mine/lögs v0", "../mine/logs-v0", "/tmp/logs-v0", "a/logs-v0"]
)
def test_an_id_that_minari_would_not_find_again_is_refused(tmp_path, dataset_id):
    SOURCES["npz"](tmp_path / "npz")
    with pytest.raises(UserError, match="must be an id such as mine/name-v0"):
        convert(str(tmp_path / "npz"), dataset_id)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_datasets_is_never_written_over(make_dataset, datasets_root, tmp_path, overwrite):
    SOURCES["npz"](tmp_path / "npz")
    make_dataset("mine/hammer-v3/expert-v0")
    (datasets_root / "mine/notes-v0").mkdir()
    for dataset_id, why in (
        ("mine/hammer-v3", "holds other datasets, such as mine/hammer-v3/expert-v0"),
        ("mine/notes-v0", "is no dataset"),
    ):
        with pytest.raises(UserError, match=why) as raised:
            convert(str(tmp_path / "npz"), dataset_id, overwrite=overwrite)
        assert "overwrite" not in str(raised.value)
    assert len(load_dataset("mine/hammer-v3/expert-v0", "mine").lengths) == 4


def test_the_command_shows_what_it_found_and_refuses_to_write_twice(run, tmp_path, base):
    in_files(tmp_path / "logs", ".csv")
    columns = ["columns.observations=[obs_*]", "columns.actions=[act_0,act_1]"]
    status, out, err = run("convert.__main__", "source=logs", "dataset=mine/logs-v0", *columns)
    assert status == 0, err
    for part in ("| observations | obs_0", "| episodes", "| 3", "5, 6, 7", "returns", "task=minari/mine/logs-v0"):
        assert part in out
    status, _, err = run("convert.__main__", "source=logs", "dataset=mine/logs-v0", *columns)
    assert status == 1
    assert "overwrite=true" in err
    (tmp_path / "names.yaml").write_text("observations: [obs_0, obs_1]\nactions: act_*\nrewards: reward\n")
    again = ["mapping=names.yaml", "overwrite=true"]
    status, out, err = run("convert.__main__", "source=logs", "dataset=mine/logs-v0", *again)
    assert status == 0, err
    assert load_dataset("mine/logs-v0", "mine").observations.shape[1] == 2
    arguments = ["task=minari/mine/logs-v0", f"base={base}", "adapter=lora", "steps=1", "episodes=0", "run_dir=out"]
    status, _, err = run("finetune", *arguments)
    assert status == 0, err


def test_missing_rewards_are_said_once(run, tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.zeros((5, 3)), actions=np.ones((5, 1)))
    status, out, _ = run("convert.__main__", "source=a.npz", "dataset=mine/a-v0")
    assert status == 0
    assert out.count("No rewards were found") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["source=nowhere"], "neither a file nor a folder"),
        (["source=."], "holds none of the known formats"),
        (["source=a.npz", "format=robmimic"], "Did you mean 'robomimic'"),
        (["source=a.npz", "actions=some"], "continuous or discrete"),
        (["source=a.npz", "columns.actions=[acts]"], "has no column 'acts', which columns.actions names"),
        (["source=a.npz", "mapping=a.npz"], "mapping=a.npz can't be read"),
        (["source=a.npz", "environment=None-v0"], "environment=None-v0 can't be made"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, arguments, sentence):
    if arguments[0] == "source=a.npz":
        np.savez(tmp_path / "a.npz", observations=np.zeros((5, 3)), actions=np.ones((5, 1)))
    status, _, err = run("convert.__main__", *arguments, "dataset=mine/a-v0")
    assert status == 1
    assert sentence in err
    assert "Traceback" not in err
