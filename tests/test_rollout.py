"""Rollouts in toy environments whose reward tells whether the model saw the right history."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from eva_rl.errors import UserError
from eva_rl.interface import Batch, Interface
from eva_rl.model import DecisionTransformer, ModelConfig
from eva_rl.rollout import Episodes, check_spaces, rollout

START = 5


class Recall(gym.Env):
    """Shows a random number each step, and pays 1 for an action that repeats the number shown `lag` steps ago.

    The seed decides the numbers and the length, 3 to 8 steps; odd lengths terminate, even ones are truncated.
    An episode is a success at the step that made three actions right.
    """

    def __init__(self, lag: int = 1, discrete: bool = False):
        self.lag, self.discrete = lag, discrete
        self.observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(3, start=START) if discrete else gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(3, 9))
        self.numbers = self.np_random.integers(3, size=self.length + 1) - (0 if self.discrete else 1)
        self.step_number, self.right = 0, 0
        return self._observation(), {"success": False}

    def step(self, action):
        assert self.action_space.contains(action if not self.discrete else int(action))
        wanted = self.numbers[max(self.step_number - self.lag, 0)] + (START if self.discrete else 0)
        reward = float(np.isclose(np.asarray(action).item(), wanted))
        self.right += int(reward)
        self.step_number += 1
        over, odd = self.step_number == self.length, self.length % 2 == 1
        return self._observation(), reward, over and odd, over and not odd, {"success": self.right == 3}

    def _observation(self) -> np.ndarray:
        return np.array([self.numbers[self.step_number], self.step_number], np.float32)


def length_of(seed: int) -> int:
    env = Recall()
    env.reset(seed=seed)
    return env.length


def make_interface(observations: int = 2, actions: int = 1, discrete: bool = False) -> Interface:
    kind = "discrete" if discrete else "continuous"
    scales = ((), ()) if discrete else ((0.0,) * actions, (1.0,) * actions)
    return Interface(
        "toy", observations, kind, actions, (0.0,) * observations, (1.0,) * observations, *scales, 10.0, 1.0
    )


class Stub:
    """Acts by a rule, and keeps a copy of all it was shown."""

    def __init__(self, rule: Callable[[Batch, Tensor], Tensor], interface: Interface):
        self.interfaces = {"toy": interface}
        self.rule, self.seen = rule, []

    def act(self, history: Batch, step: Tensor) -> Tensor:
        copies = {k: v if k == "interface" else v.clone() for k, v in vars(history).items()}
        self.seen.append((Batch(**copies), step.clone()))
        return self.rule(history, step)


def repeat(lag: int) -> Callable[[Batch, Tensor], Tensor]:
    """The number shown `lag` steps ago, read from the history."""
    return lambda history, step: history.observations[torch.arange(len(step)), (step - lag).clamp(min=0), :1]


def constant(value: float, actions: int = 1) -> Callable[[Batch, Tensor], Tensor]:
    return lambda history, step: torch.full((len(step), actions), value)


def same(first: Episodes, second: Episodes) -> bool:
    return all(np.array_equal(getattr(first, k), getattr(second, k)) for k in ("returns", "lengths", "successes"))


SEEDS = [11, 12, 13, 14, 15, 16, 17]


# --- what comes out


def test_the_toy_episodes_differ_in_length():
    assert len({length_of(seed) for seed in SEEDS}) > 3


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_returns_lengths_and_successes_are_those_of_each_seed(lag):
    episodes = rollout(Stub(repeat(lag), make_interface()), partial(Recall, lag), "toy", 4, SEEDS, 1.0)
    lengths = [length_of(seed) for seed in SEEDS]
    assert episodes.lengths.tolist() == lengths
    assert episodes.returns.tolist() == lengths  # every action is right, and nothing is counted after the end
    assert episodes.successes.tolist() == [True] * len(SEEDS)
    assert episodes.successes.dtype == bool


def test_a_model_that_remembers_the_wrong_step_scores_less():
    episodes = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 4, SEEDS, 1.0)
    assert episodes.lengths.tolist() == [length_of(seed) for seed in SEEDS]
    assert episodes.returns.sum() < sum(episodes.lengths)


def test_an_episode_that_never_succeeds_is_none():
    episodes = rollout(Stub(constant(0.5), make_interface()), Recall, "toy", 4, SEEDS, 1.0)
    assert episodes.returns.tolist() == [0.0] * len(SEEDS)
    assert episodes.successes.tolist() == [False] * len(SEEDS)


@pytest.mark.parametrize("parallel", [1, 2, 3, 7])
def test_the_result_does_not_depend_on_how_many_run_at_once(parallel):
    together = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS, 1.0)
    chunked = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS, 1.0, parallel=parallel)
    assert same(chunked, together)
    assert len(set(together.returns)) > 1


@pytest.mark.parametrize("parallel", [1, 2, 3, 7])
def test_the_progress_bar_neither_overflows_nor_warns(parallel, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout(Stub(repeat(1), make_interface()), Recall, "toy", 3, SEEDS, 1.0, parallel=parallel)
    assert "100%" in capfd.readouterr().err


def test_episodes_come_in_the_order_of_their_seeds():
    forward = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS, 1.0, parallel=2)
    backward = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS[::-1], 1.0, parallel=2)
    assert forward.returns.tolist() == backward.returns[::-1].tolist()


def test_a_real_model_gives_the_same_episodes_twice():
    torch.manual_seed(0)
    config = ModelConfig(layers=1, heads=2, width=16, context=3, dropout=0.5)
    model = DecisionTransformer(config, [make_interface(actions=3, discrete=True)]).eval()
    first, second = (rollout(model, partial(Recall, 1, True), "toy", 3, SEEDS, 5.0) for _ in range(2))
    assert same(first, second)
    assert first.lengths.tolist() == [length_of(seed) for seed in SEEDS]


class SaysLittle(Recall):
    """Mentions success only when there is one, as many environments do."""

    def reset(self, **options):
        return super().reset(**options)[0], {}

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {"success": True} if info["success"] else {}


class Silent(Recall):
    def reset(self, **options):
        return super().reset(**options)[0], {}

    def step(self, action):
        return *super().step(action)[:4], {}


def test_successes_are_none_where_the_environment_never_says():
    assert rollout(Stub(repeat(1), make_interface()), Silent, "toy", 3, SEEDS, 1.0).successes is None


@pytest.mark.parametrize("parallel", [1, 7])
def test_an_environment_that_mentions_only_success_fails_where_it_is_silent(parallel):
    expected = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS, 1.0).successes
    assert 0 < expected.sum() < len(SEEDS)
    found = rollout(Stub(repeat(1), make_interface()), partial(SaysLittle, 2), "toy", 3, SEEDS, 1.0, parallel=parallel)
    assert found.successes.tolist() == expected.tolist()


# --- what the model is shown


def expected_histories(env: gym.Env, seed: int, context: int, target: float, act: Callable[[Tensor], float]):
    """One episode played alone: for each step the observations, earlier actions and rewards, and returns-to-go."""
    observation, _ = env.reset(seed=seed)
    shown, over = {"observations": [], "actions": [], "rewards": [], "returns_to_go": []}, False
    while not over:
        shown["observations"].append(observation.tolist())
        shown["returns_to_go"].append(target - sum(shown["rewards"]))
        past = {k: v[-context:] for k, v in shown.items()} | {
            k: [*shown[k], 0.0][-context:] for k in ("actions", "rewards")
        }
        yield {k: torch.tensor(v) for k, v in past.items()}
        action = act(torch.tensor(past["observations"]))
        observation, reward, terminated, truncated, _ = env.step(np.array([action], np.float32))
        shown["actions"].append(action)
        shown["rewards"].append(reward)
        over = terminated or truncated


@pytest.mark.parametrize("context", [1, 2, 3, 8, 20])
def test_the_history_is_the_last_steps_with_the_current_action_and_reward_still_empty(context):
    stub = Stub(repeat(1), make_interface())
    rollout(stub, partial(Recall, 2), "toy", context, SEEDS, 6.0)
    assert len(stub.seen) == max(length_of(seed) for seed in SEEDS)
    for row, seed in enumerate(SEEDS):
        alone = expected_histories(
            partial(Recall, 2)(),
            seed,
            context,
            6.0,
            lambda observations: observations[max(len(observations) - 2, 0), 0].item(),
        )
        for number, (expected, (history, step)) in enumerate(zip(alone, stub.seen, strict=False)):
            assert step[row] == min(number, context - 1)
            torch.testing.assert_close(history.observations[row], expected["observations"])
            torch.testing.assert_close(history.actions[row, :, 0], expected["actions"])
            torch.testing.assert_close(history.returns_to_go[row], expected["returns_to_go"])
            torch.testing.assert_close(history.rewards[row], expected["rewards"])
            assert history.mask[row].tolist() == [True] * (min(number, context - 1) + 1)
            assert history.interface == "toy"


def test_each_reward_is_subtracted_from_what_is_asked_for_next():
    stub = Stub(repeat(0), make_interface())
    rollout(stub, partial(Recall, 0), "toy", 20, SEEDS[:1], 4.5)
    wanted = stub.seen[-1][0].returns_to_go[0]
    assert wanted.tolist() == [4.5 - step for step in range(length_of(SEEDS[0]))]


class Flagged(gym.Env):
    """Two steps; observations are a matrix and actions a column. Keeps the actions it was given."""

    observation_space = gym.spaces.Box(-1, 1, (2, 3), np.float64)

    def __init__(self, given: list, action_space: gym.Space):
        self.given, self.action_space = given, action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.step_number = 0
        return np.arange(6.0).reshape(2, 3), {}

    def step(self, action):
        self.given.append(np.array(action))
        self.step_number += 1
        return np.arange(6.0).reshape(2, 3), 0.0, self.step_number == 2, False, {}


@pytest.mark.parametrize(("asked", "given"), [(7.0, [0.5, 2.0]), (-7.0, [-1.0, 0.0]), (0.25, [0.25, 0.25])])
def test_continuous_actions_are_clipped_to_the_space_and_remembered_so(asked, given):
    taken, stub = [], Stub(constant(asked, actions=2), make_interface(6, 2))
    space = gym.spaces.Box(np.array([[-1.0], [0.0]], np.float32), np.array([[0.5], [2.0]], np.float32))
    rollout(stub, partial(Flagged, taken, space), "toy", 4, [0], 1.0)
    assert [action.shape for action in taken] == [(2, 1)] * 2
    assert [action.dtype for action in taken] == [np.float32] * 2
    assert [action.ravel().tolist() for action in taken] == [given, given]
    history = stub.seen[1][0]
    assert history.actions[0].tolist() == [given, [0.0, 0.0]]
    assert history.observations[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_discrete_actions_are_numbered_from_zero_for_the_model_and_from_the_start_for_the_environment():
    def repeat_number(history: Batch, step: Tensor) -> Tensor:
        return repeat(1)(history, step)[:, 0].long()

    stub = Stub(repeat_number, make_interface(actions=3, discrete=True))
    episodes = rollout(stub, partial(Recall, 1, True), "toy", 4, SEEDS, 1.0)
    assert episodes.returns.tolist() == [length_of(seed) for seed in SEEDS]
    history = stub.seen[3][0]
    assert history.actions.dtype == torch.int64
    # The actions before the current one are the numbers shown one step before each.
    assert torch.equal(history.actions[:, 1:3], history.observations[:, :2, 0].long())


# --- what is refused


class Faulty(Recall):
    """Returns a number that is none of an observation or of a reward at step 2, in episodes long enough."""

    def __init__(self, where: str, value: float, closed: list):
        super().__init__()
        self.where, self.value, self.closed = where, value, closed

    def reset(self, **options):
        observation, info = super().reset(**options)
        return (observation * self.value if self.where == "reset" else observation), info

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.step_number == 2 and self.where == "observation":
            observation = observation * self.value
        if self.step_number == 2 and self.where == "reward":
            reward = self.value
        return observation, reward, *rest

    def close(self):
        self.closed.append(self)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["reset", "observation", "reward"])
def test_numbers_that_are_not_finite_are_refused_and_the_environments_closed(where, value):
    closed = []
    with pytest.raises(UserError, match="NaN or infinite at step") as error, np.errstate(invalid="ignore"):
        rollout(Stub(repeat(1), make_interface()), partial(Faulty, where, value, closed), "toy", 4, SEEDS, 1.0)
    assert "\n" not in str(error.value)
    assert len(closed) >= len(SEEDS)


class NanAtTheEnd(Recall):
    """Its last observation, which nothing acts on, is NaN."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation * (np.nan if terminated or truncated else 1.0), reward, terminated, truncated, info


