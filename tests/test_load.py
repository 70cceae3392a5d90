"""Datasets that users bring: whole ones load, missing and damaged ones are explained in a sentence."""

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from eva_rl.data import find_source, interface_of, load_dataset, on_disk
from eva_rl.data.environments import environment_of
from eva_rl.data.load import score_scale_of
from eva_rl.data.metadata import unreadable
from eva_rl.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*env_spec is None", "ignore:`eval_env` is set to None", "ignore:Package mypackage is not installed"
)


def damage(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def write_dataset(
    dataset_id: str, observations, actions, observation_space: gym.Space, action_space: gym.Space
) -> None:
    """One episode of two steps without an environment."""
    buffer = EpisodeBuffer(
        id=0,
        observations=observations,
        actions=actions,
        rewards=np.ones(2),
        terminations=np.array([False, True]),
        truncations=np.array([False, False]),
    )
    minari.create_dataset_from_buffers(
        dataset_id,
        [buffer],
        observation_space=observation_space,
        action_space=action_space,
        algorithm_name="none",
        author="the tests",
        author_email="tests@example.org",
        code_permalink="https://example.org",
        description="one episode",
    )


@pytest.mark.parametrize(
    ("kind", "actions"), [("Continuous", "continuous actions of size 2"), ("Discrete", "discrete actions of size 3")]
)
def test_a_users_own_dataset_loads(make_dataset, kind, actions):
    dataset = make_dataset("mine/random-v0", kind, episodes=4)
    trajectories = load_dataset("mine/random-v0", "minari/mine/random-v0")
    episodes = list(dataset.iterate_episodes())
    assert trajectories.task == "minari/mine/random-v0"
    assert trajectories.lengths.tolist() == [len(episode) for episode in episodes]
    np.testing.assert_array_equal(trajectories.observations, np.concatenate([e.observations[:-1] for e in episodes]))
    first_action = 1 if kind == "Discrete" else 0
    np.testing.assert_array_equal(trajectories.actions, np.concatenate([e.actions for e in episodes]) - first_action)
    np.testing.assert_array_equal(trajectories.episode_returns, [e.rewards.sum() for e in episodes])
    assert trajectories.statistics().success_rate == 1.0
    assert interface_of("mine", [trajectories]).in_words == f"observations of size 3 and {actions}"


def test_a_dataset_without_infos_loads_with_an_unknown_success_rate(make_dataset):
    make_dataset("mine/random-v0", success=False)
    assert load_dataset("mine/random-v0", "mine").statistics().success_rate is None


def test_a_dataset_is_loaded_without_its_environment():
    write_dataset(
        "mine/few-v0", np.zeros((3, 1)), np.array([0, 1]), gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
    )
    trajectories = load_dataset("mine/few-v0", "mine")
    assert trajectories.actions.tolist() == [0, 1]
    assert trajectories.returns_to_go.tolist() == [2.0, 1.0]


def test_loading_twice_gives_the_same_tensors(make_dataset):
    make_dataset("mine/random-v0")
    first, second = (load_dataset("mine/random-v0", "mine") for _ in range(2))
    assert torch.equal(first.observations, second.observations)
    assert torch.equal(first.actions, second.actions)


def test_only_the_first_demonstrations_are_taken_where_their_number_is_given(make_dataset):
    make_dataset("mine/random-v0", episodes=4)
    whole, part = load_dataset("mine/random-v0", "mine"), load_dataset("mine/random-v0", "mine", demonstrations=2)
    assert part.lengths.tolist() == whole.lengths[:2].tolist()
    assert torch.equal(part.observations, whole.observations[: len(part.observations)])


@pytest.mark.parametrize("demonstrations", [-1, 0, 5])
def test_more_demonstrations_than_there_are_or_none_are_refused(make_dataset, demonstrations):
    make_dataset("mine/random-v0", episodes=4)
    with pytest.raises(UserError, match=f"demonstrations={demonstrations} .*'mine/random-v0' holds 4 episodes"):
        load_dataset("mine/random-v0", "mine", demonstrations)


def test_a_missing_dataset_while_offline_is_one_clear_sentence(datasets_root):
    with pytest.raises(UserError) as raised:
        load_dataset("D4RL/door/human-v2", "minari/D4RL/door/human-v2")
    sentence = str(raised.value)
    assert "'D4RL/door/human-v2'" in sentence
    assert str(datasets_root) in sentence
    assert "connect to the internet" in sentence
    assert "\n" not in sentence


def test_a_dataset_the_servers_do_not_have_is_said_to_be_nowhere(monkeypatch):
    def unknown(dataset_id: str) -> None:
        raise ValueError(f"Couldn't find any version for dataset {dataset_id}")

    monkeypatch.setattr(minari, "download_dataset", unknown)
    with pytest.raises(UserError, match="'mine/random-v0' is not local, and Minari can't download it"):
        load_dataset("mine/random-v0", "mine")


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_a_misspelt_dataset_is_answered_with_the_nearest_local_one(make_dataset, monkeypatch, error):
    def fail(dataset_id: str) -> None:
        raise error(dataset_id)

    monkeypatch.setattr(minari, "download_dataset", fail)
    make_dataset("mine/random-v0")
    with pytest.raises(UserError, match="Did you mean 'mine/random-v0'"):
        load_dataset("mine/randm-v0", "mine")


@pytest.mark.parametrize("stray", ["notes/data", "mine/rändom copy-v0/data"])
def test_a_stray_folder_among_the_datasets_does_not_hide_the_sentence(make_dataset, datasets_root, stray):
    make_dataset("mine/random-v0")
    (datasets_root / stray).mkdir(parents=True)
    with pytest.raises(UserError, match="'mine/randm-v0'"):
        load_dataset("mine/randm-v0", "mine")


@pytest.mark.parametrize("dataset_id", ["mine/random", "mine random-v0", ""])
def test_a_malformed_id_is_a_user_error(monkeypatch, dataset_id):
    from minari.dataset.minari_dataset import parse_dataset_id

    monkeypatch.setattr(minari, "download_dataset", parse_dataset_id)  # the first thing that the real one does
    with pytest.raises(UserError, match=f"'{dataset_id}' is not local, and Minari can't download it"):
        load_dataset(dataset_id, "mine")


def test_a_missing_dataset_is_downloaded(make_dataset, monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", make_dataset)
    assert len(load_dataset("mine/random-v0", "mine").lengths) == 4


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_a_folder_of_datasets_is_no_dataset_and_is_kept(make_dataset, datasets_root, monkeypatch, error):
    def fail(dataset_id: str) -> None:
        raise error(dataset_id)

    monkeypatch.setattr(minari, "download_dataset", fail)
    make_dataset("mine/hammer-v3/expert-v0")
    with pytest.raises(
        UserError, match=r"got 'mine/hammer-v3', a folder of datasets.*name one.*mine/hammer-v3/expert-v0"
    ):
        load_dataset("mine/hammer-v3", "mine")
    assert len(load_dataset("mine/hammer-v3/expert-v0", "mine").lengths) == 4


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_a_broken_download_removes_what_it_left_and_nothing_that_was_there(datasets_root, monkeypatch, error, there):
    def fail(dataset_id: str) -> None:
        (datasets_root / dataset_id / "data").mkdir(parents=True)
        raise error(dataset_id)

    monkeypatch.setattr(minari, "download_dataset", fail)
    notes = datasets_root / "mine/random-v0/notes.txt"
    if there:
        notes.parent.mkdir(parents=True)
        notes.write_text("mine")
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
        load_dataset("mine/random-v0", "mine")
    assert notes.exists() == notes.parent.exists() == there
    assert not (notes.parent / "data").exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_hdf5_file_is_a_user_error_that_names_the_folder(make_dataset, datasets_root, keep):
    make_dataset("mine/random-v0")
    damage(datasets_root / "mine/random-v0/data/main_data.hdf5", keep)
    with pytest.raises(UserError, match="restore it from a copy") as raised:
        load_dataset("mine/random-v0", "mine")
    assert str(datasets_root / "mine/random-v0") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_overwritten_blocks_of_the_hdf5_file_never_raise_anything_but_a_user_error(make_dataset, datasets_root):
    make_dataset("mine/random-v0", episodes=1)
    path = datasets_root / "mine/random-v0/data/main_data.hdf5"
    content = path.read_bytes()
    refused = 0
    for begin in range(0, len(content), len(content) // 80):
        path.write_bytes(content[:begin] + bytes(128) + content[begin + 128 :])
        try:
            load_dataset("mine/random-v0", "mine")
        except UserError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("read", [lambda id: load_dataset(id, "mine"), environment_of, score_scale_of])
def test_truncated_metadata_is_a_user_error_that_names_the_folder(make_dataset, datasets_root, read, keep):
    make_dataset("mine/random-v0")
    damage(datasets_root / "mine/random-v0/data/metadata.json", keep)
    with pytest.raises(UserError, match="restore it from a copy") as raised:
        read("mine/random-v0")
    assert str(datasets_root / "mine/random-v0") in str(raised.value)


@pytest.mark.parametrize("name", ["total_steps", "total_episodes"])
@pytest.mark.parametrize("value", ["[]", "{}", '"x"', "NaN", "Infinity", "-1", "0.5", "1000000000000", "1" + 19 * "0"])
def test_totals_that_no_dataset_has_are_a_user_error_that_names_the_folder(make_dataset, datasets_root, name, value):
    make_dataset("mine/random-v0")
    path = datasets_root / "mine/random-v0/data/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "?"}).replace('"?"', value))
    with pytest.raises(UserError, match="random-v0"):
        load_dataset("mine/random-v0", "mine")


def test_too_little_memory_is_no_reason_to_delete_a_dataset():
    sentence = str(unreadable("pointmaze/UMaze/expert-2-seed0-v0", MemoryError("Unable to allocate 9 GiB")))
    assert "free memory" in sentence
    assert "delete" not in sentence


@pytest.mark.parametrize("missing", ["main_data.hdf5", "metadata.json"])
def test_a_missing_file_is_a_user_error_that_names_the_folder(make_dataset, datasets_root, missing):
    make_dataset("mine/random-v0")
    (datasets_root / "mine/random-v0/data" / missing).unlink()
    with pytest.raises(UserError, match="restore it from a copy"):
        load_dataset("mine/random-v0", "mine")


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"data_format": "hdf5", "observation_space": "?"}'])
def test_metadata_of_another_kind_is_a_user_error_that_names_the_folder(make_dataset, datasets_root, content):
    make_dataset("mine/random-v0")
    (datasets_root / "mine/random-v0/data/metadata.json").write_text(content)
    with pytest.raises(UserError, match="restore it from a copy"):
        load_dataset("mine/random-v0", "mine")


MATRIX = gym.spaces.Box(-1, 1, (2, 2))
DICTIONARY = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (2,)), "door": gym.spaces.Discrete(3, start=1)})
FLAT = gym.spaces.Box(-1, 1, (2,))
BYTES = gym.spaces.Box(0, 255, (4, 40, 40), np.uint8)


