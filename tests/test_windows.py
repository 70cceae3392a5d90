"""Windows over packed trajectories, against a loop that is slow and plain."""

from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.adapter.eva import EvaSettings, Reading, eva_init
from eva_rl.batch import Batch
from eva_rl.data import Trajectories, WindowSampler, pack

OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
CONTINUOUS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
DISCRETE = gym.spaces.Discrete(1000)

TASKS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)
CONTEXTS = st.integers(1, 12)


def tasks_of(lengths: list[list[int]], action_space: gym.Space = CONTINUOUS) -> list[Trajectories]:
    """Tasks of episodes of these lengths, in which transition n (counted from 1 through all tasks) has reward n."""
    number, tasks = 1, []
    for task, episode_lengths in enumerate(lengths):
        episodes = []
        for length in episode_lengths:
            steps = np.arange(number, number + length)
            episodes.append(
                {
                    "observations": np.stack([steps, -steps], 1).astype(np.float64),
                    "actions": steps if action_space is DISCRETE else np.stack([steps] * 3, 1) / 2,
                    "rewards": steps.astype(np.float64),
                }
            )
            number += length
        tasks.append(pack(f"task-{task}", episodes, OBSERVATIONS, action_space))
    return tasks


def sampler_of(
    lengths: list[list[int]], context: int, action_space: gym.Space = CONTINUOUS, **changes
) -> WindowSampler:
    options = {"interface": "dummy", "batch_size": 8, "seed": 0} | changes
    return WindowSampler(tasks_of(lengths, action_space), context=context, **options)


def all_windows(sampler: WindowSampler) -> Batch:
    return sampler.gather(torch.arange(int(sampler.window_ends[-1])))


def naive_windows(tasks: list[Trajectories], context: int) -> list[dict[str, np.ndarray]]:
    """Slide a frame of `context` steps over every episode, from its first step alone to its last step alone."""
    windows = []
    for task in tasks:
        for start, length in zip(task.starts.tolist(), task.lengths.tolist(), strict=False):
            for begin in range(-(context - 1), length):
                rows = [start + step for step in range(begin, begin + context) if 0 <= step < length]
                window = {"mask": np.arange(context) < len(rows)}
                for name in ("observations", "actions", "rewards", "returns_to_go"):
                    values = getattr(task, name).numpy()
                    window[name] = np.zeros((context, *values.shape[1:]), values.dtype)
                    window[name][: len(rows)] = values[rows]
                windows.append(window)
    return windows


@given(lengths=TASKS, context=CONTEXTS, action_space=st.sampled_from([CONTINUOUS, DISCRETE]))
def test_windows_are_those_of_the_naive_loop(lengths, context, action_space):
    sampler = sampler_of(lengths, context, action_space)
    expected = naive_windows(tasks_of(lengths, action_space), context)
    batch = all_windows(sampler)
    assert len(batch.mask) == len(expected)
    for name in ("observations", "actions", "rewards", "returns_to_go", "mask"):
        values = getattr(batch, name).numpy()
        reference = np.stack([window[name] for window in expected])
        assert values.dtype == reference.dtype
        np.testing.assert_array_equal(values, reference, err_msg=name)


@given(lengths=TASKS, context=CONTEXTS)
def test_windows_cover_every_transition_equally(lengths, context):
    batch = all_windows(sampler_of(lengths, context))
    covered = Counter(batch.rewards[batch.mask].int().tolist())
    transitions = sum(map(sum, lengths))
    assert covered == {number: context for number in range(1, transitions + 1)}


@given(lengths=TASKS, context=CONTEXTS)
def test_padding_is_zeros_and_stands_on_the_right(lengths, context):
    batch = all_windows(sampler_of(lengths, context))
    real = batch.mask.sum(1)
    assert int(real.min()) >= 1
    assert torch.equal(batch.mask, torch.arange(context) < real[:, None])
    for values in (batch.observations, batch.actions, batch.returns_to_go, batch.rewards):
        assert not values[~batch.mask].any()


@given(lengths=TASKS, context=CONTEXTS)
def test_the_real_steps_of_a_window_are_consecutive_and_of_one_episode(lengths, context):
    tasks = tasks_of(lengths)
    episode_of = np.repeat(np.arange(sum(map(len, lengths))), [n for task in lengths for n in task])
    assert len(episode_of) == sum(len(task.rewards) for task in tasks)
    batch = all_windows(sampler_of(lengths, context))
    for rewards, mask in zip(batch.rewards.int(), batch.mask, strict=True):
        numbers = rewards[mask].numpy() - 1
        assert (np.diff(numbers) == 1).all()
        assert len(set(episode_of[numbers])) == 1


def test_a_window_may_begin_at_any_step_and_a_short_one_at_the_first():
    batch = all_windows(sampler_of([[5]], 3))
    windows = [rewards[mask].int().tolist() for rewards, mask in zip(batch.rewards, batch.mask, strict=True)]
    assert windows == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5], [5]]


def test_returns_to_go_reach_beyond_the_window():
    batch = all_windows(sampler_of([[4]], 2))
    assert batch.returns_to_go[1].tolist() == [10.0, 9.0]


