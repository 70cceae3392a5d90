"""Packing episodes, returns-to-go, and the statistics a model normalises with."""

import dataclasses
import json
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eva_rl.batch import Batch
from eva_rl.data import Recipe, Trajectories, WindowSampler, collect, interface_of, load_dataset, pack, returns_to_go
from eva_rl.data.on_disk import pack_on_disk
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.jobs.pretraining import warn_of_missing_labels
from eva_rl.model import DecisionTransformer, ModelConfig
from eva_rl.spaces import Part

OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
BOUNDED = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))
UNBOUNDED = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
DISCRETE = gym.spaces.Discrete(3, start=5)
PRETRAINING_FLOOR = 1.5

REWARDS = arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1e3, 1e3, width=32, allow_nan=False, allow_infinity=False)
)


def an_episode(length: int = 4, seed: int = 0, action_space: gym.Space = BOUNDED) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if isinstance(action_space, gym.spaces.Discrete):
        actions = action_space.start + rng.integers(action_space.n, size=length)
    else:
        actions = rng.uniform(0, 1, (length, 2)).astype(np.float32)
    return {
        "observations": rng.normal(size=(length + 1, 3)),
        "actions": actions,
        "rewards": rng.uniform(size=length),
        "success": np.linspace(0, 1, length + 1) == seed % 2,
    }


def packed(observations: np.ndarray, actions: np.ndarray | None = None, space: gym.Space = BOUNDED) -> Trajectories:
    """One episode of these observations (T, obs)."""
    length, size = observations.shape
    episode = {
        "observations": observations,
        "actions": np.zeros((length, 2)) if actions is None else actions,
        "rewards": np.ones(length),
    }
    return pack("dummy", [episode], gym.spaces.Box(-np.inf, np.inf, (size,), np.float64), space)


@given(REWARDS)
def test_returns_to_go_are_the_sums_of_the_rewards_to_come(rewards):
    expected = [rewards[step:].astype(np.float64).sum() for step in range(len(rewards))]
    result = returns_to_go(rewards)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


@given(REWARDS)
def test_returns_to_go_fall_by_each_steps_reward(rewards):
    result = returns_to_go(rewards).astype(np.float64)
    assert result[-1] == rewards[-1]
    np.testing.assert_allclose(result[:-1] - result[1:], rewards[:-1], atol=1e-6 * np.abs(rewards).sum() + 1e-6)


def test_small_rewards_are_not_lost_in_long_episodes():
    assert returns_to_go(np.full(2**20, 0.1, np.float32))[0] == pytest.approx(2**20 * 0.1, rel=1e-6)


@pytest.mark.parametrize("space", [BOUNDED, DISCRETE])
def test_pack_joins_the_episodes_and_drops_each_last_observation(space):
    episodes = [an_episode(length, seed, space) for seed, length in enumerate((4, 1, 6))]
    trajectories = pack("dummy", episodes, OBSERVATIONS, space)
    assert trajectories.lengths.tolist() == [4, 1, 6]
    assert trajectories.starts.tolist() == [0, 4, 5, 11]
    np.testing.assert_allclose(trajectories.observations, np.concatenate([e["observations"][:-1] for e in episodes]))
    np.testing.assert_allclose(trajectories.rewards, np.concatenate([e["rewards"] for e in episodes]))
    np.testing.assert_allclose(trajectories.episode_returns, [e["rewards"].sum() for e in episodes], rtol=1e-6)
    assert {trajectories.observations.dtype, trajectories.rewards.dtype, trajectories.returns_to_go.dtype} == {
        torch.float32
    }


def test_episodes_without_an_observation_after_the_last_action_are_packed_alike():
    episode = an_episode()
    with_last = pack("dummy", [episode], OBSERVATIONS, BOUNDED)
    without = pack("dummy", [episode | {"observations": episode["observations"][:-1]}], OBSERVATIONS, BOUNDED)
    assert torch.equal(with_last.observations, without.observations)


def test_packing_leaves_the_callers_arrays_alone():
    episode = an_episode()
    before = {name: values.copy() for name, values in episode.items()}
    trajectories = pack("dummy", [episode], OBSERVATIONS, BOUNDED)
    trajectories.observations.add_(1)
    trajectories.rewards.add_(1)
    for name, values in before.items():
        np.testing.assert_array_equal(values, episode[name])


def test_discrete_actions_are_numbered_from_zero():
    episode = an_episode() | {"actions": np.array([5, 7, 6, 5])}
    trajectories = pack("dummy", [episode], OBSERVATIONS, DISCRETE)
    assert trajectories.actions.tolist() == [0, 2, 1, 0]
    assert trajectories.actions.dtype == torch.int64
    assert interface_of("dummy", [trajectories]).in_words == "observations of size 3 and discrete actions of size 3"