@pytest.mark.parametrize(
    ("space", "observations", "flat"),
    [
        (MATRIX, np.arange(12.0, dtype=np.float32).reshape(3, 2, 2), np.arange(8.0).reshape(2, 4)),
        (gym.spaces.Discrete(4), np.array([3, 0, 1]), [[3], [0]]),
        (
            DICTIONARY,
            {"position": np.ones((3, 2), np.float32), "door": np.array([1, 3, 2])},
            [[0, 1, 1], [2, 1, 1]],
        ),
    ],
)
def test_observations_of_several_shapes_and_dicts_of_them_are_flattened(space, observations, flat):
    write_dataset("mine/odd-v0", observations, np.zeros((2, 2), np.float32), space, FLAT)
    found = load_dataset("mine/odd-v0", "mine").observations
    np.testing.assert_array_equal(found, flat)


def test_several_choices_are_numbered_from_zero():
    space = gym.spaces.MultiDiscrete([3, 3], start=[1, 5])
    write_dataset("mine/odd-v0", np.zeros((3, 2), np.float32), np.array([[1, 7], [3, 5]]), FLAT, space)
    trajectories = load_dataset("mine/odd-v0", "mine")
    assert trajectories.actions.tolist() == [[0, 2], [2, 0]]
    assert interface_of("mine", [trajectories]).choices == (3, 3)


