"""Gymnasium's MuJoCo tasks: their trained policies, their score scale, and the seeds their episodes start from."""

import importlib.util
import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from eva_rl.data import Recipe, collect, load_dataset
from eva_rl.envs import expand_tasks
from eva_rl.envs.mujoco import D4RL, DOMAIN, HELDOUT, MuJoCoTask
from eva_rl.envs.trained import FOLDER, Snapshots, load, path_of
from eva_rl.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="the extra mujoco is not installed")

DOUBLE = "InvertedDoublePendulum-v5"


def rollout(env: gym.Env, name: str, seed: int, steps: int, quality: str = "expert") -> dict[str, np.ndarray]:
    observation, _ = env.reset(seed=seed)
    policy = DOMAIN.demonstrator(name, env, quality, 0)
    observations, rewards, ended = [observation], [], False
    while not ended and len(rewards) < steps:
        action = policy(observation)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        observations.append(observation)
        rewards.append(reward)
    return {"observations": np.stack(observations), "rewards": np.array(rewards)}


def test_train_and_heldout_are_disjoint_and_make_all_tasks():
    assert not set(DOMAIN.splits["train"]) & set(HELDOUT)
    assert sorted((*DOMAIN.splits["train"], *HELDOUT)) == sorted(DOMAIN.tasks)
    assert set(DOMAIN.tasks) <= set(gym.registry)
    assert expand_tasks("mujoco/heldout") == tuple(f"mujoco/{name}" for name in HELDOUT)
    names = {DOMAIN.interface(name) for name in DOMAIN.tasks}
    assert len(names) == len(DOMAIN.tasks)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_an_episode_depends_on_its_seed_alone_and_lies_in_its_spaces(name):
    used, fresh = DOMAIN.make(name), DOMAIN.make(name)
    first = rollout(used, name, seed=11, steps=40)
    rollout(used, name, seed=12, steps=17)
    for again in (rollout(used, name, seed=11, steps=40), rollout(fresh, name, seed=11, steps=40)):
        np.testing.assert_array_equal(first["observations"], again["observations"])
        np.testing.assert_array_equal(first["rewards"], again["rewards"])
    assert all(used.observation_space.contains(observation) for observation in first["observations"])
    assert not np.array_equal(first["observations"], rollout(used, name, seed=12, steps=40)["observations"])
    assert used.spec.max_episode_steps == gym.spec(name).max_episode_steps


def test_observations_and_rewards_are_gymnasiums_own():
    ours, theirs = DOMAIN.make("Hopper-v5"), gym.make("Hopper-v5")
    observation, _ = theirs.reset(seed=4)
    np.testing.assert_array_equal(ours.reset(seed=4)[0], observation.astype(np.float32))
    action = np.array([0.3, -0.2, 0.9], np.float32)
    for _ in range(5):
        expected, got = theirs.step(action), ours.step(action)
        np.testing.assert_array_equal(got[0], expected[0].astype(np.float32))
        assert got[1:4] == expected[1:4]


def test_the_spec_makes_the_environment_again_after_a_round_trip_through_json():
    spec = EnvSpec.from_json(json.dumps(json.loads(DOMAIN.make(DOUBLE).spec.to_json())))
    recreated = gym.make(spec)
    assert isinstance(recreated.unwrapped, MuJoCoTask)
    assert recreated.spec.max_episode_steps == 1000


def test_the_expert_balances_and_the_medium_policy_falls_halfway():
    env = DOMAIN.make(DOUBLE)
    assert rollout(env, DOUBLE, seed=3, steps=2000)["rewards"].sum() > 9300  # at most about 9.36 a step
    medium = np.mean([rollout(env, DOUBLE, seed, 2000, "medium")["rewards"].sum() for seed in range(20)])
    assert 2000 < medium < 7500


def test_the_reacher_comes_to_its_target():
    env = DOMAIN.make("Reacher-v5")
    episodes = [rollout(env, "Reacher-v5", seed, 50)["observations"][:, 8:10] for seed in range(10)]
    distances = np.linalg.norm(episodes, axis=-1)  # (10, 51) m, from fingertip to target
    assert np.median(distances[:, -1]) < 0.02 < np.median(distances[:, 0])


