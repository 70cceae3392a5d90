"""Rollouts in toy environments whose reward tells whether the model saw the right history."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from recall import KILLER, Forks, Fragile, Hangs, Mortal, Raises, Recall, Stuck
from torch import Tensor
from tqdm import tqdm

from eva_rl.batch import Batch
from eva_rl.errors import UserError
from eva_rl.interface import Interface, TaskStatistics
from eva_rl.model import DecisionTransformer, Decoder, ModelConfig
from eva_rl.rollout import Episodes, Job, Simulators, TargetReturn, check_spaces, warn_if_far
from eva_rl.rollout.simulators import Board, LocalSimulator

module = importlib.import_module("eva_rl.rollout.rollout")  # the package has a function of that name


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
    """Acts by a rule, and keeps a copy of all it was shown: the last `context` steps, the current action and reward empty."""

    def __init__(self, rule: Callable[[Batch, Tensor], Tensor], interface: Interface):
        self.interfaces = {"toy": interface}
        self.rule, self.seen = rule, []

    def act(self, history: Batch, step: Tensor) -> Tensor:
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(history).items()}
        self.seen.append((Batch(**copies), step.clone()))
        return self.rule(history, step)


class Windows:
    """The policy of a stub."""

    def __init__(self, stub: Stub, context: int, episodes: int):
        self.stub, self.context = stub, context
        self.columns = {"observations": [], "actions": [], "returns_to_go": [], "rewards": []}
        interface = stub.interfaces["toy"]
        shape = () if interface.action_kind == "discrete" else (interface.action_size,)
        self.nothing = torch.zeros(episodes, *shape, dtype=torch.float32 if shape else torch.int64)

    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        count = len(observations)
        new = (observations, self.nothing[:count], returns_to_go, torch.zeros(count))
        for column, value in zip(self.columns.values(), new, strict=True):
            column.append(value.clone())
            del column[: -self.context]
        stacked = {name: torch.stack(column, 1) for name, column in self.columns.items()}
        mask = torch.ones(stacked["rewards"].shape, dtype=torch.bool)
        return self.stub.act(Batch(**stacked, mask=mask, interface="toy"), torch.full((count,), mask.shape[1] - 1))

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        self.columns["actions"][-1], self.columns["rewards"][-1] = actions, rewards

    def keep(self, episodes: Tensor) -> None:
        self.columns = {name: [value[episodes] for value in column] for name, column in self.columns.items()}


def rollout(
    stub: Stub,
    make_env: Callable[[], gym.Env],
    name: str,
    context: int,
    seeds: list[int],
    target: float,
    parallel: int | None = None,
    workers: int = 0,
    finished: dict[int, tuple] | None = None,
) -> Episodes:
    """The rollout of a stub, `parallel` episodes at a time, in this process unless there are workers."""
    jobs = [Job("Recall", make_env, seed, target) for seed in seeds]
    with pytest.MonkeyPatch.context() as patch, Simulators(workers) as simulators:
        if parallel:
            patch.setattr(module, "GROUP", parallel)
        return module.rollout(
            partial(Windows, stub, context), stub.interfaces[name], jobs, simulators, finished=finished
        )


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("parallel", [1, 2, 3, 7])
def test_the_progress_bar_neither_overflows_nor_warns(parallel, workers, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout(Stub(repeat(1), make_interface()), Recall, "toy", 3, SEEDS, 1.0, parallel=parallel, workers=workers)
    assert "100%" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_progress_bar_that_nobody_reads_any_more_ends_the_rollout(workers, monkeypatch):
    written = []

    class Closes:
        def write(self, text: str) -> None:
            written.append(text)
            if len(written) > 2:
                raise BrokenPipeError

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Closes())
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)  # an error in drawing leaves it taken
    with pytest.raises(BrokenPipeError):
        rollout(Stub(repeat(1), make_interface()), Recall, "toy", 3, SEEDS, 1.0, parallel=1, workers=workers)


def test_episodes_come_in_the_order_of_their_seeds():
    forward = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS, 1.0, parallel=2)
    backward = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS[::-1], 1.0, parallel=2)
    assert forward.returns.tolist() == backward.returns[::-1].tolist()


def play(workers: int, group: int, context: int = 6) -> Episodes:
    """The episodes of a real model."""
    torch.manual_seed(0)
    interface = make_interface(actions=3, discrete=True)
    model = DecisionTransformer(
        ModelConfig(layers=2, heads=2, width=32, context=context, dropout=0.5), [interface]
    ).eval()
    jobs = [Job("Recall", partial(Recall, 1, True), seed, 5.0) for seed in range(40)]
    with pytest.MonkeyPatch.context() as patch, Simulators(workers) as simulators:
        patch.setattr(module, "GROUP", group)
        return module.rollout(partial(Decoder, model, "toy"), interface, jobs, simulators)


@pytest.mark.parametrize(("workers", "group"), [(0, 25), (0, 7), (0, 1), (1, 25), (2, 10), (3, 4)])
def test_a_real_models_episodes_do_not_depend_on_the_number_of_workers_or_the_size_of_groups(workers, group):
    expected = play(0, 40)
    assert expected.lengths.tolist() == [length_of(seed) for seed in range(40)]
    assert len(set(expected.returns)) > 2
    assert same(play(workers, group), expected)


def test_the_episodes_of_a_simulator_that_is_killed_are_run_again(tmp_path):
    expected = rollout(Stub(repeat(1), make_interface()), partial(Recall, 2), "toy", 3, SEEDS, 1.0)
    with pytest.warns(UserWarning, match=rf"died in Recall \(seeds .*{KILLER}.*\); its episodes are run again"):
        found = rollout(
            Stub(repeat(1), make_interface()),
            partial(Fragile, str(tmp_path / "killed")),
            "toy",
            3,
            SEEDS,
            1.0,
            parallel=3,
            workers=2,
        )
    assert same(found, expected)


def test_a_sweep_asks_once_where_all_returns_are_equal():
    assert TargetReturn("sweep").returns("toy", TaskStatistics(3, 500.0, 500.0, None)) == [500.0]
    assert len(TargetReturn("sweep").returns("toy", TaskStatistics(3, 500.0, 400.0, None))) > 3


def test_by_default_the_median_return_of_the_successes_is_asked_for():
    known = TaskStatistics(5, 900.0, 500.0, 0.6, tuple(float(100 * i) for i in range(11)), return_typical=450.0)
    assert TargetReturn().returns("toy", known) == TargetReturn("auto").returns("toy", known) == [450.0]
    assert TargetReturn("max").returns("toy", known) == [900.0]
    assert TargetReturn("q0.2").returns("toy", known) == [200.0]
    assert TargetReturn("7").returns("toy", known) == [7.0]


def test_without_a_success_and_in_old_checkpoints_the_best_return_is_asked_for():
    assert TargetReturn().returns("toy", TaskStatistics(3, 500.0, 400.0, 0.0)) == [500.0]


@pytest.mark.parametrize(("target", "far"), [(150.0, False), (240.0, False), (260.0, True), (40.0, True), (-1e6, True)])
def test_a_return_that_no_trajectory_comes_near_is_warned_about(target, far):
    known = TaskStatistics(2, 200.0, 150.0, None, tuple(100.0 + 10 * i for i in range(11)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_far(target, "toy", known)
    assert [f"target_return={target:g}" in str(w.message) for w in caught] == [True] * far


def test_more_simulators_than_cores_are_warned_about():
    cores = os.cpu_count() or 1
    with pytest.warns(UserWarning, match=rf"workers={cores + 1} was given on {cores} cores"):
        Simulators(cores + 1)


def test_simulators_that_keep_dying_end_the_rollout():
    with pytest.warns(UserWarning, match="died"), pytest.raises(UserError, match="4th to do so"):
        rollout(Stub(repeat(1), make_interface()), Mortal, "toy", 3, SEEDS[:1], 1.0, workers=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_raises_is_named_and_what_had_ended_is_kept(workers):
    seeds = [seed for seed in range(20) if length_of(seed) != 8]
    long = next(seed for seed in range(20, 200) if length_of(seed) == 8)
    sentence = f"'Recall', seed {long}, raised ValueError at step 7: the arm is stuck."
    finished = {}
    with pytest.raises(UserError, match=sentence):
        rollout(
            Stub(repeat(1), make_interface()), Raises, "toy", 3, [*seeds, long], 1.0, workers=workers, finished=finished
        )
    assert 0 < len(finished) < len(seeds) + 1
    for number, (_, length, *_) in finished.items():
        assert length == length_of(seeds[number])


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and parent_of(name) == os.getpid()}


def parent_of(process: str) -> int | None:
    try:
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("make_env", [Recall, Raises, Mortal])
def test_no_simulator_outlives_its_rollout(make_env):
    before = processes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rollout(Stub(repeat(1), make_interface()), make_env, "toy", 3, list(range(60)), 1.0, workers=2)
        except UserError:
            assert make_env is not Recall
    end = time.monotonic() + 10
    while processes() - before and time.monotonic() < end:
        time.sleep(0.05)
    left = {p for p in processes() - before if "resource_tracker" not in command_of(p)}
    assert not left


@pytest.mark.parametrize("make_env", [Hangs, Forks])
def test_an_interruption_ends_a_rollout_whose_simulators_hang(make_env):
    number = itertools.count(1)

    def interrupt(history: Batch, step: Tensor) -> Tensor:
        if next(number) == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return constant(0.5)(history, step)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        rollout(Stub(interrupt, make_interface()), make_env, "toy", 3, SEEDS, 1.0, workers=2)
    assert time.monotonic() - start < 15  # a step takes 60 s


def test_an_interruption_keeps_what_had_ended():
    finished, counter = {}, itertools.count(1)

    def interrupt(history: Batch, step: Tensor) -> Tensor:
        acts = next(counter)
        if acts == 20:  # of two threads, whose episodes take 8 steps at most: one has ended, and few of the 21
            os.kill(os.getpid(), signal.SIGINT)
        if acts >= 20:
            time.sleep(1)
        return repeat(1)(history, step)

    with pytest.raises(KeyboardInterrupt):
        rollout(Stub(interrupt, make_interface()), Recall, "toy", 3, SEEDS * 3, 1.0, 1, workers=2, finished=finished)
    assert 0 < len(finished) < 3 * len(SEEDS)
    for number, (_, length, *_) in finished.items():
        assert length == length_of((SEEDS * 3)[number])


def test_a_policy_that_fails_ends_the_rollout_with_its_error():
    def fail(history: Batch, step: Tensor) -> Tensor:
        raise ZeroDivisionError("no such action")

    with pytest.raises(ZeroDivisionError, match="no such action"):
        rollout(Stub(fail, make_interface()), Recall, "toy", 3, SEEDS, 1.0, workers=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("enabled", [False, True])
def test_policies_act_under_the_callers_autocast_without_gradients_in_one_thread(workers, enabled):
    found, before = set(), torch.get_num_threads()

    def look(history: Batch, step: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        found.add((*autocast, torch.is_grad_enabled(), torch.get_num_threads()))
        return constant(0.5)(history, step)

    torch.set_num_threads(3)
    try:
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            rollout(Stub(look, make_interface()), Recall, "toy", 3, SEEDS, 1.0, workers=workers)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == {(enabled, torch.float16, False, 1)}


def command_of(process: int) -> str:
    try:
        with open(f"/proc/{process}/cmdline") as file:
            return file.read()
    except OSError:
        return "resource_tracker"  # gone by now


def test_a_simulators_process_needs_no_torch():
    script = "import sys, eva_rl.rollout.simulators; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_simulators_serve_one_rollout_after_another():
    jobs = [Job("Recall", partial(Recall, 2), seed, 1.0) for seed in SEEDS]
    stub = Stub(repeat(1), make_interface())
    with Simulators(2) as simulators:
        first, second = (
            module.rollout(partial(Windows, stub, 3), stub.interfaces["toy"], jobs, simulators) for _ in range(2)
        )
        assert same(first, second)
        assert len(simulators.running) == 2


def test_tasks_of_one_interface_run_side_by_side():
    jobs = [Job(f"lag {lag}", partial(Recall, lag), seed, 1.0) for seed in SEEDS for lag in (0, 2)]
    stub = Stub(repeat(0), make_interface())
    with Simulators(0) as simulators:
        found = module.rollout(partial(Windows, stub, 3), stub.interfaces["toy"], jobs, simulators)
    lengths = [length_of(seed) for seed in SEEDS]
    assert found.returns[::2].tolist() == lengths
    assert found.returns[1::2].sum() < sum(lengths)


class Unsteady(Recall):
    """Is solved at the first step, and not any more at the last."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"success": self.step_number == 1}


