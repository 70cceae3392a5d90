"""The domains, Meta-World's tasks, and the seeds their episodes start from."""

import importlib
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from hypothesis import given
from hypothesis import strategies as st

from eva_rl import envs
from eva_rl.envs import domains, expand_tasks, find_task
from eva_rl.envs.metaworld import CW10, DOMAIN, MT40, compiled_once
from eva_rl.errors import MissingExtra, UserError
from eva_rl.seeding import HALF, episode_rng, episode_seed

SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def reach():
    env = DOMAIN.make("reach-v3")
    yield env
    env.close()


def rollout(env: gym.Env, name: str, seed: int, steps: int = 200) -> dict[str, np.ndarray]:
    observation, info = env.reset(seed=seed)
    expert = DOMAIN.expert(name, env)
    observations, rewards, successes, truncated = [observation], [], [info["success"]], False
    while not truncated and len(rewards) < steps:
        observation, reward, terminated, truncated, info = env.step(expert(observation))
        assert not terminated
        observations.append(observation)
        rewards.append(reward)
        successes.append(info["success"])
    return {
        "observations": np.stack(observations),
        "rewards": np.array(rewards),
        "successes": np.array(successes),
        "truncated": np.array(truncated),
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_metaworld_lists_exactly_the_simulators_fifty_tasks():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert len(DOMAIN.tasks) == 50
    assert set(DOMAIN.tasks) == set(ALL_V3_ENVIRONMENTS)
    assert set(DOMAIN.tasks) <= set(ENV_POLICY_MAP)


def test_mt40_and_cw10_are_disjoint_and_make_the_fifty():
    assert (len(set(MT40)), len(set(CW10))) == (len(MT40), len(CW10)) == (40, 10)
    assert sorted((*MT40, *CW10)) == sorted(DOMAIN.tasks) == sorted(DOMAIN.splits["mt50"])


def test_every_domain_is_found_under_its_own_name_and_its_splits_hold_its_tasks():
    assert domains()["metaworld"] is DOMAIN
    for name, domain in domains().items():
        assert domain.name == name
        assert len(set(domain.tasks)) == len(domain.tasks)
        assert not set(domain.tasks) & set(domain.splits)
        for members in domain.splits.values():
            assert set(members) <= set(domain.tasks)


@pytest.mark.parametrize("name", ["reach-v3", "button-press-v3"])
def test_the_expert_succeeds_on_an_easy_task_within_its_episode(name):
    env = DOMAIN.make(name)
    episode = rollout(env, name, seed=3)
    env.close()
    assert episode["successes"].max() == 1
    assert episode["successes"][0] == 0


def test_an_episode_is_truncated_after_two_hundred_steps(reach):
    episode = rollout(reach, "reach-v3", seed=0, steps=300)
    assert episode["truncated"]
    assert len(episode["rewards"]) == 200


def test_the_same_seed_gives_the_same_episode_whatever_came_before(reach):
    first = rollout(reach, "reach-v3", seed=11, steps=60)
    rollout(reach, "reach-v3", seed=12, steps=17)
    np.random.seed(0)  # noqa: NPY002 (Meta-World's own environments draw from it)
    assert_same(first, rollout(reach, "reach-v3", seed=11, steps=60))
    fresh = DOMAIN.make("reach-v3")
    assert_same(first, rollout(fresh, "reach-v3", seed=11, steps=60))
    fresh.close()


def test_every_seed_is_a_goal_of_its_own(reach):
    goals = {tuple(reach.reset(seed=seed)[0][36:39]) for seed in range(20)}
    assert len(goals) == 20


def test_resets_without_a_seed_follow_from_the_last_seed(reach):
    def goals() -> list[np.ndarray]:
        return [reach.reset(seed=5)[0][36:39], reach.reset()[0][36:39], reach.reset()[0][36:39]]

    first = goals()
    np.testing.assert_array_equal(first, goals())
    assert len({tuple(goal) for goal in first}) == 3


@pytest.mark.parametrize("name", ["reach-v3", "hammer-v3"])
def test_the_goal_is_observed_after_a_reset_and_after_a_step(name):
    env = DOMAIN.make(name)
    observation, _ = env.reset(seed=1)
    after, *_ = env.step(env.action_space.sample())
    again, _ = env.reset(seed=2)
    env.close()
    for seen in (observation, after, again):
        assert np.abs(seen[36:39]).min() > 0
    np.testing.assert_array_equal(observation[36:39], after[36:39])


def test_observations_and_actions_are_those_of_the_spaces(reach):
    observation, _ = reach.reset(seed=0)
    assert reach.observation_space.contains(observation)
    action = DOMAIN.expert("reach-v3", reach)(observation)
    assert reach.action_space.contains(action)


def test_the_spec_makes_the_environment_again_after_a_round_trip_through_json(reach):
    spec = EnvSpec.from_json(json.dumps(json.loads(reach.spec.to_json())))
    recreated = gym.make(spec)
    assert recreated.spec.max_episode_steps == 200
    assert_same(rollout(reach, "reach-v3", seed=4, steps=20), rollout(recreated, "reach-v3", seed=4, steps=20))
    recreated.close()


def test_a_task_is_found_by_its_id():
    assert find_task("metaworld/hammer-v3") == (DOMAIN, "hammer-v3")
    assert expand_tasks("metaworld/hammer-v3") == ("metaworld/hammer-v3",)


def test_a_split_expands_to_the_ids_of_its_tasks():
    assert expand_tasks("metaworld/cw10") == tuple(f"metaworld/{name}" for name in CW10)


def test_a_split_is_no_single_task():
    with pytest.raises(UserError, match="split of 40 tasks"):
        find_task("metaworld/mt40")


@pytest.mark.parametrize("find", [find_task, expand_tasks])
@pytest.mark.parametrize(
    ("given_name", "nearest"),
    [
        ("metaworld/hamer-v3", "'metaworld/hammer-v3'"),
        ("metaworld/mt4", "'metaworld/mt40'"),
        ("metawrld/push-v3", "'metaworld/push-v3'"),
        ("hammer-v3", "'metaworld/hammer-v3'"),
    ],
)
def test_an_unknown_task_is_answered_with_the_nearest(find, given_name, nearest):
    with pytest.raises(UserError) as raised:
        find(given_name)
    assert f"'{given_name}'" in str(raised.value)
    assert nearest in str(raised.value)


@pytest.mark.parametrize("ask", [lambda: DOMAIN.make("reach-v3"), lambda: DOMAIN.expert("reach-v3", None)])
def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch, ask):
    def not_installed(module: str):
        raise ModuleNotFoundError(f"No module named '{module}'", name="metaworld")

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingExtra, match=r"'metaworld', which is not installed: .*'eva_rl\[metaworld\]'"):
        ask()


