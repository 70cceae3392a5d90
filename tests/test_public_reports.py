"""Inputs of public reports that other libraries fail on: used rightly, or one sentence that says what to do."""

import json
import subprocess
import sys

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import WrapperSpec
from minari.data_collector import EpisodeBuffer

from eva_rl.data import WindowSampler, interface_of, load_dataset, pack, write_dataset
from eva_rl.data.environments import environment_of
from eva_rl.errors import UserError
from eva_rl.model import DecisionTransformer, ModelConfig, policy_of
from eva_rl.prepared import Exact, prepared
from eva_rl.rollout import Job, Simulators, rollout
from eva_rl.rollout.rollout import preparing
from eva_rl.rollout.simulators import Board, Stage
from eva_rl.spaces import solved_in, successes_in

pytestmark = pytest.mark.filterwarnings("ignore:.*env_spec is None", "ignore:`eval_env` is set to None")
BOX = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)


def write(dataset_id: str, lengths: tuple[int, ...], **options: object) -> None:
    buffers = [
        EpisodeBuffer(
            id=number,
            observations=np.zeros((length + 1, 3), np.float32),
            actions=np.zeros((length, 1), np.float32),
            rewards=np.ones(length),
            terminations=np.arange(length) == length - 1,
            truncations=np.zeros(length, bool),
        )
        for number, length in enumerate(lengths)
    ]
    spaces = {"observation_space": BOX, "action_space": gym.spaces.Box(-1.0, 1.0, (1,), np.float32)}
    who = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "tests")
    minari.create_dataset_from_buffers(dataset_id, buffers, **spaces, **who, **options)


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_long_episodes_in_arrow_files_are_read_whole(storage):
    pytest.importorskip("pyarrow")
    write("mine/long-v0", (33_000, 40, 66_000), data_format=storage)
    assert load_dataset("mine/long-v0", "mine").lengths.tolist() == [33_000, 40, 66_000]


def test_an_episode_that_is_shorter_than_its_dataset_states_is_refused(datasets_root):
    pytest.importorskip("pyarrow")
    write("mine/short-v0", (40, 50), data_format="arrow")
    (datasets_root / "mine/short-v0/data/1/metadata.json").write_text(json.dumps({"id": 1, "total_steps": 51}))
    with pytest.raises(UserError, match="states 51 steps for episode 1, but 50 were read"):
        load_dataset("mine/short-v0", "mine")


def test_success_in_arrow_files_is_read(make_dataset):
    pytest.importorskip("pyarrow")
    make_dataset("mine/arrow-v0", data_format="arrow")
    make_dataset("mine/hdf5-v0")
    found, expected = (load_dataset(f"mine/{kind}-v0", "mine") for kind in ("arrow", "hdf5"))
    assert found.successes.tolist() == expected.successes.tolist()
    assert torch.equal(found.observations, expected.observations)
    assert torch.equal(found.actions, expected.actions)


def test_arrow_files_without_pyarrow_name_the_extra(datasets_root, monkeypatch):
    pytest.importorskip("pyarrow")
    write("mine/short-v0", (4,), data_format="arrow")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow" or name.endswith("arrow_storage")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"stored as arrow, which needs the package pyarrow.*eva_rl\[arrow\]"):
        load_dataset("mine/short-v0", "mine")


def episode(actions: np.ndarray, observations: np.ndarray | None = None) -> dict:
    seen = np.zeros((len(actions), 3), np.float32) if observations is None else observations
    return {"observations": seen, "actions": actions, "rewards": np.ones(len(actions)), "success": None}


@pytest.mark.parametrize("bound", [1.0, 100.0, 10_000.0, float(np.finfo(np.float32).max)])
def test_actions_that_use_a_small_part_of_their_bounds_are_scaled_by_the_data(bound, recwarn):
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 2)).astype(np.float32)
    space = gym.spaces.Box(-bound, bound, (2,), np.float32)
    interface = interface_of("mine", [pack("mine", [episode(actions)], BOX, space)])
    scaled = (actions - interface.action_mean) / interface.action_scale
    assert 0.5 < scaled.std() <= 1.0
    assert (len(recwarn) == 1) == (bound > 1)
    if bound > 1:
        assert "use a small part of their bounds" in str(recwarn[0].message)


def test_one_action_at_rest_in_narrow_bounds_is_scaled_by_them(recwarn):
    actions = np.column_stack([np.linspace(-1, 1, 50), np.ones(50)]).astype(np.float32)
    space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    assert interface_of("mine", [pack("mine", [episode(actions)], BOX, space)]).action_scale == (1.0, 1.0)
    assert not len(recwarn)