def test_scores_are_on_d4rls_scale_where_it_has_one():
    hopper = DOMAIN.reference_scores("Hopper-v5")
    assert (hopper.random, hopper.expert) == (-20.272305, 3234.3)
    measured = json.loads((FOLDER.parent / "mujoco_scores.json").read_text())["tasks"]
    assert set(measured) == set(DOMAIN.tasks)
    for name in set(DOMAIN.tasks) - set(D4RL):
        assert DOMAIN.reference_scores(name).expert == measured[name]["expert"]
    for name, row in measured.items():
        assert row["random"] < row.get("medium", row["expert"] - 1) < row["expert"]
        assert ("medium" in row) == ("medium" in DOMAIN.qualities(name))


TRAINED = sorted(set(DOMAIN.tasks) - {"Reacher-v5"})


@pytest.mark.parametrize("name", TRAINED)
def test_a_file_of_trained_policies_is_small_and_ends_with_the_best(name):
    snapshots = load("mujoco", name)
    assert path_of("mujoco", name).stat().st_size <= 200_000
    assert snapshots.returns[-1] >= snapshots.returns.max() - 0.05 * np.ptp(snapshots.returns)
    if "medium" in DOMAIN.qualities(name):
        assert snapshots.returns[snapshots.medium] < 0.7 * snapshots.returns[-1]
    assert len(snapshots.weights) == len(snapshots.biases) == len(snapshots.returns)


def test_a_trained_policy_is_an_affine_map_within_the_bounds_of_actions():
    weights = np.array([[[1.0, -2.0]], [[0.0, 3.0]]], np.float32)
    snapshots = Snapshots(weights, np.array([[0.5], [-1.0]], np.float32), np.array([1.0, 2.0]), medium=0)
    space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
    observation = np.array([0.25, 0.5], np.float32)
    assert snapshots.policy(0, space)(observation) == np.float32(-0.25)
    assert snapshots.policy(1, space)(observation) == np.float32(0.5)
    assert snapshots.policy(1, space)(10 * observation) == np.float32(2.0)


@pytest.mark.parametrize("episodes", [8, 13, 40])
def test_a_mixture_takes_all_snapshots_evenly_whatever_its_length(episodes):
    snapshots = Snapshots(np.zeros((8, 1, 1)), np.zeros((8, 1)), np.arange(8.0), medium=3)
    taken = np.bincount([snapshots.chosen("mixed", episode) for episode in range(episodes)], minlength=8)
    assert taken.sum() == episodes
    assert taken.max() - taken.min() <= 1
    assert {snapshots.chosen("medium", episode) for episode in range(episodes)} == {3}
    assert {snapshots.chosen("expert", episode) for episode in range(episodes)} == {7}


def test_demonstrations_of_each_quality_are_datasets_of_their_own(datasets_root):
    recipes = [Recipe(f"mujoco/{DOUBLE}", 5, (0.0,), quality=quality) for quality in ("expert", "medium", "mixed")]
    ids = collect(recipes, workers=1)
    assert ids == [f"mujoco/{DOUBLE}/{quality}-noise0-5-seed0-v0" for quality in ("expert", "medium", "mixed")]
    returns = [load_dataset(dataset_id, f"mujoco/{DOUBLE}").statistics().return_mean for dataset_id in ids]
    assert returns[0] > 9300
    assert max(returns[1:]) < 0.9 * returns[0]


def test_a_mixture_is_the_same_whatever_the_number_of_workers(datasets_root, tmp_path, monkeypatch):
    recipe = Recipe(f"mujoco/{DOUBLE}", 6, quality="mixed")
    found = []
    for workers in (1, 3):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / str(workers)))
        [dataset_id] = collect([recipe], workers=workers)
        trajectories = load_dataset(dataset_id, recipe.task)
        found.append((trajectories.observations.numpy().tobytes(), trajectories.actions.numpy().tobytes()))
    assert found[0] == found[1]


def test_a_quality_that_a_task_does_not_have_is_refused_before_anything_is_written(datasets_root):
    with pytest.raises(UserError, match="quality of gym/CartPole-v1 must be expert, got medium"):
        collect([Recipe("gym/CartPole-v1", 1, quality="medium")])
    with pytest.raises(UserError, match="quality of mujoco/Hopper-v5 must be expert or medium or mixed, got best"):
        collect([Recipe("mujoco/Hopper-v5", 1, quality="best")])
    assert not any(datasets_root.iterdir())


def test_experts_play_without_torch_or_a_training_library():
    source = f"""
import sys
from eva_rl.envs.mujoco import DOMAIN
env = DOMAIN.make("{DOUBLE}")
observation, _ = env.reset(seed=0)
env.step(DOMAIN.expert("{DOUBLE}", env)(observation))
assert not {{"torch", "stable_baselines3"}} & set(sys.modules), "loaded"
"""
    subprocess.run([sys.executable, "-c", source], check=True)