def test_the_observation_after_the_end_is_not_looked_at():
    episodes = rollout(Stub(repeat(0), make_interface()), partial(NanAtTheEnd, 0), "toy", 4, [SEEDS[0]], 1.0)
    assert episodes.returns.tolist() == [length_of(SEEDS[0])]


@pytest.mark.parametrize(
    "interface",
    [
        make_interface(observations=3),
        make_interface(actions=2),
        make_interface(actions=1, discrete=True),
    ],
    ids=str,
)
def test_an_environment_whose_spaces_do_not_fit_is_refused_before_it_is_played(interface):
    stub = Stub(repeat(1), interface)
    with pytest.raises(UserError, match="'toy'") as error:
        rollout(stub, Recall, "toy", 4, SEEDS, 1.0)
    assert "\n" not in str(error.value)
    assert not stub.seen


def test_a_discrete_environment_does_not_fit_a_continuous_interface():
    with pytest.raises(UserError, match="continuous actions of size 3"):
        check_spaces(partial(Recall, 1, True), make_interface(actions=3))
    check_spaces(partial(Recall, 1, True), make_interface(actions=3, discrete=True))
    check_spaces(Recall, replace(make_interface(), name="another"))


def test_no_episodes_are_refused():
    with pytest.raises(UserError, match="episodes=0"):
        rollout(Stub(repeat(1), make_interface()), Recall, "toy", 4, [], 1.0)