def test_actions_of_other_spaces_are_refused():
    space = gym.spaces.MultiBinary([2, 2])
    write_dataset("mine/odd-v0", np.zeros((3, 2), np.float32), np.zeros((2, 2, 2), np.int8), FLAT, space)
    with pytest.raises(UserError, match="'mine/odd-v0' can't be used: Actions of MultiBinary"):
        load_dataset("mine/odd-v0", "mine")


@pytest.fixture
def pictures(monkeypatch):
    """A dataset of pictures that is too large for memory."""
    monkeypatch.setattr("eva_rl.data.load.IN_MEMORY", 1000)
    shown = np.random.default_rng(0).integers(256, size=(3, 4, 40, 40), dtype=np.uint8)
    write_dataset("mine/pictures-v0", shown, np.zeros((2, 2), np.float32), BYTES, FLAT)
    return shown


def test_large_observations_are_mapped_from_a_file_that_is_made_once(pictures, datasets_root, monkeypatch):
    first = load_dataset("mine/pictures-v0", "mine")
    monkeypatch.setattr(minari.MinariDataset, "iterate_episodes", None)
    second = load_dataset("mine/pictures-v0", "mine")
    for found in (first, second):
        np.testing.assert_array_equal(found.observations, pictures[:2].reshape(2, -1))
        assert found.observations.dtype == torch.uint8
        assert found.returns_to_go.tolist() == [2.0, 1.0]
        assert found.starts.tolist() == [0, 2]
        assert found.statistics().success_rate is None
    assert list((datasets_root / ".packed").rglob("observations.bin"))
    assert "mine/pictures-v0" in minari.list_local_datasets()


