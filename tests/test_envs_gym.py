"""Gymnasium's own tasks: their controllers, what counts as solved, and the seeds their episodes start from."""

import importlib
import importlib.util
import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from eva_rl.envs import expand_tasks, find_task
from eva_rl.envs.gym import (
    BOX2D,
    CLASSIC,
    DOMAIN,
    HELDOUT,
    REACHES_ITS_GOAL,
    SOLVED_RETURN,
    GymnasiumTask,
    lunar_lander,
)
from eva_rl.errors import MissingExtra

needs_box2d = pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="the extra box2d is not installed")
TASKS = [*CLASSIC, *(pytest.param(name, marks=needs_box2d) for name in BOX2D)]


def rollout(env: gym.Env, name: str, seed: int, steps: int = 2000, policy: str = "expert") -> dict[str, np.ndarray]:
    observation, info = env.reset(seed=seed)
    env.action_space.seed(seed)
    expert = DOMAIN.expert(name, env)
    observations, rewards, infos, ended = [observation], [], [info], False
    while not ended and len(rewards) < steps:
        action = expert(observation) if policy == "expert" else env.action_space.sample()
        assert env.action_space.contains(np.asarray(action, env.action_space.dtype))
        observation, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
    return {
        "observations": np.stack(observations),
        "rewards": np.array(rewards),
        "successes": np.array([info.get("success", np.nan) for info in infos]),
        "ended": np.array(ended),
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def returns(name: str, policy: str, seeds: range) -> float:
    env = DOMAIN.make(name)
    totals = [rollout(env, name, seed, policy=policy)["rewards"].sum() for seed in seeds]
    env.close()
    return float(np.mean(totals))


def test_train_and_heldout_are_disjoint_and_make_all_tasks():
    assert not set(DOMAIN.splits["train"]) & set(HELDOUT)
    assert sorted((*DOMAIN.splits["train"], *HELDOUT)) == sorted(DOMAIN.tasks) == sorted((*BOX2D, *CLASSIC))
    assert DOMAIN.splits["all"] == DOMAIN.tasks
    assert expand_tasks("gym/heldout") == tuple(f"gym/{name}" for name in HELDOUT)
    assert find_task("gym/CartPole-v1") == (DOMAIN, "CartPole-v1")


def test_every_task_is_registered_in_gymnasium_and_has_an_interface_of_its_own():
    assert set(DOMAIN.tasks) <= set(gym.registry)
    names = {DOMAIN.interface(name) for name in DOMAIN.tasks}
    assert len(names) == len(DOMAIN.tasks)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("name", TASKS)
def test_observations_are_flat_and_lie_in_their_space(name):
    env = DOMAIN.make(name)
    episode = rollout(env, name, seed=2, steps=150, policy="random")
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert isinstance(env.action_space, gym.spaces.Box | gym.spaces.Discrete)
    assert env.observation_space.dtype == np.float32
    assert all(env.observation_space.contains(observation) for observation in episode["observations"])
    assert env.spec.max_episode_steps == gym.spec(name).max_episode_steps
    env.close()


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_episode_whatever_came_before(name):
    used, fresh = DOMAIN.make(name), DOMAIN.make(name)
    first = rollout(used, name, seed=11, steps=120)
    rollout(used, name, seed=12, steps=37, policy="random")
    assert_same(first, rollout(used, name, seed=11, steps=120))
    assert_same(first, rollout(fresh, name, seed=11, steps=120))
    used.close()
    fresh.close()


@pytest.mark.parametrize("name", TASKS)
def test_every_seed_is_an_episode_of_its_own_and_resets_without_one_follow_from_the_last(name):
    env = DOMAIN.make(name)

    def second_observations(seed: int | None) -> bytes:  # BipedalWalker's terrain, say, shows only later
        env.reset(seed=seed)
        env.action_space.seed(0)
        return b"".join(env.step(env.action_space.sample())[0].tobytes() for _ in range(5))

    first = [second_observations(seed) for seed in (5, None, None)]
    assert len(set(first)) == 3
    assert first == [second_observations(seed) for seed in (5, None, None)]
    assert second_observations(6) not in first
    env.close()


@pytest.mark.parametrize("name", TASKS)
def test_the_spec_makes_the_environment_again_after_a_round_trip_through_json(name):
    env = DOMAIN.make(name)
    spec = EnvSpec.from_json(json.dumps(json.loads(env.spec.to_json())))
    recreated = gym.make(spec)
    assert isinstance(recreated.unwrapped, GymnasiumTask)
    assert recreated.spec.max_episode_steps == gym.spec(name).max_episode_steps
    assert_same(rollout(env, name, seed=4, steps=60), rollout(recreated, name, seed=4, steps=60))
    env.close()
    recreated.close()


@pytest.mark.parametrize("name", TASKS)
def test_the_dynamics_and_rewards_are_gymnasiums_own(name):
    ours, theirs = DOMAIN.make(name), gym.make(name, disable_env_checker=True)
    first, second = ours.reset(seed=3)[0], theirs.reset(seed=3)[0]
    ours.action_space.seed(1)
    for _ in range(60):
        np.testing.assert_array_equal(first, second)
        action = ours.action_space.sample()
        first, *mine, _ = ours.step(action)
        second, *others, _ = theirs.step(action)
        assert mine == others
        if any(mine[1:]):
            break
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("name", "at_least"),  # the return from which on Gymnasium counts the task as solved; Pendulum has no such mark
    [
        ("Acrobot-v1", -100),
        ("CartPole-v1", 475),
        ("MountainCar-v0", -120),
        ("MountainCarContinuous-v0", 90),
        ("Pendulum-v1", -250),
        pytest.param("LunarLander-v3", 200, marks=needs_box2d),
        pytest.param("LunarLanderContinuous-v3", 200, marks=needs_box2d),
    ],
)
def test_the_expert_solves_its_task_and_beats_random_actions(name, at_least):
    expert = returns(name, "expert", range(100, 108))
    assert expert >= at_least
    assert expert > returns(name, "random", range(100, 104)) + 50


