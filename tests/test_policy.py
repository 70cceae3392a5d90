"""A loaded policy acts in an environment's own observations and actions as a rollout does."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import eva_rl
from eva_rl.data import interface_of
from eva_rl.data.trajectories import pack
from eva_rl.errors import UserError
from eva_rl.files import read_json, write_json
from eva_rl.model import CloningConfig, CloningMLP, DecisionTransformer, ModelConfig, policy_of, save_base
from eva_rl.policy import ActingPolicy
from eva_rl.prepared import leaves, prepared
from eva_rl.rollout import Job, Simulators, rollout
from eva_rl.spaces import action_rows, spaces_to_text, together

OBSERVATIONS = {
    "vector": spaces.Box(-5.0, 5.0, (3,), np.float32),
    "matrix": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    "image": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "grid": spaces.Box(0, 9, (5, 5, 2), np.uint8),
    "ids": spaces.Box(0, 30, (6,), np.int64),
    "words": spaces.MultiDiscrete([7, 4, 9]),
    "choice": spaces.Discrete(5, start=2),
    "switches": spaces.MultiBinary(4),
    "dict": spaces.Dict(
        {
            "z": spaces.Box(-1, 1, (2,), np.float32),
            "image": spaces.Box(0, 255, (36, 36), np.uint8),
            "b": spaces.Discrete(3),
        }
    ),
    "screen": spaces.Box(0, 255, (140, 100, 3), np.uint8),
    "text": spaces.Text(12, charset="ab c"),
    "mission": spaces.Dict({"mission": spaces.Text(12, charset="ab c"), "at": spaces.Box(-1, 1, (2,), np.float32)}),
    "clock": spaces.Dict(
        {
            "since": spaces.Box(1.7e9, 1.7e9 + 10, (2,), np.float64),
            "b": spaces.Discrete(3),
            "x": spaces.Box(-1, 1, (2,), np.float32),
        }
    ),
    "tuple": spaces.Tuple([spaces.Discrete(3, start=-1), spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float64)})]),
}
ACTIONS = {
    "numbers": spaces.Box(np.array([-0.1, -2.0], np.float32), np.array([0.1, 3.0], np.float32)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    "one": spaces.Discrete(4, start=3),
    "several": spaces.MultiDiscrete([3, 5], start=[1, -2]),
    "switches": spaces.MultiBinary(3),
    "parts": spaces.Dict(
        {
            "grip": spaces.Discrete(3, start=2),
            "arm": spaces.Box(-1, np.array([[0.5], [2.0]], np.float32), (2, 1), np.float32),
            "keys": spaces.Tuple([spaces.MultiDiscrete([2, 4], start=[1, 0]), spaces.MultiBinary(2)]),
        }
    ),
    "numbers apart": spaces.Tuple([spaces.Box(-1, 1, (2,), np.float32), spaces.Box(-1.0, 1.5, (1,), np.float64)]),
}
STEPS = 25


class Diary(gym.Env):
    """Shows random observations, pays for what is done, and writes down what happened."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space, self.action_space = observation_space, action_space
        self.days: list[list] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.days.append([self.observation_space.sample()])
        return self.days[-1][0], {}

    def step(self, action):
        reward = float(np.sin(sum(np.sum(value) for _, value in leaves(self.action_space, action))))
        self.days[-1] += [action, reward]
        self.days.append([self.observation_space.sample()])
        return self.days[-1][0], reward, False, len(self.days) > STEPS, {}


def random_episode(env: Diary) -> dict:
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(STEPS):
        env.step(env.action_space.sample())
    days, env.days = env.days[:-1], []
    observations, actions, rewards = zip(*days, strict=True)
    batch = gym.vector.utils.concatenate(
        env.observation_space, observations, gym.vector.utils.create_empty_array(env.observation_space, len(days))
    )
    done = together(env.action_space, actions)
    return {"observations": batch, "actions": done, "rewards": np.array(rewards), "success": None}