def test_a_dataset_that_was_written_again_is_packed_again(pictures, datasets_root):
    load_dataset("mine/pictures-v0", "mine")
    shutil.rmtree(datasets_root / "mine/pictures-v0")
    write_dataset("mine/pictures-v0", 255 - pictures, np.zeros((2, 2), np.float32), BYTES, FLAT)
    found = load_dataset("mine/pictures-v0", "mine")
    np.testing.assert_array_equal(found.observations, 255 - pictures[:2].reshape(2, -1))


def test_a_packed_dataset_that_vanishes_between_check_and_use_is_packed_again(pictures, datasets_root, monkeypatch):
    load_dataset("mine/pictures-v0", "mine")
    stamp_of, calls = on_disk._stamp_of, []

    def vanishing(folder):
        found = stamp_of(folder)
        if not calls:  # as another run does that packs it anew
            shutil.rmtree(folder)
        calls.append(folder)
        return found

    monkeypatch.setattr(on_disk, "_stamp_of", vanishing)
    found = load_dataset("mine/pictures-v0", "mine")
    np.testing.assert_array_equal(found.observations, pictures[:2].reshape(2, -1))
    assert len(calls) > 1
    assert not list((datasets_root / ".packed").rglob("*.lock"))


def test_several_threads_that_pack_one_dataset_at_once_all_get_it(tmp_path):
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    episode = {"observations": np.arange(20.0).reshape(10, 2), "actions": np.zeros((10, 2)), "rewards": np.ones(10)}

    def load(number: int) -> float:
        found = on_disk.pack_on_disk(
            tmp_path / "set" / "packed", {"version": number % 3}, "mine", [episode], space, FLAT
        )
        return float(found.observations.sum())

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(load, range(60))) == {190.0}
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"packed"}


def test_a_full_disk_leaves_no_half_of_a_packed_dataset(pictures, datasets_root, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"no space left for .*pictures"):
        load_dataset("mine/pictures-v0", "mine")
    assert not [path for path in (datasets_root / ".packed").rglob("*") if path.is_file()]


def test_the_evaluation_environment_is_the_datasets_own(make_dataset):
    make_dataset("mine/random-v0", eval_env="DiscreteDummy-v0")
    env = environment_of("mine/random-v0")
    assert env.spec.id == "DiscreteDummy-v0"
    env.close()


def test_a_dataset_that_names_no_environment_says_how_to_go_without(datasets_root):
    write_dataset("mine/few-v0", np.zeros((3, 2)), np.zeros((2, 2)), FLAT, FLAT)
    path = datasets_root / "mine/few-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in metadata.items() if "env_spec" not in name}))
    with pytest.raises(UserError, match="names no environment: set episodes=0"):
        environment_of("mine/few-v0")


def test_an_evaluation_environment_is_enough(make_dataset, datasets_root):
    make_dataset("mine/random-v0", env=None, eval_env="ContinuousDummy-v0")
    env = environment_of("mine/random-v0")
    assert env.spec.id == "ContinuousDummy-v0"
    env.close()


@pytest.mark.parametrize(
    "change", [{"id": "NotThere-v3", "entry_point": e} for e in (None, "not_installed_anywhere:Env")]
)
def test_an_environment_that_cannot_be_made_names_what_to_install(make_dataset, datasets_root, change):
    make_dataset("mine/random-v0", requirements=["mypackage>=2"])
    path = datasets_root / "mine/random-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    for name in ("env_spec", "eval_env_spec"):
        if name in metadata:
            metadata[name] = json.dumps(json.loads(metadata[name]) | change)
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"can't be made .*install mypackage>=2, or set episodes=0"):
        environment_of("mine/random-v0")


def test_the_score_scale_is_the_datasets_or_unknown(make_dataset):
    make_dataset("mine/scaled-v0", ref_min_score=-1.0, ref_max_score=3.0)
    make_dataset("mine/random-v0")
    assert score_scale_of("mine/scaled-v0") == (-1.0, 3.0)
    assert score_scale_of("mine/random-v0") is None


@pytest.mark.parametrize(("low", "high"), [(3.0, 3.0), (float("nan"), 3.0), (0.0, float("inf"))])
def test_reference_scores_that_measure_nothing_are_no_scale_and_that_is_said(make_dataset, low, high):
    make_dataset("mine/scaled-v0", ref_min_score=low, ref_max_score=high)
    with pytest.warns(UserWarning, match="no normalized scores"):
        assert find_source("minari/mine/scaled-v0").score_scale is None
