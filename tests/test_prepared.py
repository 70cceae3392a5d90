"""Text and large pictures in observations, from a dataset to a policy that is shown what the environment shows."""

import json

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

import eva_rl
from eva_rl.data import interface_of, load_dataset, pack
from eva_rl.errors import UserError
from eva_rl.prepared import LONGEST, Smaller, Words, prepared, prepared_as
from eva_rl.spaces import Part, flatten, parts_of, spaces_from_text, spaces_to_text

TEXT = gym.spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyzABC,. ")
POSITION = gym.spaces.Box(-1, 1, (2,), np.float32)
SPACE = gym.spaces.Dict({"mission": TEXT, "at": POSITION})
LEFT, RIGHT = "go left, now", "go right, now"


class Missions(gym.Env):
    """Pays 1 for moving as its mission says."""

    def __init__(self):
        self.observation_space, self.action_space = SPACE, gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right, self.steps = bool(self.np_random.integers(2)), 0
        return self.seen(), {}

    def step(self, action):
        self.steps += 1
        good = bool(action) == self.right
        return self.seen(), float(good), False, self.steps == 6, {"success": good}

    def seen(self):
        return {"mission": RIGHT if self.right else LEFT, "at": np.full(2, self.steps / 10, np.float32)}


@pytest.fixture
def missions(datasets_root, monkeypatch):
    """A dataset of an environment with a mission, which its demonstrations follow."""
    monkeypatch.setitem(
        gym.registry, "Missions-v0", gym.envs.registration.EnvSpec("Missions-v0", f"{__name__}:Missions")
    )
    env, episodes = gym.make("Missions-v0"), []
    for number in range(8):
        observation, _ = env.reset(seed=number)
        seen, actions, over = [observation], [], False
        while not over:
            actions.append(int(observation["mission"] == RIGHT))
            observation, _, _, over, _ = env.step(actions[-1])
            seen.append(observation)
        episodes.append(
            EpisodeBuffer(
                id=number,
                observations={"mission": [s["mission"] for s in seen], "at": np.stack([s["at"] for s in seen])},
                actions=np.array(actions),
                rewards=np.ones(6),
                terminations=np.zeros(6, bool),
                truncations=np.arange(6) == 5,
                infos={"success": np.ones(7, bool)},
            )
        )
    who = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "tests")
    return minari.create_dataset_from_buffers("mine/missions-v0", episodes, env=env, **who)


def with_words(space, episodes):
    return prepared(space, lambda: episodes)


def test_words_have_numbers_by_how_often_they_occur_and_then_by_the_alphabet():
    space = with_words(TEXT, [[LEFT, LEFT, RIGHT]])
    assert space.words == (",", "go", "now", "left", "right")
    assert space.numbers(["Go right", "go, go"]).tolist() == [[3, 6, 0, 0], [3, 2, 3, 0]]
    assert space.numbers("up, up, up").tolist() == [1, 2, 1, 2]  # unknown words; what is longer is cut
    assert space.numbers(np.array([["now"], [""]])).tolist() == [[[4, 0, 0, 0]], [[0, 0, 0, 0]]]
    assert with_words(TEXT, [[RIGHT], [LEFT, LEFT]]) == space


def test_no_text_is_longer_than_what_is_read_of_it():
    assert with_words(TEXT, [["a " * 500]]).length == LONGEST


def test_text_is_found_in_whatever_holds_it():
    nested = gym.spaces.Tuple([POSITION, SPACE])
    known = with_words(nested, [(np.zeros((2, 2)), {"mission": [LEFT, RIGHT], "at": np.zeros((2, 2))})])
    assert prepared(known, list) == known  # nothing is left to do
    assert parts_of(known) == (Part("vector", (2,)), Part("vector", (2,)), Part("tokens", (4,), 7))
    assert prepared_as(nested, known) == known
    assert prepared_as(POSITION, known) == POSITION
    row = flatten(known, (np.zeros(2), {"mission": LEFT, "at": np.ones(2)}))
    assert row.tolist() == [0, 0, 1, 1, 3, 5, 2, 4]