NOTHING, LEFT, MAIN, RIGHT = range(4)  # the lander's actions


@pytest.mark.parametrize(
    ("observation", "engine"),  # x, y, their speeds, angle, its speed, left leg down, right leg down
    [
        ([0.0, 0.5, 0.0, -1.0, 0.0, 0.0, 0, 0], MAIN),  # falls fast
        ([0.0, 0.5, 0.0, -0.1, 0.3, 0.0, 0, 0], RIGHT),  # leans to one side
        ([0.0, 0.5, 0.0, -0.1, -0.3, 0.0, 0, 0], LEFT),  # to the other
        ([0.0, 0.5, 0.5, -0.1, 0.0, 0.0, 0, 0], LEFT),  # upright, but drifts
        ([0.0, 0.0, 0.0, 0.0, -0.3, 0.0, 1, 0], NOTHING),  # a leg stands on the pad
        ([0.4, 0.0, 0.0, 0.0, -0.3, 0.0, 1, 0], LEFT),  # a leg stands beside the pad
    ],
)
def test_the_lander_steers_until_it_stands_on_the_pad(observation, engine):
    assert lunar_lander(np.array(observation, np.float32)) == engine


@pytest.mark.slow
@needs_box2d
def test_the_lander_lands_in_nearly_every_episode():
    env = DOMAIN.make("LunarLander-v3")
    landed = [rollout(env, "LunarLander-v3", seed)["successes"][-1] for seed in range(100)]
    assert np.mean(landed) >= 0.95
    env.close()


@needs_box2d
def test_the_walker_walks_where_random_actions_fall():
    assert returns("BipedalWalker-v3", "expert", range(100, 103)) > 200
    assert returns("BipedalWalker-v3", "random", range(100, 103)) < 0


@pytest.mark.parametrize("name", [n for n in TASKS if n in REACHES_ITS_GOAL])
def test_reaching_the_goal_is_the_success_and_ends_the_episode(name):
    env = DOMAIN.make(name)
    episode = rollout(env, name, seed=1)
    assert episode["ended"]
    assert episode["successes"][-1] == 1
    assert not episode["successes"][:-1].any()
    assert not rollout(env, name, seed=1, steps=30)["successes"].any()
    env.close()


def test_cartpole_is_solved_by_standing_until_the_time_limit():
    env = DOMAIN.make("CartPole-v1")
    standing = rollout(env, "CartPole-v1", seed=1)["successes"]
    assert len(standing) == 501
    assert standing[-1] == 1
    assert not standing[:-1].any()
    assert not rollout(env, "CartPole-v1", seed=1, policy="random")["successes"].any()
    env.close()


@needs_box2d
@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_landing_is_a_success_with_two_hundred_points_at_its_end(policy):
    env = DOMAIN.make("LunarLander-v3")
    episode = rollout(env, "LunarLander-v3", seed=5, policy=policy)
    assert episode["ended"]
    assert episode["successes"][-1] == (episode["rewards"].sum() >= SOLVED_RETURN["LunarLander-v3"])
    assert episode["successes"][-1] == (policy == "expert")
    assert not episode["successes"][:-1].any()
    env.close()


def test_pendulum_does_not_speak_of_success():
    env = DOMAIN.make("Pendulum-v1")
    assert "success" not in env.reset(seed=0)[1]
    assert "success" not in env.step(env.action_space.sample())[-1]
    env.close()


@pytest.mark.parametrize("ask", [lambda: DOMAIN.make("LunarLander-v3"), lambda: DOMAIN.make("BipedalWalker-v3")])
def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch, ask):
    def not_installed(module: str):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingExtra, match=r"'Box2D', which is not installed: .*'eva_rl\[box2d\]'"):
        ask()


@pytest.mark.parametrize("name", CLASSIC)
def test_the_classic_tasks_need_no_extra(monkeypatch, name):
    monkeypatch.setattr(DOMAIN, "require", lambda module: pytest.fail(f"{module} was imported"))
    env = DOMAIN.make(name)
    rollout(env, name, seed=0, steps=3)
    env.close()