def check_alike(space: gym.Space, action, expected) -> None:
    """Both are actions of the space, or batches of them, and the same but for rounding."""
    np.testing.assert_allclose(action_rows(space, action), action_rows(space, expected), rtol=0, atol=1e-5)


def make_checkpoint(folder: Path, env: Diary, cloning: bool = False, interface: str = "toy") -> Path:
    torch.manual_seed(0)
    episode = random_episode(env)
    observation_space = prepared(env.observation_space, lambda: [episode["observations"]])
    trajectories = pack("toy/Diary", [episode], observation_space, env.action_space)
    interface = interface_of(interface, [trajectories])
    model = DecisionTransformer(ModelConfig(2, 2, 16, 8, 0.0, ("return", "state", "action", "reward")), [interface])
    if cloning:
        model = CloningMLP(CloningConfig(width=16, bounded=False), interface)
    for p in model.parameters():  # larger than at a start, so that every token matters
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.3)
    save_base(folder, model, {"toy/Diary": trajectories.statistics()}, "toy/Diary")
    return folder


def rolled_out(policy: ActingPolicy, env: Diary, target: float) -> list[list]:
    """The observation, action and reward of each step of a rollout."""
    make = policy_of(policy.model, policy.interface.name)
    with Simulators(0) as simulators:
        rollout(make, policy.interface, [Job("toy/Diary", lambda: env, 1, target)], simulators)
    return env.days[:-1]


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        pair if pair[0] == "vector" or pair[1] in ("numbers", "parts") else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(OBSERVATIONS, ACTIONS)
    ],
)
def test_it_acts_as_a_rollout_does_on_every_kind_of_observation_and_action(observations, actions, tmp_path):
    env = Diary(OBSERVATIONS[observations], ACTIONS[actions])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env))
    days = rolled_out(policy, env, 3.0)
    assert len(days) == STEPS
    policy.reset(target_return=3.0)
    for observation, expected, reward in days:
        action = policy.act(observation)
        assert env.action_space.contains(action)
        check_alike(env.action_space, action, expected)
        policy.observe(reward)
    assert len({str(action) for _, action, _ in days}) > 1 or actions == "one" or observations == "screen"


def test_a_cloned_network_acts_as_its_rollout_does(tmp_path):
    env = Diary(OBSERVATIONS["dict"], ACTIONS["numbers"])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env, cloning=True))
    for observation, expected, _ in rolled_out(policy, env, 0.0):
        np.testing.assert_allclose(policy.act(observation), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [("vector", "numbers"), ("dict", "numbers"), ("mission", "numbers"), ("tuple", "numbers"), ("vector", "parts")],
)
def test_several_episodes_at_once_act_as_each_would_alone(observations, actions, tmp_path):
    env = Diary(OBSERVATIONS[observations], ACTIONS[actions])
    several, alone = (eva_rl.load_policy(make_checkpoint(tmp_path / "model", env)) for _ in range(2))
    env.observation_space.seed(0)
    rng = np.random.default_rng(0)
    seen = [[env.observation_space.sample() for _ in range(3)] for _ in range(STEPS)]
    rewards = rng.normal(size=(STEPS, 3))
    expected = np.empty((STEPS, 3), object)
    for episode, target in enumerate((1.0, 2.0, 3.0)):
        alone.reset(target)
        for step in range(STEPS):
            expected[step, episode] = alone.act(seen[step][episode])
            alone.observe(rewards[step, episode])
    several.reset([1.0, 2.0, 3.0])
    running = [0, 1, 2]
    for step in range(STEPS):
        if step == 12:
            several.keep([0, 2])
            running = [0, 2]
        empty = gym.vector.utils.create_empty_array(env.observation_space, len(running))
        rows = [seen[step][episode] for episode in running]
        batch = gym.vector.utils.concatenate(env.observation_space, rows, empty)
        action = several.act_batch(batch)
        check_alike(env.action_space, action, together(env.action_space, expected[step, running]))
        several.observe(rewards[step, running], action)