@pytest.mark.parametrize("value", [3, [1, 2], [b"go"], None])
def test_what_is_no_text_is_told_apart(value):
    with pytest.raises(TypeError, match="is no text"):
        with_words(TEXT, [[LEFT]]).numbers(value)


@pytest.mark.parametrize("change", [{"at_once": 0}, {"at_once": 10**9}, {"at_once": "4"}, {"words": [1]}, {"words": 3}])
def test_a_damaged_list_of_words_is_refused(change):
    fields = json.loads(spaces_to_text(with_words(TEXT, [[LEFT]]), POSITION))
    fields["observation"] |= change
    with pytest.raises(ValueError, match=r"words|description"):
        spaces_from_text(json.dumps(fields))


def test_other_words_of_as_many_are_another_interface():
    def interface(texts):
        episode = {"observations": texts, "actions": np.zeros((2, 2), np.float32), "rewards": np.zeros(2)}
        return interface_of("mine", [pack("mine", [episode], with_words(TEXT, [texts]), POSITION)])

    one, other = interface(["go left"] * 2), interface(["go right"] * 2)
    one.require(interface(["go left"] * 2), "it")
    with pytest.raises(UserError, match="numbers the words of its text otherwise"):
        one.require(other, "it")


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_a_dataset_with_text_loads_from_every_storage(storage, missions):
    if storage == "arrow":
        pytest.importorskip("pyarrow")
        buffers = [
            EpisodeBuffer(
                id=int(e.id),
                observations=e.observations,
                actions=e.actions,
                rewards=e.rewards,
                terminations=e.terminations,
                truncations=e.truncations,
            )
            for e in missions.iterate_episodes()
        ]
        who = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "tests")
        spaces = {"observation_space": SPACE, "action_space": gym.spaces.Discrete(2)}
        minari.create_dataset_from_buffers("mine/missions-v1", buffers, data_format="arrow", **spaces, **who)
    trajectories = load_dataset(f"mine/missions-v{int(storage == 'arrow')}", "mine")
    assert isinstance(trajectories.observation_space["mission"], Words)
    assert trajectories.observations.shape == (48, 6)
    assert set(trajectories.observations[:, 3].tolist()) == {5.0, 6.0}  # left and right


def test_large_sets_with_text_are_packed_on_disk(missions, monkeypatch):
    expected = load_dataset("mine/missions-v0", "mine").observations
    monkeypatch.setattr("eva_rl.data.load.IN_MEMORY", 10)
    found = load_dataset("mine/missions-v0", "mine")
    np.testing.assert_array_equal(found.observations, expected)


def test_fine_tuning_learns_what_the_text_says_and_the_policy_reads_it(missions, base, run, tmp_path):
    arguments = [
        "task=minari/mine/missions-v0",
        f"base={base}",
        "steps=150",
        "episodes=6",
        "zero_shot=false",
        "workers=0",
    ]
    status, _, err = run(
        "finetune", *arguments, f"run_dir={tmp_path / 'run'}", "adapter=full", "training.learning_rate=3e-3"
    )
    assert status == 0, err
    policy = eva_rl.load_policy(tmp_path / "run")
    for mission, action in ((LEFT, 0), (RIGHT, 1), ("go right, please", 1)):
        policy.reset()
        assert policy.act({"mission": mission, "at": np.zeros(2, np.float32)}) == action
    with pytest.raises(UserError, match="another kind of value"):
        policy.act({"mission": 3, "at": np.zeros(2, np.float32)})