def test_statistics_say_what_the_episodes_achieved():
    episodes = [an_episode(seed=seed) | {"rewards": np.full(4, seed)} for seed in range(4)]
    for episode, solved in zip(episodes, (False, True, True, True), strict=True):
        episode["success"] = np.array([0.0, 0.0, solved, 0.0, 0.0])
    statistics = pack("dummy", episodes, OBSERVATIONS, BOUNDED).statistics()
    assert (statistics.episodes, statistics.return_max, statistics.return_mean) == (4, 12.0, 6.0)
    assert statistics.success_rate == 0.75


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_best_share_are_whole_episodes_of_the_highest_returns_in_their_order(per_step, share):
    episodes = [an_episode(2 + seed % 3, seed) for seed in range(len(per_step))]
    for episode, reward in zip(episodes, per_step, strict=True):
        episode["rewards"] = np.full(len(episode["rewards"]), reward)
    every = pack("dummy", episodes, OBSERVATIONS, BOUNDED)
    best = every.best(share)
    count = max(1, round(share * len(episodes)))
    assert best.statistics().episodes == count
    assert best.episode_returns.sort().values.tolist() == every.episode_returns.sort().values[-count:].tolist()
    wanted = sorted(sorted(range(len(episodes)), key=lambda e: -float(every.episode_returns[e]))[:count])
    alone = pack("dummy", [episodes[e] for e in wanted], OBSERVATIONS, BOUNDED)
    for name in ("observations", "actions", "rewards", "returns_to_go", "starts", "successes"):
        assert torch.equal(getattr(best, name), getattr(alone, name)), name


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.booleans())
def test_the_successful_are_whole_episodes_in_their_order_in_memory_or_in_a_file(solved, in_a_file):
    episodes = [
        an_episode(2 + seed % 3, seed) | {"success": np.array([won] * (3 + seed % 3))}
        for seed, won in enumerate(solved)
    ]
    every = pack("dummy", episodes, OBSERVATIONS, BOUNDED)
    with pytest.MonkeyPatch.context() as patch:
        if in_a_file:
            patch.setattr("eva_rl.data.trajectories.COPIED", 0)
        if not any(solved):
            with pytest.warns(UserWarning, match="No demonstration of 'dummy' solved the task"):
                assert every.chosen("successful") is every
            return
        kept = every.chosen("successful")
    alone = pack("dummy", [e for e, won in zip(episodes, solved, strict=True) if won], OBSERVATIONS, BOUNDED)
    for name in ("observations", "actions", "rewards", "returns_to_go", "starts", "successes"):
        assert torch.equal(getattr(kept, name), getattr(alone, name)), name


def test_all_are_learned_from_where_success_is_unknown_or_all_are_asked_for():
    unknown = pack("dummy", [an_episode() | {"success": None}] * 2, OBSERVATIONS, BOUNDED)
    assert unknown.chosen("successful") is unknown
    failed = an_episode() | {"success": np.zeros(5)}
    some = pack("dummy", [failed, an_episode() | {"success": np.ones(5)}], OBSERVATIONS, BOUNDED)
    assert some.chosen("all") is some


def test_an_episode_that_does_not_mention_success_failed_where_another_mentions_it():
    said, silent = an_episode(seed=1) | {"success": np.array([np.nan, 0, 0, 0, 1])}, an_episode() | {"success": None}
    assert pack("dummy", [said, silent], OBSERVATIONS, BOUNDED).statistics().success_rate == 0.5
    assert pack("dummy", [silent, silent], OBSERVATIONS, BOUNDED).statistics().success_rate is None


def nan_in(name: str, value: float = np.nan) -> dict[str, np.ndarray]:
    values = an_episode()[name].copy()
    values.flat[1] = value
    return {name: values}