def test_what_was_done_in_the_end_and_what_it_earned_count(tmp_path):
    env = Diary(OBSERVATIONS["vector"], ACTIONS["one"])
    policy, other = (eva_rl.load_policy(make_checkpoint(tmp_path / "model", env)) for _ in range(2))
    logits = []
    for one in (policy, other):
        one.reset(1.0)
        assert one.act(np.ones(3)) in range(3, 7)
    policy.observe(0.0)
    other.observe(0.5, action=3 if policy._actor.policy.now.actions[0, 0] else 4)
    for one in (policy, other):
        one.act(np.ones(3))
        logits.append(one._actor.policy.tokens[0, :8].clone())
    changed = (logits[0] != logits[1]).any(-1).tolist()  # two steps of return, state, action, reward
    assert changed[:6] == [False, False, True, True, True, False]
    assert policy._actor.wanted == [1.0]
    assert other._actor.wanted == [0.5]


def test_without_rewards_the_same_return_is_asked_for_throughout(tmp_path):
    env = Diary(OBSERVATIONS["vector"], ACTIONS["numbers"])
    silent, told = (eva_rl.load_policy(make_checkpoint(tmp_path / "model", env)) for _ in range(2))
    told.reset()
    for step in range(STEPS):
        observation = np.full(3, step / STEPS)
        np.testing.assert_array_equal(silent.act(observation), told.act(observation))  # silent was not even reset
        told.observe(0.0)


def test_it_asks_for_what_an_evaluation_would(tmp_path):
    env = Diary(OBSERVATIONS["vector"], ACTIONS["numbers"])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env))
    policy.reset()
    assert policy._actor.wanted == [policy.statistics.return_typical]
    policy.reset("max")
    assert policy._actor.wanted == [policy.statistics.return_max]
    for wrong in ("sweep", "much", float("nan"), [1.0, float("inf")], [], ["a"]):
        with pytest.raises(UserError, match="target_return must be "):
            policy.reset(wrong)


@pytest.mark.parametrize(
    ("observation", "said"),
    [
        (np.ones(4), r"of shape \(4,\), where they end in \(3,\)"),
        (torch.ones(3, requires_grad=True), "another kind of value"),
        (np.ones((1, 3)), "of other shapes"),
        (np.array([1.0, np.nan, 0.0]), "NaN or infinite"),
        ("left", "another kind of value"),
        ({"a": 1.0}, "another kind of value"),
        (None, "another kind of value|of other shapes"),
    ],
)
def test_what_is_no_observation_is_refused_in_one_sentence(observation, said, tmp_path):
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", Diary(OBSERVATIONS["vector"], ACTIONS["numbers"])))
    with pytest.raises(UserError, match=r"'toy/Diary' has observations Box.*" + f"({said})"):
        policy.act(observation)


def test_calls_out_of_turn_are_refused(tmp_path):
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", Diary(OBSERVATIONS["vector"], ACTIONS["numbers"])))
    with pytest.raises(UserError, match="act\\(\\) comes first"):
        policy.observe(1.0)
    policy.act_batch(np.ones((2, 3)))
    for reward in (np.nan, [1.0, 2.0, 3.0]):
        with pytest.raises(UserError, match="must be 2 finite numbers"):
            policy.observe(reward)
    with pytest.raises(UserError, match=r"The action must be 2 of Box.*, got \[1.0\]"):
        policy.observe(1.0, action=[1.0])
    with pytest.raises(UserError, match="The action must be 2 of Box"):
        policy.observe(1.0, action=np.full((2, 2), np.nan))
    with pytest.raises(UserError, match="each of the 2 episodes that are running, got 1"):
        policy.act(np.ones(3))
    for kept in ([2], [-1], [], [True, False], [1, 1], [0.5]):
        with pytest.raises(UserError, match="there are 2, numbered from 0"):
            policy.keep(kept)
    choices = eva_rl.load_policy(make_checkpoint(tmp_path / "other", Diary(OBSERVATIONS["vector"], ACTIONS["one"])))
    choices.act(np.ones(3))
    for action in (99, -1, 3.7, np.nan):
        with pytest.raises(UserError, match="must be 1 of Discrete"):
            choices.observe(1.0, action=action)
    choices.observe(1.0, action=4)
    parts = eva_rl.load_policy(make_checkpoint(tmp_path / "parts", Diary(OBSERVATIONS["vector"], ACTIONS["parts"])))
    right = parts.act(np.ones(3))
    wrong = ({"grip": 9}, {"grip": 2.5}, {"keys": (np.array([1, 0]),)}, {"arm": np.full((2, 1), np.nan)})
    for action in (*({**right, **one} for one in wrong), {}, 3, [right]):
        with pytest.raises(UserError, match="must be 1 of Dict"):
            parts.observe(1.0, action=action)
    parts.observe(1.0, action=right)
    for target in ([[1.0, 2.0], [3.0, 4.0]], [], [np.nan]):
        with pytest.raises(UserError, match="a finite number, or one for each episode"):
            parts.reset(target)