def test_success_is_told_both_at_any_step_and_at_the_last():
    found = rollout(Stub(repeat(1), make_interface()), Unsteady, "toy", 3, SEEDS, 1.0)
    assert found.successes.tolist() == [True] * len(SEEDS)
    assert found.solved_at_end.tolist() == [False] * len(SEEDS)


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


class SaysOnce(Recall):
    """Mentions success in the step it comes about, and nothing from then on."""

    def reset(self, **options):
        return super().reset(**options)[0], {}

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"success": True} if self.step_number == 2 else {}


def test_a_success_that_is_said_once_is_one_and_none_at_the_end():
    found = rollout(Stub(repeat(1), make_interface()), SaysOnce, "toy", 3, SEEDS, 1.0)
    assert found.successes.tolist() == [True] * len(SEEDS)
    assert found.solved_at_end.tolist() == [False] * len(SEEDS)


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
    for seed in SEEDS:
        alone = expected_histories(
            partial(Recall, 2)(),
            seed,
            context,
            6.0,
            lambda observations: observations[max(len(observations) - 2, 0), 0].item(),
        )
        for number, (expected, (history, step)) in enumerate(zip(alone, stub.seen, strict=False)):
            row = [s for s in SEEDS if length_of(s) > number].index(seed)  # finished episodes have left
            assert step[row] == min(number, context - 1)
            torch.testing.assert_close(history.observations[row], expected["observations"])
            torch.testing.assert_close(history.actions[row, :, 0], expected["actions"])
            torch.testing.assert_close(history.returns_to_go[row], expected["returns_to_go"])
            torch.testing.assert_close(history.rewards[row], expected["rewards"])
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

    def __init__(self, where: str, value: float, log: list):
        super().__init__()
        self.where, self.value, self.log = where, value, log
        log.append("made")

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
        self.log.append("closed")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["reset", "observation", "reward"])
