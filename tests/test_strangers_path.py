"""A stranger's way with each kind of files: convert, fine-tune, act, export; and what bad files of each kind are told."""

import h5py
import numpy as np
import pytest

import eva_rl
from eva_rl.convert.conversion import convert
from eva_rl.errors import UserError

parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow  # noqa: E402
from test_convert import DEFAULTS, EPISODES, SOURCES, columns_for, in_d4rl, in_lerobot, in_robomimic  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_files_become_a_policy_and_a_file_that_acts(name, run, base, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    SOURCES[name](tmp_path / name)
    meant = DEFAULTS.items() if columns_for(name) else ()
    words = [f"columns.{role}=['{own[0]}']" for role, own in meant]
    status, out, err = run("convert.__main__", f"source={tmp_path / name}", "dataset=mine/logs-v0", *words)
    assert status == 0, err
    command = out.strip().splitlines()[-1]
    assert command == "python -m eva_rl.finetune task=minari/mine/logs-v0 episodes=0"
    more = [f"base={base}", "adapter=lora", "steps=3", "training.batch_size=4", "run_dir=run"]
    assert run("finetune", *command.split()[3:], *more)[0] == 0
    policy = eva_rl.load_policy("run")
    observation = policy.observation_space.sample()
    policy.reset(1.0)
    action = policy.act(observation)
    assert policy.action_space.contains(action)
    assert run("export", "run=run", "format=onnx")[0] == 0
    assert run("export", "run=run", "format=torch")[0] == 0
    session = onnxruntime.InferenceSession("run/policy.onnx")
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
    window = {i.name: np.zeros(i.shape, types[i.type]) for i in session.get_inputs()}
    shown = observation if isinstance(observation, dict) else {"": observation}
    for key, value in shown.items():
        window[f"observations.{key}".rstrip(".")][0] = value
    if "returns_to_go" in window:
        window["returns_to_go"][0] = 1.0
    np.testing.assert_allclose(session.run(["action"], window)[0], action, rtol=0, atol=1e-5)


def robomimic(path, **changes):
    in_robomimic(path / "d.hdf5", [EPISODES[0]], **changes)
    return path / "d.hdf5"


def d4rl(path, change):
    in_d4rl(path / "d.hdf5")
    with h5py.File(path / "d.hdf5", "r+") as file:
        change(file)
    return path / "d.hdf5"


def lerobot(path, change):
    """With a column of its second file changed."""
    in_lerobot(path / "l", "v2.1")
    file = path / "l/data/chunk-000/episode_000001.parquet"
    table = change(parquet.read_table(file))
    parquet.write_table(table, file)
    return path / "l"


def put(file, name, values):
    if name in file:
        del file[name]
    if values is not None:
        file.create_dataset(name, data=values)


def column(name, values):
    def change(table):
        table = table.drop_columns([name])
        return table if values is None else table.append_column(name, pyarrow.array(values))

    return change


NAN = [0.0] * 6 + [np.nan]
TEXT = [b"1", b"2", b"left", b"4", b"5"]
BAD = {
    "robomimic, other lengths": (lambda p: robomimic(p, rewards=np.ones(3)), "demo_0, column 'rewards' has 3 rows where 5"),
    "robomimic, no actions": (lambda p: robomimic(p, actions=None), "demo_0 has no column for actions"),
    "robomimic, NaN": (lambda p: robomimic(p, actions=np.full((5, 2), np.nan)), "demo_0, column 'actions' holds NaN"),
    "robomimic, text": (lambda p: robomimic(p, actions=np.array(TEXT)), "demo_0, column 'actions' holds"),
    "robomimic, empty": (lambda p: robomimic(p, actions=np.ones((0, 2))), "demo_0, column 'actions' is empty"),
    "d4rl, other lengths": (lambda p: d4rl(p, lambda f: put(f, "rewards", np.ones(4))), "column 'rewards' has 4 rows where 18"),
    "d4rl, no actions": (lambda p: d4rl(p, lambda f: put(f, "actions", None)), "holds none of the known formats"),
    "d4rl, NaN": (lambda p: d4rl(p, lambda f: put(f, "rewards", [np.nan] * 18)), "episode 0, column 'rewards' holds NaN"),
    "d4rl, text": (lambda p: d4rl(p, lambda f: put(f, "terminals", [b"no"] * 18)), "column 'terminals'"),
    "d4rl, never ends": (
        lambda p: d4rl(p, lambda f: (put(f, "terminals", np.zeros(18)), put(f, "timeouts", None))),
        "never say that an episode ends",
    ),
    "lerobot, NaN": (lambda p: lerobot(p, column("next.reward", NAN)), "episode 1, column 'next.reward' holds NaN"),
    "lerobot, text": (lambda p: lerobot(p, column("next.reward", ["a"] * 7)), "column 'next.reward' holds 'a' where numbers"),
    "lerobot, missing": (lambda p: lerobot(p, column("action", None)), "episode 1 has no column for actions"),
    "lerobot, no numbers": (lambda p: lerobot(p, column("frame_index", None)), "has no column 'frame_index'"),
    "lerobot, mixed shapes": (
        lambda p: lerobot(p, column("action", [[1.0, 2.0]] * 6 + [[1.0]])),
        "episode 1, column 'action' has rows of several shapes",
    ),
    "lerobot, empty cells": (lambda p: lerobot(p, column("action", [[1.0, 2.0]] * 6 + [None])), "episode 1, column 'action'"),
    "lerobot, text for an episode": (lambda p: lerobot(p, column("episode_index", ["x"] * 7)), "column 'episode_index'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_of_each_kind_is_told_in_one_sentence_that_names_file_and_column(name, tmp_path, datasets_root):
    make, said = BAD[name]
    source = make(tmp_path)
    with pytest.raises(UserError) as raised:
        convert(str(source), "mine/logs-v0")
    sentence = str(raised.value)
    assert said in sentence
    assert str(tmp_path) in sentence
    assert "\n" not in sentence
    assert not [path for path in datasets_root.rglob("*") if path.is_file()]