EMPTY = {"observations": np.zeros((1, 3)), "actions": np.zeros((0, 2)), "rewards": np.zeros(0)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nan_in("observations"), "NaN or infinite"),
        (nan_in("actions"), "NaN or infinite"),
        (nan_in("rewards", np.inf), "NaN or infinite"),
        (EMPTY, "is empty"),
        ({"actions": np.zeros((3, 2))}, "4 rewards, 3 actions and 5 observations"),
        ({"observations": np.zeros((3, 3))}, "4 rewards, 4 actions and 3 observations"),
        ({"observations": np.zeros((6, 3))}, "4 rewards, 4 actions and 6 observations"),
        ({"observations": np.zeros((5, 2))}, r"\(2,\).*\(3,\)"),
        ({"observations": np.zeros((5, 3, 1))}, r"\(3, 1\).*\(3,\)"),
        ({"actions": np.zeros((4, 5))}, r"\(5,\).*\(2,\)"),
        ({"actions": np.zeros(4)}, r"\(\).*\(2,\)"),
        ({"rewards": np.zeros((4, 2))}, "rewards"),
        ({"actions": np.full((4, 2), 1e300)}, "NaN or infinite"),
    ],
)
def test_a_bad_episode_is_refused_by_its_number(change, says):
    with pytest.raises(UserError, match=rf"Episode 2 of the dataset of 'dummy'.*{says}"):
        pack("dummy", [an_episode(), an_episode(), an_episode() | change, an_episode()], OBSERVATIONS, BOUNDED)


@pytest.mark.parametrize("actions", [[5, 6, 7, 8], [4, 5, 6, 7], [[5], [6], [7], [5]]])
def test_discrete_actions_outside_their_space_are_refused_by_their_episode(actions):
    episode = an_episode(action_space=DISCRETE)
    with pytest.raises(UserError, match="Episode 1 of the dataset of 'dummy'"):
        pack("dummy", [episode, episode | {"actions": np.array(actions)}], OBSERVATIONS, DISCRETE)


def test_observations_outside_their_space_are_refused_by_their_episode():
    space = gym.spaces.Dict({"arm": OBSERVATIONS, "door": gym.spaces.Discrete(3)})
    episodes = [an_episode(), an_episode()]
    for number, episode in enumerate(episodes):
        episode["observations"] = {"arm": episode["observations"], "door": np.full(5, 3 * number)}
    with pytest.raises(UserError, match=r"Episode 1 of the dataset of 'dummy'.* choice of 3 .* from 3 to 3"):
        pack("dummy", episodes, space, BOUNDED)


def test_a_dataset_without_episodes_is_refused():
    with pytest.raises(UserError, match="'dummy' holds no episode"):
        pack("dummy", [], OBSERVATIONS, BOUNDED)


def test_statistics_are_those_of_all_observations_when_every_dimension_moves_alike():
    rng = np.random.default_rng(0)
    observations = rng.normal(3.0, 2.0, (500, 4))
    interface = interface_of("dummy", [packed(observations)], std_floor=1e-9)
    np.testing.assert_allclose(interface.observation_mean, observations.mean(0), rtol=1e-5)
    np.testing.assert_allclose(interface.observation_std, observations.std(0), rtol=1e-5)
    assert (interface.observation_size, interface.action_kind, interface.action_size) == (4, "continuous", 2)


def test_every_task_weighs_the_same_whatever_its_length():
    rng = np.random.default_rng(0)
    short, long = rng.normal(0.0, 1.0, (50, 4)), rng.normal(10.0, 1.0, (950, 4))
    interface = interface_of("dummy", [packed(short), packed(long)], std_floor=1e-9)
    np.testing.assert_allclose(interface.observation_mean, (short.mean(0) + long.mean(0)) / 2, rtol=1e-5)


@given(seed=st.integers(0, 100), sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3))
def test_a_dimension_that_rested_in_training_stays_bounded_when_the_target_moves_it(seed, sizes):
    rng = np.random.default_rng(seed)
    training = [rng.normal(size=(size, 6)) * [1.0, 0.5, 2.0, 1.0, 1e-9, 0.0] + [0, 0, 0, 0, 7, -1] for size in sizes]
    interface = interface_of("dummy", [packed(observations) for observations in training], PRETRAINING_FLOOR)
    moving = np.array(interface.observation_std)[:4]
    resting = np.array(interface.observation_std)[4:]
    assert resting.min() >= moving.min()
    target = rng.uniform([6.0, -2.0], [8.0, 0.0], (100, 2))
    normalised = (target - np.array(interface.observation_mean)[4:]) / resting
    assert np.abs(normalised).max() < 1.05 / moving.min()


@pytest.mark.parametrize("floor", [0.5, PRETRAINING_FLOOR])
def test_the_floor_is_in_units_of_the_median_of_what_moves(floor):
    signs = np.array([[1.0], [-1.0]] * 10)
    interface = interface_of("dummy", [packed(signs * [1.0, 2.0, 3.0, 0.0, 0.0])], floor)
    np.testing.assert_allclose(interface.observation_std, np.maximum([1.0, 2.0, 3.0, 0.0, 0.0], 2.0 * floor), rtol=1e-6)