def test_a_run_with_an_adapter_and_its_merged_checkpoint_act_alike(run, base, tmp_path):
    words = [
        "task=dummy/Steps-v0",
        f"base={base}",
        "adapter=lora",
        "steps=3",
        "training.learning_rate=0.1",
        "episodes=0",
    ]
    assert run("finetune", *words, "demonstrations=4", f"run_dir={tmp_path / 'run'}")[0] == 0
    policy = eva_rl.load_policy(tmp_path / "run")
    assert policy.task == "dummy/Steps-v0"
    before = eva_rl.load_policy(base, "dummy/Steps-v0").act(np.ones(3, np.float32))
    assert run("merge", f"run={tmp_path / 'run'}")[0] == 0
    merged = eva_rl.load_policy(tmp_path / "run" / "model")
    assert merged.task == "dummy/Steps-v0"
    for step in range(12):
        observation = np.full(3, step, np.float32)
        np.testing.assert_allclose(policy.act(observation), merged.act(observation), atol=1e-5)
    merged.reset()
    assert np.abs(merged.act(np.ones(3, np.float32)) - before).max() > 1e-3  # the adapter is in it
    (tmp_path / "acts.py").write_text(WITHOUT)
    command = [sys.executable, tmp_path / "acts.py", tmp_path / "run" / "model", tmp_path / "actions.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged.reset()
    actions = [merged.act(np.full(3, step, np.float32)) for step in range(12)]
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), actions, atol=1e-6)


WITHOUT = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        missing = ("hydra", "omegaconf", "peft", "minari", "transformers", "mujoco", "metaworld", "dm_control", "ale_py", "minigrid")
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"no {name} here")

sys.meta_path.insert(0, Refused())
import numpy as np
import eva_rl

