"""The search for linear policies that become experts, and the choice of those that ship."""

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from hypothesis import given
from hypothesis import strategies as st

from tools.experts import ars
from tools.experts.searches import SEARCHES
from tools.experts.ship import choose

SEARCH = ars.Search(directions=6, best=3, step_size=0.1, noise=0.1)


class Cart(gym.Env):
    """A cart that starts somewhere and is to be driven to 0: observed are its place, in tenths, and a number that never changes."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    spec = EnvSpec("Cart-v0", max_episode_steps=20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.uniform(-5, 5)), 0
        return self.observation(), {}

    def observation(self):
        return np.array([self.place / 10, 7.0], np.float32)

    def step(self, action):
        self.place += float(action[0])
        self.steps += 1
        return self.observation(), -abs(self.place), self.steps == 20, False, {}


def after(iterations: int, state: ars.State | None = None) -> ars.State:
    env = Cart()
    state = ars.new_state(env) if state is None else state
    for _ in range(iterations):
        ars.iterate(env, state, SEARCH, seed=0)
    return state


def returns(state: ars.State) -> float:
    return float(np.mean([ars.play(Cart(), state.affine(state.weights), seed, 20)[0] for seed in range(20)]))


def test_a_search_finds_a_policy_that_earns_more():
    assert returns(after(20)) > returns(after(0)) + 10


def test_a_search_goes_on_from_its_file_as_if_it_had_not_been_stopped(tmp_path: Path):
    whole, first = after(5), after(2)
    ars.snapshot(Cart(), first, SEARCH)
    ars.save(tmp_path / "state.npz", first)
    again = after(3, ars.restore(tmp_path / "state.npz"))
    for field in ("weights", "mean", "squares", "count", "iteration", "steps"):
        np.testing.assert_array_equal(getattr(again, field), getattr(whole, field), err_msg=field)
    assert len(again.snapshots) == len(again.scores) == len(again.at) == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**16))
def test_observations_are_normalised_by_the_moments_of_all_that_were_seen(lengths, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(3, 2, (length, 2)) for length in lengths]
    state = ars.new_state(Cart())
    for part in parts:
        state.observe(part)
    every = np.concatenate(parts)
    np.testing.assert_allclose(state.mean, every.mean(0))
    np.testing.assert_allclose(state.squares / state.count, every.var(0), atol=1e-12)
    if len(every) > 1:
        weights = rng.normal(size=(1, 2))
        policy, observation = state.affine(weights), rng.normal(size=2)
        expected = weights @ ((observation - every.mean(0)) / every.std(0))
        np.testing.assert_allclose(policy[:, :-1] @ observation + policy[:, -1], expected)


def test_an_observation_that_never_changes_is_left_out():
    state = after(2)
    assert state.affine(np.ones((1, 2)))[0, 1] == 0


def test_the_bonus_for_staying_alive_does_not_steer_the_search():
    class Paid(Cart):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, reward + 5, *rest

    plain, paid = after(1), ars.new_state(Cart())
    ars.iterate(Paid(), paid, dataclasses.replace(SEARCH, alive_bonus=5), seed=0)
    np.testing.assert_allclose(paid.weights, plain.weights)


def test_episodes_grow_from_the_horizon_to_the_environments_limit():
    state, search = ars.new_state(Cart()), dataclasses.replace(SEARCH, horizon=5, growth=6)
    lengths = []
    for _ in range(4):
        before = state.steps
        ars.iterate(Cart(), state, search, seed=0)
        lengths.append((state.steps - before) / 12)
    assert lengths == [5, 11, 17, 20]


def test_the_best_of_the_candidates_is_the_expert_and_the_one_halfway_the_medium():
    true = [0.0, 10, 22, 29, 55, 48, 70, 90, 100, 60]
    rough = [0.0, 12, 20, 31, 51, 49, 72, 95, 93, 66]  # takes 7 for the best
    choice = choose(rough, true.__getitem__, random=-2.0)
    assert choice.returns[-1] == 100
    assert choice.numbers[-1] == 8  # nothing after it ships
    assert choice.returns[choice.medium] == 48
    assert choice.numbers == sorted(set(choice.numbers))
    assert choice.returns == [true[i] for i in choice.numbers]


def test_where_no_snapshot_is_halfway_the_expert_ships_alone():
    scores = [0.0, 2, 3, 90, 95, 100]
    choice = choose(scores, scores.__getitem__, random=0.0)
    assert (choice.numbers, choice.returns) == ([5], [100])


@pytest.mark.parametrize("task", SEARCHES)
def test_every_search_is_of_a_task_and_uses_no_more_directions_than_it_tries(task):
    from eva_rl.envs import find_task

    find_task(task)
    assert 0 < SEARCHES[task].best <= SEARCHES[task].directions