def test_observations_that_never_move_get_a_scale_of_one():
    interface = interface_of("dummy", [packed(np.full((8, 2), 1e6 / 3))])
    assert interface.observation_std == (1.0, 1.0)


def test_statistics_come_from_the_given_trajectories_alone():
    rng = np.random.default_rng(0)
    training = packed(rng.normal(size=(20, 3)))
    before = interface_of("dummy", [training])
    packed(rng.normal(100.0, 50.0, (20, 3)))
    assert interface_of("dummy", [training]) == before
    assert interface_of("dummy", [training, packed(rng.normal(100.0, 50.0, (20, 3)))]) != before


def test_bounded_actions_are_scaled_to_one_by_their_bounds():
    interface = interface_of("dummy", [pack("dummy", [an_episode()], OBSERVATIONS, BOUNDED)])
    for bound, scaled in ((BOUNDED.low, -1.0), (BOUNDED.high, 1.0)):
        np.testing.assert_allclose((bound - interface.action_mean) / interface.action_scale, scaled)


def test_unbounded_actions_are_scaled_by_their_data():
    actions = np.random.default_rng(0).normal([3.0, -5.0], [2.0, 0.1], (200, 2))
    interface = interface_of("dummy", [packed(np.zeros((200, 3)), actions, UNBOUNDED)])
    np.testing.assert_allclose(interface.action_mean, actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(interface.action_scale, actions.std(0), rtol=1e-4)


def test_only_the_dimensions_with_bounds_are_scaled_by_them():
    space = gym.spaces.Box(np.array([-2.0, -np.inf], np.float32), np.array([2.0, 1.0], np.float32))
    actions = np.array([[0.0, -3.0], [1.0, -1.0]])
    interface = interface_of("dummy", [packed(np.zeros((2, 3)), actions, space)])
    assert interface.action_mean == (0.0, -2.0)
    assert interface.action_scale == (2.0, 1.0)


def test_an_action_that_never_moves_has_a_scale_above_zero():
    interface = interface_of("dummy", [packed(np.zeros((5, 3)), np.ones((5, 2)), UNBOUNDED)])
    assert min(interface.action_scale) > 0


@pytest.mark.parametrize("rewards", [np.zeros(4), np.array([0.0, -1.0, -2.0, 0.0]), np.full(4, 3.0)])
def test_returns_and_rewards_are_scaled_to_at_most_one(rewards):
    trajectories = pack("dummy", [an_episode() | {"rewards": rewards}], OBSERVATIONS, BOUNDED)
    interface = interface_of("dummy", [trajectories])
    assert interface.return_scale > 0
    assert interface.reward_scale > 0
    assert float(trajectories.returns_to_go.abs().max()) / interface.return_scale <= 1
    assert float(trajectories.rewards.abs().max()) / interface.reward_scale <= 1


@pytest.mark.parametrize(
    ("size", "space"),
    [
        (4, BOUNDED),
        (3, gym.spaces.Box(-1.0, 1.0, (3,))),
        (3, DISCRETE),
        (3, gym.spaces.Box(-5.0, 5.0, (2,))),
    ],
)
def test_tasks_whose_spaces_differ_are_refused_by_name(size, space):
    shape = () if isinstance(space, gym.spaces.Discrete) else space.shape
    start = DISCRETE.start if isinstance(space, gym.spaces.Discrete) else 0
    other = {"observations": np.zeros((4, size)), "actions": np.full((4, *shape), start), "rewards": np.ones(4)}
    one = pack("one", [an_episode()], OBSERVATIONS, BOUNDED)
    two = pack("two", [other], gym.spaces.Box(-np.inf, np.inf, (size,), np.float64), space)
    with pytest.raises(UserError, match="'one' and 'two' differ"):
        interface_of("dummy", [one, two])


def test_tasks_with_other_numbers_of_choices_are_refused():
    episode = an_episode(action_space=DISCRETE)
    one = pack("one", [episode], OBSERVATIONS, DISCRETE)
    two = pack("two", [episode], OBSERVATIONS, gym.spaces.Discrete(8, start=5))
    with pytest.raises(UserError, match="'one' and 'two' differ"):
        interface_of("dummy", [one, two])


def test_an_interface_that_does_not_fit_names_both():
    episode = an_episode()
    continuous = interface_of("arm", [pack("dummy", [episode], OBSERVATIONS, BOUNDED)])
    choices = an_episode(action_space=DISCRETE)
    discrete = interface_of("game", [pack("dummy", [choices], OBSERVATIONS, DISCRETE)])
    assert continuous.fits(dataclasses.replace(continuous, name="other"))
    continuous.require(dataclasses.replace(continuous, name="other"), "The dataset")
    assert not continuous.fits(discrete)
    with pytest.raises(UserError, match=r"The dataset has .*discrete actions of size 3.*'arm' expects .*continuous"):
        continuous.require(discrete, "The dataset")


def test_an_interface_holds_plain_numbers_that_json_can_write():
    interface = interface_of("arm", [pack("dummy", [an_episode()], OBSERVATIONS, BOUNDED)])
    assert isinstance(interface, Interface)
    for value in vars(interface).values():
        assert type(value) in (str, int, float, tuple)
        assert not isinstance(value, tuple) or {type(number) for number in value} <= {float, Part}
    json.dumps(dataclasses.asdict(interface))


def test_a_batch_moves_all_its_tensors_and_keeps_its_interface():
    tensors = {name: torch.zeros(2, 3) for name in ("observations", "actions", "returns_to_go", "rewards", "mask")}
    moved = Batch(**tensors, interface="arm").to("meta")
    assert moved.interface == "arm"
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}