def test_a_missing_extra_is_passed_on_from_another_process():
    error = pickle.loads(pickle.dumps(MissingExtra("metaworld", "metaworld", "mujoco")))
    assert isinstance(error, MissingExtra)
    assert str(error) == str(MissingExtra("metaworld", "metaworld", "mujoco"))


def test_tasks_are_listed_without_the_simulator(monkeypatch):
    monkeypatch.setattr(DOMAIN, "require", lambda module: pytest.fail(f"{module} was imported"))
    assert expand_tasks("metaworld/mt50")
    assert envs.find_task("metaworld/reach-v3")


@given(task=st.sampled_from(["metaworld/push-v3", "metaworld/reach-v3"]), seeds=st.tuples(SEEDS, SEEDS), episode=SEEDS)
def test_collection_and_evaluation_start_from_disjoint_seeds(task, seeds, episode):
    assert 0 <= episode_seed("collect", task, seeds[0], episode) < HALF
    assert HALF <= episode_seed("evaluate", task, seeds[1], episode) < 2 * HALF


def test_seeds_are_pure_functions_of_task_seed_and_episode():
    def seeds() -> list[int]:
        return [
            episode_seed("collect", task, seed, episode)
            for task in ("metaworld/push-v3", "metaworld/reach-v3")
            for seed in range(5)
            for episode in range(100)
        ]

    first = seeds()
    np.random.seed(1)  # noqa: NPY002 (global state must not matter)
    assert seeds() == first
    assert len(set(first)) == 1000


def test_action_noise_is_a_pure_function_independent_of_the_environments_seed():
    draws = episode_rng("metaworld/push-v3", 0, 3).standard_normal(4)
    np.testing.assert_array_equal(draws, episode_rng("metaworld/push-v3", 0, 3).standard_normal(4))
    assert not np.array_equal(draws, episode_rng("metaworld/push-v3", 0, 4).standard_normal(4))
    environment = np.random.default_rng(episode_seed("collect", "metaworld/push-v3", 0, 3))
    assert not np.array_equal(draws, environment.standard_normal(4))


@pytest.mark.parametrize("name", ["push-v3", "shelf-place-v3", "stick-push-v3"])
def test_the_gripper_touches_when_meta_world_says_so(name):
    env = DOMAIN.make(name)
    expert, inner, answers = DOMAIN.expert(name, env), env.unwrapped._env, set()
    assert "touching_object" in vars(inner)
    observation, _ = env.reset(seed=3)
    for _ in range(120):
        observation, *_ = env.step(expert(observation))
        geom = inner._get_id_main_object()
        answers.add(inner.touching_object(geom))
        assert inner.touching_object(geom) == type(inner).touching_object(inner, geom)
    assert answers == {False, True}


def test_a_copied_model_plays_as_a_newly_compiled_one_and_shares_nothing():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    def played(env, seed: int) -> np.ndarray:
        env.seed(seed)
        first, _ = env.reset()
        actions = np.random.default_rng(seed).uniform(-1, 1, (30, 4))
        return np.stack([first, *(env.step(action)[0] for action in actions)])

    def ready(cls):
        env = cls()
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        return env

    plain = ALL_V3_ENVIRONMENTS["push-v3"]
    one, other, new = ready(compiled_once(plain)), ready(compiled_once(plain)), ready(plain)
    assert np.array_equal(played(one, 3), played(new, 3))
    one.model.body_pos[:] += 1
    assert np.array_equal(played(other, 4), played(new, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_an_episode_of_any_task_depends_on_its_seed_alone(name):
    used = DOMAIN.make(name)
    rollout(used, name, seed=1, steps=30)
    assert_same(rollout(used, name, seed=2, steps=30), rollout(DOMAIN.make(name), name, seed=2, steps=30))