policy = eva_rl.load_policy(sys.argv[1])
np.save(sys.argv[2], [policy.act(np.full(3, step, np.float32)) for step in range(12)])
"""


def test_the_package_alone_is_imported_at_once_and_without_torch():
    code = "import sys, time; t = time.process_time(); import eva_rl; print(time.process_time() - t, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch_there = done.stdout.split()
    assert float(seconds) < 0.3
    assert torch_there == "False"
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        eva_rl.load_polcy  # noqa: B018


def test_the_shipped_bases_act_in_their_tasks():
    assert eva_rl.load_policy("mt40-small", "metaworld/hammer-v3").act(np.zeros(39)).shape == (
        4,
    )  # it reads no returns
    policy = eva_rl.load_policy("mt40-small", "metaworld/reach-v3")
    assert policy.action_space.contains(policy.act(np.zeros(39)))
    policy = eva_rl.load_policy("multi-small", "babyai/GoToRedBallGrey-v0")
    assert policy.act(policy.observation_space.sample()) in range(7)
    with pytest.raises(UserError, match=r"'mt40-small' knows 40 tasks: say in which"):
        eva_rl.load_policy("mt40-small")
    with pytest.raises(
        UserError, match=r"'multi-small' can't act in 'gym/Pendulum-v1', of whose observations it knows nothing"
    ):
        eva_rl.load_policy("multi-small", "gym/Pendulum-v1")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("metaworld/hamer-v3", "There is no task 'metaworld/hamer-v3'. Did you mean 'metaworld/hammer-v3'"),
        ("metaword/reach-v3", "There is no task 'metaword/reach-v3'"),
        ("gym/Pendulum-v1", "can't act in 'gym/Pendulum-v1', of whose observations it knows nothing"),
        ("minari/mine/logs-v0", "can't act in 'minari/mine/logs-v0', of whose observations it knows nothing"),
    ],
)
def test_a_task_of_another_name_is_refused_where_there_is_one_interface_too(task, said):
    with pytest.raises(UserError, match=re.escape(said)):
        eva_rl.load_policy("mt40-small", task)


def test_spaces_that_a_checkpoint_does_not_know_have_to_be_given(tmp_path):
    env = Diary(OBSERVATIONS["vector"], ACTIONS["one"])
    folder = make_checkpoint(tmp_path / "model", env)
    config = read_json(folder / "config.json")
    del config["interfaces"][0]["spaces"]
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="give observation_space=env"):
        eva_rl.load_policy(folder)
    given = {"observation_space": env.observation_space, "action_space": env.action_space}
    assert eva_rl.load_policy(folder, **given).act(np.ones(3)) in range(3, 7)
    with pytest.raises(UserError, match="are not those of the interface 'toy'"):
        eva_rl.load_policy(folder, **given | {"action_space": spaces.Discrete(5)})


@pytest.mark.parametrize("kind", ["clock", "mission", "screen"])
def test_an_environments_own_spaces_are_seen_as_the_checkpoint_sees_them(kind, tmp_path):
    env = Diary(OBSERVATIONS[kind], ACTIONS["one"])
    folder = make_checkpoint(tmp_path / "model", env)
    known, given = (eva_rl.load_policy(folder, **own) for own in ({}, {"observation_space": env.observation_space}))
    for policy in (known, given):
        policy.reset()
    for seed in range(3):
        env.observation_space.seed(seed)
        shown = env.observation_space.sample()
        assert known.act(shown) == given.act(shown)
    assert known.observation_space == given.observation_space


def test_where_there_is_nothing_all_that_may_be_named_is_said(tmp_path):
    with pytest.raises(UserError, match=f"There is no run, checkpoint or base '{tmp_path}/nope': name a folder"):
        eva_rl.load_policy(tmp_path / "nope")


def test_a_damaged_description_of_spaces_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "model", Diary(OBSERVATIONS["vector"], ACTIONS["one"]))
    config = read_json(folder / "config.json")
    for text in (
        '{"observation": {"space": "os.system"}}',
        "{",
        '{"observation": {"space": "Discrete", "n": 0, "start": 0}}',
        '{"observation": {"space": "Box", "dtype": "float32", "low": [0], "high": [1], "shape": [1000000, 1000000]}, "action": {}}',
        '{"observation": ' + '{"space": "Tuple", "members": [' * 10**4,
        spaces_to_text(spaces.MultiDiscrete([]), ACTIONS["one"]),
    ):
        config["interfaces"][0]["spaces"] = text
        write_json(folder / "config.json", config)
        with pytest.raises(UserError, match=r"is damaged: its interface 'toy'|there is nothing in them"):
            eva_rl.load_policy(folder)


def test_a_task_of_which_nothing_is_known_needs_a_return(tmp_path):
    env = Diary(OBSERVATIONS["vector"], ACTIONS["one"])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env, interface="metaworld"), "metaworld/push-v3")
    with pytest.raises(UserError, match="set target_return to a number"):
        policy.act(np.ones(3))
    policy.reset(2.0)
    assert policy.act(np.ones(3)) in range(3, 7)