def test_the_typical_return_is_that_of_a_success(make_dataset):
    make_dataset(episodes=5)
    known = load_dataset("dummy/random-v0", "dummy")
    solved = torch.tensor([False, True, False, False, True])
    assert replace(known, successes=solved).statistics().return_typical in known.episode_returns[solved].tolist()
    assert replace(known, successes=~solved & False).statistics().return_typical is None
    assert replace(known, successes=None).statistics().return_typical == float(known.episode_returns.median())


def test_what_the_expert_meant_is_learned_and_what_was_done_is_seen(dummy_domain):
    collect([Recipe("dummy/Steps-v0", 4, (0.5,))])
    dataset_id = Recipe("dummy/Steps-v0", 4, (0.5,)).dataset_id
    plain, meant = (load_dataset(dataset_id, "dummy/Steps-v0", expert_labels=e) for e in (False, True))
    assert plain.labels is None
    assert torch.equal(plain.actions, meant.actions)
    assert torch.equal(meant.labels, torch.tensor([[0.5, 2.0]]).expand(len(meant.actions), 2))
    assert not torch.equal(meant.labels, meant.actions)
    batch = WindowSampler([meant], "arm", 3, 8, 0).batch(0)
    assert (batch.labels[batch.mask] == torch.tensor([0.5, 2.0])).all()
    assert (batch.labels[~batch.mask] == 0).all()
    interface = interface_of("arm", [meant])
    model = DecisionTransformer(ModelConfig(1, 1, 8, 3), [interface]).eval()
    predicted = model(batch)
    errors = (predicted - model.embedders["arm"].normalize_actions(batch.labels)).square().mean(-1)[batch.mask]
    torch.testing.assert_close(model.loss(batch), errors.mean())


def test_datasets_without_the_experts_own_actions_are_named(make_dataset):
    make_dataset(episodes=2)
    plain = load_dataset("dummy/random-v0", "dummy")
    told = replace(plain, task="other", labels=plain.actions)
    with pytest.warns(UserWarning, match="the datasets of dummy do not keep"):
        warn_of_missing_labels([plain, told])
    with pytest.raises(UserError, match="labels=expert needs"):
        warn_of_missing_labels([plain])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_missing_labels([told])


def test_labels_that_do_not_fit_the_actions_are_refused():
    space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    episode = {"observations": np.zeros((3, 2)), "actions": np.zeros((3, 2)), "rewards": np.zeros(3), "success": None}
    for labels in (np.zeros((2, 2)), np.full((3, 2), np.nan)):
        with pytest.raises(UserError, match=r"Episode 0 of the dataset of 'toy' has . actions of the expert"):
            pack("toy", [episode | {"labels": labels}], space, space)
    with pytest.raises(UserError, match="say what the expert meant and others don't"):
        pack("toy", [episode | {"labels": np.zeros((3, 2))}, episode], space, space)


@pytest.mark.parametrize("first", [0, 1])
def test_labels_of_some_episodes_alone_are_refused_on_disk_too(tmp_path, first):
    space = gym.spaces.Box(-1, 1, (2,))
    plain = {"observations": np.zeros((3, 2)), "actions": np.zeros((3, 2)), "rewards": np.zeros(3)}
    episodes = [plain, plain | {"labels": np.zeros((3, 2))}]
    with pytest.raises(UserError, match="say what the expert meant and others don't"):
        pack_on_disk(tmp_path / "packed", {}, "toy", [episodes[first], episodes[1 - first]], space, space)
    assert not list(tmp_path.iterdir())
