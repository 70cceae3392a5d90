"""Actions of several parts, a Dict's or Tuple's: their loss, and the whole way from a dataset to a file that acts."""

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

import eva_rl
from eva_rl.data import interface_of, load_dataset
from eva_rl.data.windows import WindowSampler
from eva_rl.errors import UserError
from eva_rl.model import DecisionTransformer, ModelConfig

HAND = spaces.Dict(
    {
        "arm": spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32)),
        "fingers": spaces.MultiDiscrete([2, 3], start=[1, 0]),
        "grip": spaces.Tuple([spaces.Discrete(3, start=5)]),
    }
)


class Hand(gym.Env):
    """Pays for an arm at the place that it shows, and a grip of 6 wherever that is right of the middle, else of 7."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = HAND

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._shown(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        right = abs(action["arm"][0] - self.place) < 0.3 and action["grip"][0] == right_grip(self.place)
        return self._shown(), float(right), self.steps == 20, False, {}

    def _shown(self):
        self.place = self.np_random.uniform(-1, 1)
        return np.array([self.place], np.float32)


def right_grip(place: float) -> int:
    return 6 if place > 0 else 7


@pytest.fixture(params=["hdf5", pytest.param("arrow", marks=pytest.mark.slow)])
def dataset(request) -> str:
    """Twenty episodes of the right actions."""
    if request.param == "arrow":
        pytest.importorskip("pyarrow")
    if "Hand-v0" not in gym.registry:
        gym.register("Hand-v0", entry_point=f"{__name__}:Hand", disable_env_checker=True)
    buffers = []
    for seed in range(20):
        env, rng = gym.make("Hand-v0"), np.random.default_rng(seed)
        seen, done = [env.reset(seed=seed)[0]], []
        for _ in range(20):
            arm = np.array([seen[-1][0], 2.0], np.float32)
            fingers = np.array([1 + rng.integers(2), 2])
            done.append({"arm": arm, "fingers": fingers, "grip": (np.int64(right_grip(seen[-1][0])),)})
            seen.append(env.step(done[-1])[0])
        ends = np.arange(20) == 19
        steps = {"rewards": np.ones(20), "terminations": ends, "truncations": ~ends & ends}
        buffers.append(EpisodeBuffer(id=seed, observations=np.stack(seen), actions=stacked(done), **steps))
    with pytest.warns(UserWarning, match="is set to None"):
        minari.create_dataset_from_buffers("toy/hand-v0", buffers, env="Hand-v0", data_format=request.param)
    return "toy/hand-v0"


def stacked(actions):
    columns = {key: np.stack([action[key] for action in actions]) for key in ("arm", "fingers")}
    return {**columns, "grip": (np.stack([action["grip"][0] for action in actions]),)}


def test_a_datasets_actions_are_rows_of_numbers_and_choices(dataset):
    trajectories = load_dataset(dataset, "toy/hand", 2)
    assert trajectories.actions.shape == (40, 5)
    torch.testing.assert_close(trajectories.actions[:, 0], trajectories.observations[:, 0])
    assert trajectories.actions[:, 3].unique().tolist() == [2.0]  # choices count from 0
    assert set(trajectories.actions[:, 4].tolist()) == {1.0, 2.0}
    interface = interface_of("toy", [trajectories])
    assert (interface.action_size, interface.action_shape) == (2 + 2 + 3 + 3, (5,))
    assert interface.action_mean[2:] == (0.0, 0.0, 0.0)
    assert interface.in_words == "observations of size 1 and actions of 2 numbers and 2 x 3 choices and 3 choices"


def test_the_loss_is_the_sum_of_the_parts_losses(dataset):
    trajectories = load_dataset(dataset, "toy/hand", 2)
    interface = interface_of("toy", [trajectories])
    torch.manual_seed(0)
    model = DecisionTransformer(ModelConfig(1, 2, 16, 8, 0.0, ("state", "action")), [interface]).eval()
    batch = WindowSampler([trajectories], "toy", 8, 16, 0).batch(0)
    found, log = model(batch)[batch.mask], torch.log_softmax
    wanted = batch.actions[batch.mask]
    place = (wanted[:, :2] - torch.tensor(interface.action_mean[:2])) / torch.tensor(interface.action_scale[:2])
    rows, choice = torch.arange(len(wanted)), wanted[:, 2:].long()
    arm = (found[:, :2] - place).square().mean()
    first, second, grip = (-log(found[:, at], -1)[rows, choice[:, i]] for i, at in enumerate(CUTS))
    expected = arm + (first.mean() + second.mean()) / 2 + grip.mean()
    torch.testing.assert_close(model.loss(batch), expected)


CUTS = slice(2, 4), slice(4, 7), slice(7, 10)


def test_choices_that_there_are_not_are_refused(dataset):
    trajectories = load_dataset(dataset, "toy/hand", 2)
    assert trajectories.task == "toy/hand"
    from eva_rl.data.trajectories import pack

    actions = stacked([HAND.sample() for _ in range(3)])
    episode = {"observations": np.zeros((3, 1), np.float32), "actions": actions, "rewards": np.ones(3), "success": None}
    pack("toy/hand", [episode], Hand.observation_space, HAND)
    short = {**actions, "arm": actions["arm"][:2]}
    with pytest.raises(UserError, match="Episode 0 of the dataset of 'toy/hand' has 3 rewards, 2 or 3 actions"):
        pack("toy/hand", [{**episode, "actions": short}], Hand.observation_space, HAND)
    actions["grip"][0][1] = 9
    with pytest.raises(UserError, match=r"has actions outside Discrete\(3, start=5\)"):
        pack("toy/hand", [episode], Hand.observation_space, HAND)


@pytest.mark.parametrize("adapter", [pytest.param("bc", marks=pytest.mark.slow), "eva"])
def test_what_is_fine_tuned_on_them_plays_and_acts(adapter, dataset, run, base, tmp_path):
    words = [f"task=minari/{dataset}", f"base={base}", f"adapter={adapter}", "steps=250", "episodes=2", "workers=0"]
    words += ["training.batch_size=16", "training.learning_rate=0.005", f"run_dir={tmp_path / 'run'}"]
    status, _, err = run("finetune", *words)
    assert status == 0, err
    policy = eva_rl.load_policy(tmp_path / "run")
    rewards = []
    for seed in range(100, 105):
        env = gym.make("Hand-v0")
        observation, over = env.reset(seed=seed)[0], False
        policy.reset(20.0)
        while not over:
            action = policy.act(observation)
            assert set(action) == {"arm", "fingers", "grip"}
            observation, reward, over, _, _ = env.step(action)
            policy.observe(reward)
            rewards.append(reward)
    assert np.mean(rewards) > 0.8  # a guess of the grip alone is right half of the time