def test_an_exported_policy_takes_the_numbers_of_words(missions, base, run, tmp_path):
    import torch

    arguments = [
        "task=minari/mine/missions-v0",
        f"base={base}",
        "steps=2",
        "episodes=0",
        "adapter=lora",
        "adapter.rank=2",
    ]
    assert run("finetune", *arguments, f"run_dir={tmp_path / 'run'}")[0] == 0
    status, _, err = run("export", f"run={tmp_path / 'run'}", "format=torch", f"output={tmp_path / 'policy.pt2'}")
    assert status == 0, err
    policy = eva_rl.load_policy(tmp_path / "run")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    from eva_rl.policy.export import Window

    window = Window(policy)
    given = dict(zip(window.names, window.examples(), strict=True))
    given["observations.mission"][0] = torch.from_numpy(policy.observation_space["mission"].numbers(RIGHT))
    if "returns_to_go" in given:
        given["returns_to_go"][0] = policy.typical_return
    policy.reset()
    assert int(program(*given.values())) == policy.act({"mission": RIGHT, "at": np.zeros(2, np.float32)})


SCREEN = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((210, 160, 3), (105, 80, 3)),
        ((480, 640, 3), (96, 128, 3)),
        ((257, 200), (85, 66)),
        ((128, 128, 3), (128, 128, 3)),
        ((4, 84, 84), (4, 84, 84)),
        ((3, 210, 160), (3, 105, 80)),  # channels first
        ((1, 210, 160), (1, 105, 80)),
        ((3, 512, 512), (3, 128, 128)),
        ((210, 160, 8), (210, 160, 8)),  # too many channels to tell where they are
        ((224, 224, 64), (224, 224, 64)),
        ((12, 210, 160), (12, 210, 160)),
        ((300, 60), (300, 60)),  # too narrow to be reduced to a picture
    ],
)
def test_pictures_of_more_than_128_pixels_a_side_are_reduced_by_a_whole_number(shape, expected):
    space = prepared(gym.spaces.Box(0, 255, shape, np.uint8), list)
    shown = flatten(space, np.zeros(shape, np.uint8))
    assert shown.shape == (np.prod(expected),)
    assert isinstance(space, Smaller) == (shape != expected)
    assert spaces_from_text(spaces_to_text(space, gym.spaces.Discrete(2)))[0] == space


def test_a_block_becomes_its_mean_in_every_channel_and_along_any_leading_axes():
    pictures = np.random.default_rng(0).integers(256, size=(2, 3, *SCREEN.shape), dtype=np.uint8)
    found = prepared(SCREEN, list).numbers(pictures)
    blocks = pictures.reshape(2, 3, 105, 2, 80, 2, 3).astype(float).mean((3, 5))
    assert found.dtype == np.uint8
    assert np.abs(found - blocks).max() <= 0.5


def test_channels_that_come_first_are_reduced_as_those_that_come_last():
    pictures = np.random.default_rng(0).integers(256, size=(2, 5, *SCREEN.shape), dtype=np.uint8)
    first = prepared(gym.spaces.Box(0, 255, (3, 210, 160), np.uint8), list)
    assert parts_of(first) == (Part("image", (3, 105, 80), channels_last=False),)
    found = first.numbers(np.moveaxis(pictures, -1, -3))
    np.testing.assert_array_equal(np.moveaxis(found, -3, -1), prepared(SCREEN, list).numbers(pictures))


def test_what_is_no_such_picture_is_told_apart():
    for wrong in (np.zeros((160, 210, 3), np.uint8), np.zeros(SCREEN.shape), 3):
        with pytest.raises(TypeError, match="is no picture"):
            prepared(SCREEN, list).numbers(wrong)


@pytest.mark.parametrize("change", [{"block": 0}, {"block": 161}, {"block": 2.0}, {"dtype": "float32"}])
def test_a_damaged_description_of_a_reduced_picture_is_refused(change):
    fields = json.loads(spaces_to_text(prepared(SCREEN, list), POSITION))
    fields["observation"] |= change
    with pytest.raises(ValueError, match=r"picture|description"):
        spaces_from_text(json.dumps(fields))
