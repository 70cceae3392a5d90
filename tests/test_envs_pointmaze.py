"""The mazes: their waypoint controller, their goals, and the seeds their episodes start from."""

import importlib
import importlib.util
import json
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from eva_rl.envs import expand_tasks, find_task
from eva_rl.envs.pointmaze import DOMAIN, EPISODE_LENGTHS, _waypoints
from eva_rl.errors import MissingExtra

needs_pointmaze = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None, reason="the extra pointmaze is not installed"
)

MAZE = [
    [1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 0, 1],
    [1, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1],
]


@pytest.fixture(scope="module")
def umaze():
    pytest.importorskip("gymnasium_robotics")
    env = DOMAIN.make("UMaze")
    yield env
    env.close()


def rollout(env: gym.Env, name: str, seed: int, steps: int = 1000, noise: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    expert = DOMAIN.expert(name, env)
    observations, rewards, successes, ended = [observation], [], [info["success"]], False
    while not ended and len(rewards) < steps:
        action = np.clip(expert(observation) + noise * rng.standard_normal(2), -1, 1).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        observations.append(observation)
        rewards.append(reward)
        successes.append(info["success"])
    return {
        "observations": np.stack(observations),
        "rewards": np.array(rewards),
        "successes": np.array(successes),
        "ended": np.array(ended),
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_train_and_heldout_are_disjoint_and_make_all_mazes():
    assert sorted((*DOMAIN.splits["train"], *DOMAIN.splits["heldout"])) == sorted(DOMAIN.tasks)
    assert DOMAIN.splits["all"] == DOMAIN.tasks
    assert expand_tasks("pointmaze/heldout") == ("pointmaze/Large",)
    assert find_task("pointmaze/UMaze") == (DOMAIN, "UMaze")
    assert {DOMAIN.interface(name) for name in DOMAIN.tasks} == {"pointmaze"}


def test_waypoints_are_the_turns_of_the_shortest_path():
    waypoints = _waypoints(MAZE, (3, 1))
    assert waypoints[1, 1] == waypoints[1, 2] == (1, 4)
    assert waypoints[1, 4] == waypoints[2, 4] == (3, 4)
    assert not {(3, 4), (3, 3), (3, 2), (3, 1)} & set(waypoints)  # from here on the way to the goal is straight
    assert all(MAZE[row][column] == 0 for row, column in waypoints)


@needs_pointmaze
@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_expert_reaches_every_goal_in_time_even_with_noise(name):
    env = DOMAIN.make(name)
    for seed in range(100, 110):
        episode = rollout(env, name, seed, noise=(0.0, 0.3)[seed % 2])
        assert episode["successes"][-1] == 1, seed
        assert len(episode["rewards"]) < EPISODE_LENGTHS[name]
    env.close()


@needs_pointmaze
def test_the_expert_beats_random_actions(umaze):
    umaze.action_space.seed(0)
    reached = []
    for seed in range(100, 110):
        umaze.reset(seed=seed)
        ended, success = False, 0.0
        while not ended:
            _, _, terminated, truncated, info = umaze.step(umaze.action_space.sample())
            ended, success = terminated or truncated, info["success"]
        reached.append(success)
    assert np.mean(reached) < 0.6


def test_reaching_the_goal_is_the_success_the_reward_and_the_end(umaze):
    episode = rollout(umaze, "UMaze", seed=3)
    assert episode["ended"]
    assert episode["rewards"].sum() == episode["rewards"][-1] == 1
    assert episode["successes"].sum() == episode["successes"][-1] == 1
    position, goal = episode["observations"][-1][:2], episode["observations"][-1][4:]
    assert np.linalg.norm(position - goal) <= 0.45
    assert np.linalg.norm(episode["observations"][-2][:2] - goal) > 0.45


def test_observations_and_actions_are_those_of_the_spaces(umaze):
    episode = rollout(umaze, "UMaze", seed=0, steps=20)
    assert umaze.observation_space.shape == (6,)
    assert all(umaze.observation_space.contains(observation) for observation in episode["observations"])
    assert umaze.action_space.contains(DOMAIN.expert("UMaze", umaze)(episode["observations"][0]))


def test_the_goal_is_observed_and_stays_for_the_episode(umaze):
    observations = rollout(umaze, "UMaze", seed=6)["observations"]
    np.testing.assert_array_equal(observations[:, 4:], np.tile(observations[0, 4:], (len(observations), 1)))
    np.testing.assert_allclose(observations[0, 4:], umaze.unwrapped.simulator.goal, rtol=1e-6)


@needs_pointmaze
@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_same_seed_gives_the_same_episode_whatever_came_before(name):
    used, fresh = DOMAIN.make(name), DOMAIN.make(name)
    first = rollout(used, name, seed=11)
    rollout(used, name, seed=12, steps=17, noise=0.3)
    assert_same(first, rollout(used, name, seed=11))
    assert_same(first, rollout(fresh, name, seed=11))
    used.close()
    fresh.close()


def test_every_seed_is_a_start_and_a_goal_of_its_own(umaze):
    assert len({umaze.reset(seed=seed)[0].tobytes() for seed in range(20)}) == 20


def test_no_episode_starts_in_its_goal(umaze):
    for seed in range(200):
        observation, info = umaze.reset(seed=seed)
        assert info["success"] == 0
        assert np.linalg.norm(observation[:2] - observation[4:]) > 0.45


def test_resets_without_a_seed_follow_from_the_last_seed(umaze):
    def starts() -> list[bytes]:
        return [umaze.reset(seed=seed)[0].tobytes() for seed in (5, None, None)]

    first = starts()
    assert first == starts()
    assert len(set(first)) == 3


@needs_pointmaze
@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_spec_makes_the_environment_again_after_a_round_trip_through_json(name):
    env = DOMAIN.make(name)
    recreated = gym.make(EnvSpec.from_json(json.dumps(json.loads(env.spec.to_json()))))
    assert recreated.spec.max_episode_steps == EPISODE_LENGTHS[name]
    assert_same(rollout(env, name, seed=4, steps=40), rollout(recreated, name, seed=4, steps=40))
    env.close()
    recreated.close()


@needs_pointmaze
def test_an_episode_is_truncated_at_its_time_limit(umaze):
    umaze.reset(seed=0)
    truncated, terminated, steps = False, False, 0
    while not (truncated or terminated):
        _, _, terminated, truncated, info = umaze.step(np.zeros(2, np.float32))
        steps += 1
    assert (steps, truncated, terminated, info["success"]) == (300, True, False, 0.0)


@needs_pointmaze
def test_an_environment_leaves_no_file_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    DOMAIN.make("UMaze").close()
    assert not list(Path(tmp_path).iterdir())


def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch):
    def not_installed(module: str):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingExtra, match=r"'gymnasium_robotics', which is not installed: .*'eva_rl\[pointmaze\]'"):
        DOMAIN.make("UMaze")