def test_numbers_that_are_not_finite_are_refused_and_the_environments_closed(where, value):
    log = []
    with (
        pytest.raises(UserError, match=r"NaN or infinite at (step 2|its start)") as error,
        np.errstate(invalid="ignore"),
    ):
        rollout(Stub(repeat(1), make_interface()), partial(Faulty, where, value, log), "toy", 4, SEEDS, 1.0)
    assert "\n" not in str(error.value)
    assert log.count("made") == log.count("closed") > 1


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


@pytest.mark.filterwarnings("ignore:The environment of 'Recall' raised OSError")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_cannot_be_closed_does_not_hide_what_it_raised(workers):
    with pytest.raises(UserError, match="raised ValueError at step"):
        rollout(Stub(repeat(1), make_interface()), Stuck, "toy", 3, SEEDS, 1.0, workers=workers)


def test_an_environment_that_cannot_be_closed_is_warned_about_and_its_episodes_count():
    with pytest.warns(UserWarning, match="'Recall' raised OSError when it was closed: no such display"):
        episodes = rollout(Stub(repeat(1), make_interface()), Stuck, "toy", 3, [SEEDS[0]], 1.0)
    assert episodes.lengths.tolist() == [length_of(SEEDS[0])]


def test_no_episodes_are_refused():
    with pytest.raises(UserError, match="episodes must be at least 1, got 0"):
        rollout(Stub(repeat(1), make_interface()), Recall, "toy", 4, [], 1.0)


def test_a_simulator_keeps_the_environments_of_the_tasks_at_hand_alone():
    made, closed = [], []

    class Counted(Recall):
        def close(self):
            closed.append(self)

    def make(task: str) -> Callable[[], gym.Env]:
        return lambda: made.append(task) or Counted()

    simulator = LocalSimulator(Board.sizes(2, make_interface()))
    for tasks in ("aa", "aa", "ab", "bb", "c"):
        simulator.send([Job(task, make(task), seed, 1.0) for seed, task in enumerate(tasks)])
    assert made == ["a", "a", "b", "b", "c"]
    assert len(closed) == 4
    simulator.close()
    assert len(closed) == 5