def test_observations_whose_differences_float32_cannot_hold_are_named():
    space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    seen = np.column_stack([np.linspace(0, 1, 50), 1.7e9 + np.arange(50.0), np.full(50, 1.7e9)])
    with pytest.warns(UserWarning, match=r"\(number 1 of the flat observation\) .*subtract their first value"):
        pack("mine", [episode(np.zeros((50, 2), np.float32), seen)], space, gym.spaces.Box(-1, 1, (2,)))


def test_observations_whose_differences_float32_cannot_hold_are_named_wherever_they_are():
    space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    acts = np.zeros((50, 2), np.float32)
    still, clock = (np.full((50, 1), 1.7e9), 1.7e9 + np.arange(50.0)[:, None])
    with pytest.warns(UserWarning, match=r"\(number 0 of the flat observation\)"):
        pack("mine", [episode(acts, still), episode(acts, clock)], space, gym.spaces.Box(-1, 1, (2,)))


def test_numbers_that_move_in_a_later_episode_only_are_kept_exactly():
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    still, clock = np.full((50, 2), 1.7e9), 1.7e9 + np.arange(100.0).reshape(50, 2)
    assert isinstance(prepared(space, lambda: iter([still, clock])), Exact)
    assert prepared(space, lambda: iter([still, still])) == space


@pytest.mark.parametrize("at", [0.0, 1.7e9, -1e13])
def test_what_is_small_beside_its_mean_is_learnt(at):
    rng = np.random.default_rng(0)
    moving = rng.uniform(-1, 1, (20, 30, 2))
    shown = gym.spaces.Dict({"clock": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64), "b": gym.spaces.Discrete(2)})
    acts = gym.spaces.Box(-1, 1, (2,), np.float32)
    steps = {"rewards": np.ones(30), "terminations": np.arange(30) == 29, "truncations": np.zeros(30, bool)}
    written = (
        {
            "observations": {"clock": at + np.append(own, own[-1:], 0), "b": np.zeros(31, int)},
            "actions": own.astype("f4"),
            **steps,
        }
        for own in moving
    )
    write_dataset("mine/clock-v0", written, shown, acts, "what the clock shows is what is to be done")
    trajectories = load_dataset("mine/clock-v0", "mine")
    interface = interface_of("mine", [trajectories])
    np.testing.assert_allclose(interface.observation_mean, at + moving.mean((0, 1)), rtol=0, atol=0.05)
    np.testing.assert_allclose(interface.observation_std, moving.std((0, 1)), rtol=0.05)
    torch.manual_seed(0)
    model = DecisionTransformer(ModelConfig(1, 2, 32, 4, 0.0, ("state",)), [interface])
    sampler, optimizer = WindowSampler([trajectories], "mine", 4, 64, 0), torch.optim.AdamW(model.parameters(), 3e-3)
    for number in range(150):
        optimizer.zero_grad()
        loss = model.loss(sampler.batch(number))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * moving.var()
    stage = Stage(Board(**{name: np.zeros(size, kind) for name, (kind, size) in Board.sizes(1, interface).items()}))
    make_env = preparing(interface)(lambda: Clock(shown, acts, at))  # what a rollout shows to the model, as in training
    stage.reset([Job("mine", make_env, 0, 0.0)])
    np.testing.assert_array_equal(stage.board.observations[0], [0.0, at + 0.25, at - 0.75])
    make = policy_of(model.eval(), "mine", alone=True)
    action = make(1).act(torch.as_tensor(stage.board.observations), torch.zeros(1))
    np.testing.assert_allclose(action[0], [0.25, -0.75], atol=0.25)


class Clock(gym.Env):
    def __init__(self, observation_space: gym.Space, action_space: gym.Space, at: float):
        self.observation_space, self.action_space, self.at = observation_space, action_space, at

    def reset(self, *, seed=None, options=None):
        return {"clock": self.at + np.array([0.25, -0.75]), "b": 0}, {}