@given(number=st.integers(0, 2**40), seed=st.integers(0, 2**31))
def test_a_batch_is_a_pure_function_of_seed_and_number(number, seed):
    lengths = [[3, 7], [5]]
    sampler = sampler_of(lengths, 4, seed=seed)
    first = sampler.batch(number)
    sampler.batch(number + 1)
    torch.manual_seed(number)
    for again in (sampler.batch(number), sampler_of(lengths, 4, seed=seed).batch(number)):
        for name in ("observations", "actions", "rewards", "returns_to_go", "mask"):
            assert torch.equal(getattr(first, name), getattr(again, name))


def test_other_numbers_and_other_seeds_give_other_batches():
    rewards = [
        sampler_of([[50]], 4, seed=seed, batch_size=32).batch(number).rewards for seed in (0, 1) for number in (0, 1)
    ]
    assert len({tuple(values.flatten().tolist()) for values in rewards}) == 4


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_a_batch_has_the_asked_shapes(action_space):
    batch = sampler_of([[3, 7], [5]], 4, action_space, batch_size=6, interface="arm").batch(0)
    assert batch.observations.shape == (6, 4, 2)
    assert batch.actions.shape == ((6, 4) if action_space is DISCRETE else (6, 4, 3))
    assert batch.returns_to_go.shape == batch.rewards.shape == batch.mask.shape == (6, 4)
    assert (batch.mask.dtype, batch.interface) == (torch.bool, "arm")


def test_tasks_are_drawn_uniformly_however_long_they_are():
    sampler = sampler_of([[2], [90, 8], [20]], 5, batch_size=3000)
    first = sampler.batch(0).rewards[:, 0].contiguous()
    drawn = torch.bucketize(first, torch.tensor([2.5, 100.5])).bincount(minlength=3)
    assert (drawn - 1000).abs().max() < 130  # five standard deviations


def test_a_tasks_transitions_are_drawn_uniformly():
    sampler = sampler_of([[1, 2, 9]], 4, batch_size=6000)
    batch = sampler.batch(0)
    drawn = batch.rewards[batch.mask].int().bincount(minlength=13)[1:]
    expected = 6000 * 4 / (12 + 3 * 3)  # windows times context, shared by T + context - 1 windows an episode
    assert (drawn - expected).abs().max() < 5 * expected**0.5


@given(TASKS, CONTEXTS, st.integers(0, 5))
def test_spread_windows_are_windows_of_the_data(lengths, context, number):
    sampler = sampler_of(lengths, context)
    windows = {tuple(rewards) for rewards in all_windows(sampler).rewards.tolist()}
    assert {tuple(rewards) for rewards in sampler.spread(number).rewards.tolist()} <= windows


def test_the_first_spread_batch_lies_across_all_episodes_and_along_their_length():
    lengths = [40, 60, 80, 100] * 4
    sampler = sampler_of([lengths], 5, batch_size=32)
    starts = np.cumsum([0, *lengths])
    for number in range(5):
        first = sampler.spread(number).rewards[:, 0].numpy() - 1  # transitions are counted from 1
        episode = np.searchsorted(starts, first, side="right") - 1
        phase = (first - starts[episode]) / np.array(lengths)[episode]
        assert len(set(episode)) == len(lengths)
        quarters = np.bincount((4 * phase).astype(int), minlength=4)
        assert quarters.min() >= 5  # eight each, but for the windows that hang over an end


def test_spread_windows_are_as_likely_as_others():
    sampler = sampler_of([[3, 9], [5]], 3)
    found = Counter(tuple(row) for n in range(3000) for row in sampler.spread(n).rewards.tolist())
    for task in tasks_of([[3, 9], [5]]):
        counts = Counter(tuple(window["rewards"].tolist()) for window in naive_windows([task], 3))
        for window, times in counts.items():
            expected = times / counts.total() / 2  # of two tasks
            assert found[window] / found.total() == pytest.approx(expected, rel=0.15)


def test_what_only_the_last_quarter_of_an_episode_shows_is_among_evas_directions():
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(8):
        early, late = rng.normal(0, 1, (75, 12)), rng.normal(0, 0.1, (25, 12))
        early[:, 6:] = 0
        late[:, 6] += rng.normal(0, 5, 25)  # one direction, larger than all others, that no early step has
        observations = np.concatenate([early, late])
        episodes.append({"observations": observations, "actions": np.zeros((100, 3)), "rewards": np.ones(100)})
    space = gym.spaces.Box(-np.inf, np.inf, (12,), np.float64)
    sampler = WindowSampler([pack("late", episodes, space, CONTINUOUS)], "dummy", 5, 32, 0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 2))
    batches = (sampler.spread(n) for n in range(64))
    found = eva_init(
        model, batches, {"0": 3}, EvaSettings(rho=1.0), Reading(lambda m, b: m(b.observations), lambda b: b.mask)
    )["0"]
    rows = np.concatenate([episode["observations"] for episode in episodes])
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    held = np.trace(found.components.numpy() @ np.cov(rows.T) @ found.components.numpy().T) / values[:3].sum()
    assert held > 0.95
    assert abs(found.components[0, 6]) > 0.99
