"""The DeepMind Control Suite's tasks: seeded episodes, flat observations, repeated actions, and experts that solve them."""

import importlib
import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from eva_rl.envs import expand_tasks, find_task
from eva_rl.envs.dmc import ACTION_REPEATS, DOMAIN, EPISODE_LENGTH, HELD_OUT
from eva_rl.errors import MissingExtra, UserError

pytest.importorskip("dm_control")

CARTPOLE = "cartpole-balance"


@pytest.fixture(scope="module")
def cartpole():
    env = DOMAIN.make(CARTPOLE)
    yield env
    env.close()


def rollout(env: gym.Env, name: str, seed: int, steps: int = EPISODE_LENGTH, policy: str = "expert"):
    """Observations (T + 1, obs_dim) and rewards (T,) of an episode, cut off after so many steps."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    act = DOMAIN.expert(name, env) if policy == "expert" else lambda observation: env.action_space.sample()
    observations, rewards, truncated = [observation], [], False
    while not truncated and len(rewards) < steps:
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        assert not terminated
        observations.append(observation)
        rewards.append(reward)
    return np.stack(observations), np.array(rewards)


def assert_same(one, other) -> None:
    for values, others in zip(one, other, strict=True):
        np.testing.assert_array_equal(values, others)


def test_every_task_is_one_of_the_suites():
    from dm_control import suite

    assert len(DOMAIN.tasks) == 10
    assert {tuple(name.split("-", 1)) for name in DOMAIN.tasks} <= set(suite.ALL_TASKS)


def test_training_and_held_out_tasks_are_disjoint_and_make_all():
    assert not set(DOMAIN.splits["train"]) & set(HELD_OUT)
    assert sorted((*DOMAIN.splits["train"], *HELD_OUT)) == sorted(DOMAIN.tasks) == sorted(DOMAIN.splits["all"])


def test_tasks_have_interfaces_of_their_own_named_after_them():
    assert DOMAIN.interface("ball_in_cup-catch") == "dmc_ball_in_cup_catch"
    assert len({DOMAIN.interface(name) for name in DOMAIN.tasks}) == len(DOMAIN.tasks)


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_observations_are_flat_float32_and_actions_fill_the_unit_box(name):
    env = DOMAIN.make(name)
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    observation, _ = env.reset(seed=0)
    after, reward, *_ = env.step(env.action_space.sample())
    env.reset(seed=0)
    action = DOMAIN.expert(name, env)(observation)
    env.close()
    for seen in (observation, after):
        assert seen.ndim == 1
        assert seen.dtype == np.float32
        assert env.observation_space.contains(seen)
    assert type(reward) is float
    assert env.action_space.contains(action)


def test_an_observation_is_the_suites_parts_in_their_order(cartpole):
    observation, _ = cartpole.reset(seed=0)
    (position, angle), velocities = cartpole.unwrapped.physics.data.qpos, cartpole.unwrapped.physics.data.qvel
    np.testing.assert_allclose(observation, [position, np.cos(angle), np.sin(angle), *velocities], rtol=1e-6)


def test_the_ends_of_the_action_box_are_the_ends_of_the_motors_range(cartpole):
    physics = cartpole.unwrapped.physics
    low, high = physics.model.actuator_ctrlrange.T
    for action, bound in ((-1, low), (1, high), (5, high)):
        cartpole.reset(seed=0)
        cartpole.step(np.full(1, action, np.float32))
        np.testing.assert_allclose(physics.data.ctrl, bound)


@pytest.mark.parametrize("name", ["cartpole-balance", "pendulum-swingup"])
def test_an_action_is_repeated_and_its_rewards_summed(name):
    env = DOMAIN.make(name)
    single = gym.make(env.spec, action_repeat=1)
    env.reset(seed=3)
    single.reset(seed=3)
    action = np.full(1, 0.3, np.float32)
    for _ in range(5):
        observation, reward, *_ = env.step(action)
        steps = [single.step(action) for _ in range(ACTION_REPEATS[name])]
        np.testing.assert_array_equal(observation, steps[-1][0])
        assert reward == pytest.approx(sum(step[1] for step in steps))
    env.close()
    single.close()


@pytest.mark.parametrize("name", ["cartpole-balance", "finger-spin"])
def test_an_episode_is_truncated_after_a_thousand_steps_of_the_suite(name):
    env = DOMAIN.make(name)
    _, rewards = rollout(env, name, seed=0, policy="random")
    env.close()
    assert len(rewards) * ACTION_REPEATS[name] == 1000


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_same_seed_gives_the_same_episode_whatever_came_before(name):
    used, fresh = DOMAIN.make(name), DOMAIN.make(name)
    first = rollout(used, name, seed=11, steps=3)
    rollout(used, name, seed=12, steps=2)
    np.random.seed(0)  # noqa: NPY002 (global state must not matter)
    assert_same(first, rollout(used, name, seed=11, steps=3))
    assert_same(first, rollout(fresh, name, seed=11, steps=3))
    used.close()
    fresh.close()


def test_other_seeds_are_other_episodes():
    env = DOMAIN.make("reacher-easy")
    starts = {tuple(env.reset(seed=seed)[0]) for seed in range(20)}
    env.close()
    assert len(starts) == 20


def test_resets_without_a_seed_follow_from_the_last_seed(cartpole):
    def starts() -> list[np.ndarray]:
        return [cartpole.reset(seed=5)[0], cartpole.reset()[0], cartpole.reset()[0]]

    first = starts()
    np.testing.assert_array_equal(first, starts())
    assert len({tuple(start) for start in first}) == 3


def test_the_spec_makes_the_environment_again_after_a_round_trip_through_json(cartpole):
    recreated = gym.make(EnvSpec.from_json(json.dumps(json.loads(cartpole.spec.to_json()))))
    assert recreated.spec.max_episode_steps == 125
    assert_same(rollout(cartpole, CARTPOLE, seed=4, steps=20), rollout(recreated, CARTPOLE, seed=4, steps=20))
    recreated.close()


def test_a_task_and_a_split_are_found_by_their_ids():
    assert find_task("dmc/walker-walk") == (DOMAIN, "walker-walk")
    assert expand_tasks("dmc/heldout") == tuple(f"dmc/{name}" for name in HELD_OUT)


@pytest.mark.parametrize("find", [find_task, expand_tasks])
def test_an_unknown_task_is_answered_with_the_nearest(find):
    with pytest.raises(UserError, match=r"'dmc/walker-wlk'.*'dmc/walker-walk'"):
        find("dmc/walker-wlk")


@pytest.mark.parametrize("ask", [lambda: DOMAIN.make(CARTPOLE), lambda: DOMAIN.expert(CARTPOLE, None)])
def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch, ask):
    def not_installed(module: str):
        raise ModuleNotFoundError(f"No module named '{module}'", name="dm_control")

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingExtra, match=r"'dm_control', which is not installed: .*'eva_rl\[dmc\]'"):
        ask()


def test_tasks_are_listed_without_the_simulator(monkeypatch):
    monkeypatch.setattr(DOMAIN, "require", lambda module: pytest.fail(f"{module} was imported"))
    assert expand_tasks("dmc/all")
    assert find_task("dmc/finger-spin")


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("ball_in_cup-catch", 800),
        ("cartpole-balance", 950),
        ("cartpole-swingup", 500),
        ("pendulum-swingup", 500),
        ("point_mass-easy", 700),
        ("reacher-easy", 800),
        pytest.param("cheetah-run", 400, marks=pytest.mark.slow),
        pytest.param("finger-spin", 500, marks=pytest.mark.slow),
        pytest.param("hopper-stand", 200, marks=pytest.mark.slow),
        pytest.param("walker-walk", 500, marks=pytest.mark.slow),
    ],
)
def test_the_expert_earns_most_of_the_return_where_random_actions_do_not(name, least):
    env = DOMAIN.make(name)
    expert, random = (rollout(env, name, seed=3, policy=policy)[1].sum() for policy in ("expert", "random"))
    env.close()
    assert least < expert <= 1000
    assert random < 0.4 * expert


def test_every_task_has_a_score_scale():
    for name in DOMAIN.tasks:
        scores = DOMAIN.reference_scores(name)
        assert 0 <= scores.random < 0.4 * scores.expert
        assert scores.expert <= 1000