def test_rewards_may_be_arrays_of_one(recwarn):
    rows = episode(np.zeros((4, 2), np.float32)) | {"rewards": np.ones((4, 1))}
    assert pack("mine", [rows], BOX, gym.spaces.Box(-1, 1, (2,))).returns_to_go.tolist() == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("info", "solved"),
    [
        ({"success": np.array([False])}, False),
        ({"success": np.array([[1.0]])}, True),
        ({"is_success": 1.0}, True),
        ({"is_success": np.float32(0)}, False),
        ({"success": torch.tensor([True])}, True),
        ({"success": None}, None),
        ({"success": "yes"}, None),
        ({"success": np.nan}, None),
        ({"success": np.array([True, False])}, None),
        ({}, None),
    ],
)
def test_success_is_read_however_it_is_spelt_and_else_unknown(info, solved):
    assert solved_in(info) is solved


def test_success_of_datasets_is_read_under_both_names():
    assert successes_in({"is_success": np.array([0.0, 1.0])}).tolist() == [0.0, 1.0]
    assert successes_in({"success": np.array(["no", "yes"])}) is None
    assert successes_in({"success": np.array([0.0, np.nan])}) is None
    assert successes_in(None) is None


class Odd(gym.Env):
    """An environment that never ends, and returns arrays of one."""

    observation_space = BOX
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {"is_success": np.array([False])}

    def step(self, action):
        self.steps += 1
        return np.zeros(3, np.float32), np.array([1.0]), False, False, {"is_success": np.array([self.steps == 3])}


class Still:
    """A policy that does nothing."""

    def act(self, observations, returns_to_go):
        return torch.zeros(len(observations), 1)

    def record(self, actions, rewards):
        pass

    def keep(self, episodes):
        pass


def still_interface():
    return interface_of(
        "odd", [pack("odd", [episode(np.linspace(-1, 1, 9)[:, None].astype(np.float32))], BOX, Odd.action_space)]
    )


def test_an_episode_without_an_end_is_cut_and_scored_where_it_is_told():
    jobs = [Job("odd", Odd, seed, 0.0) for seed in range(2)]
    with (
        Simulators(0) as simulators,
        pytest.warns(UserWarning, match="2 episodes of 'odd' had not ended after 5 steps"),
    ):
        found = rollout(lambda n: Still(), still_interface(), jobs, simulators, max_steps=5)
    assert found.lengths.tolist() == [5, 5]
    assert found.returns.tolist() == [5.0, 5.0]
    assert found.successes.tolist() == [True, True]
    assert found.solved_at_end.tolist() == [False, False]


def test_where_nobody_sets_a_limit_it_follows_from_the_demonstrations(recwarn):
    with Simulators(0) as simulators:
        jobs = [Job("odd", Odd, 0, 0.0)]
        assert rollout(lambda n: Still(), still_interface(), jobs, simulators, longest=6).lengths.tolist() == [6]
        given = rollout(lambda n: Still(), still_interface(), jobs, simulators, max_steps=9, longest=6)
    assert given.lengths.tolist() == [9]
    assert [w for w in recwarn if "had not ended after 6 steps" in str(w.message)]


def test_an_environments_own_limit_counts_however_long_it_is(recwarn):
    gym.register("Odd-v0", entry_point=Odd, max_episode_steps=8, disable_env_checker=True)
    try:
        with Simulators(0) as simulators:
            jobs = [Job("odd", lambda: gym.make("Odd-v0"), 0, 0.0)]
            assert rollout(lambda n: Still(), still_interface(), jobs, simulators, longest=5).lengths.tolist() == [8]
    finally:
        del gym.registry["Odd-v0"]
    assert not [w for w in recwarn if "had not ended" in str(w.message)]


@pytest.mark.parametrize("value", [np.array([1.0, 2.0]), None, "3", np.nan])
def test_a_reward_that_is_no_number_is_the_environments(value):
    class Wrong(Odd):
        def step(self, action):
            return (*super().step(action)[:1], value, False, False, {})

    with Simulators(0) as simulators, pytest.raises(UserError, match="returned a reward"):
        rollout(lambda n: Still(), still_interface(), [Job("odd", Wrong, 0, 0.0)], simulators)


def respecify(datasets_root, **changes) -> None:
    path = datasets_root / "dummy/random-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.dumps(json.loads(metadata["env_spec"]) | changes)
    path.write_text(json.dumps(metadata | {"env_spec": spec, "eval_env_spec": spec}))


def test_an_environment_whose_wrapper_can_not_be_made_again_is_made_without_it(make_dataset, datasets_root):
    make_dataset()
    respecify(datasets_root, additional_wrappers=[vars(WrapperSpec("Mine", "__main__:Mine", None))])
    with pytest.warns(UserWarning, match=r"made without Mine .*scores may differ"):
        assert environment_of("dummy/random-v0").spec.id == "ContinuousDummy-v0"
    broken = WrapperSpec("TimeLimit", "gymnasium.wrappers.common:TimeLimit", {"no_such_keyword": 1})
    respecify(datasets_root, additional_wrappers=[vars(broken)])
    with pytest.warns(UserWarning, match="made without TimeLimit"):
        assert environment_of("dummy/random-v0").spec.id == "ContinuousDummy-v0"


def test_an_environment_whose_keyword_or_class_is_gone_is_one_sentence(make_dataset, datasets_root):
    make_dataset()
    respecify(datasets_root, kwargs={"gone": 1})
    with pytest.raises(UserError, match=r"can't be made \(TypeError: .*or set episodes=0"):
        environment_of("dummy/random-v0")
    gym.register("Gone-v0", entry_point="conftest:Gone", disable_env_checker=True)
    try:
        respecify(datasets_root, id="Gone-v0", entry_point="conftest:Gone", kwargs={})
        with pytest.raises(UserError, match=r"can't be made \(AttributeError: .*or set episodes=0"):
            environment_of("dummy/random-v0")
    finally:
        del gym.registry["Gone-v0"]


class Seen(gym.Env):
    observation_space = gym.spaces.Dict({"a": BOX, "b": gym.spaces.Discrete(3)})
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


def test_a_dataset_that_keeps_part_of_a_dict_is_rolled_out_with_that_part():
    gym.register("Seen-v0", entry_point=f"{__name__}:Seen", disable_env_checker=True)
    try:
        buffer = EpisodeBuffer(
            observations={"a": np.zeros((3, 3), np.float32)},
            actions=np.zeros((2, 1), np.float32),
            rewards=np.ones(2),
            terminations=np.array([False, True]),
            truncations=np.zeros(2, bool),
        )
        kept = gym.spaces.Dict({"a": BOX})
        who = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "tests")
        minari.create_dataset_from_buffers(
            "mine/part-v0",
            [buffer],
            env=gym.spec("Seen-v0"),
            observation_space=kept,
            action_space=Seen.action_space,
            **who,
        )
        assert environment_of("mine/part-v0").observation_space == kept
    finally:
        del gym.registry["Seen-v0"]


LOCK = """
import h5py, sys
file = h5py.File(sys.argv[1], "a")
print("open", flush=True)
sys.stdin.read()
"""


def test_a_file_that_is_open_for_writing_is_to_be_waited_for(make_dataset, datasets_root):
    make_dataset("mine/random-v0")
    command = [sys.executable, "-c", LOCK, str(datasets_root / "mine/random-v0/data/main_data.hdf5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="another process has it open for writing; wait until that is done"):
            load_dataset("mine/random-v0", "mine")
        writer.stdin.close()


def test_a_set_of_a_newer_minari_says_so(make_dataset, datasets_root):
    make_dataset("mine/random-v0")
    path = datasets_root / "mine/random-v0/data/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"minari_version": "99.0.0"}))
    with pytest.raises(
        UserError, match=r"99\.0\.0.*install the version of Minari that it was made with, or a newer one"
    ):
        load_dataset("mine/random-v0", "mine")


def test_to_delete_is_advised_where_the_data_come_back(datasets_root, dummy_domain):
    for dataset_id, advised in (("dummy/Steps-v0/expert-4-seed0-v0", True), ("mine/own-v0", False)):
        (datasets_root / dataset_id / "data").mkdir(parents=True)
        with pytest.raises(UserError) as raised:
            load_dataset(dataset_id, "mine")
        assert ("delete that folder" in str(raised.value)) == advised


def test_an_id_without_its_version_is_answered_with_the_nearest(make_dataset, datasets_root):
    make_dataset("mine/walk-v0")
    (datasets_root / "mine/walk-v0-backup/data").mkdir(parents=True)
    with pytest.raises(UserError, match=r"an id ends in its version, such as -v0\). Did you mean 'mine/walk-v0'\?"):
        load_dataset("mine/walk", "mine")
    with pytest.raises(UserError, match=r"Did you mean 'mine/walk-v0'\?"):
        load_dataset("mine/walc-v0", "mine")


def test_none_is_null_and_no_name_of_a_folder(run, base, make_dataset, tmp_path):
    make_dataset("mine/random-v0")
    arguments = ["task=minari/mine/random-v0", f"base={base}", "adapter=none", "steps=0", "episodes=0", "run_dir=None"]
    run("finetune", *arguments)
    assert not (tmp_path / "None").exists()
