"""A return-conditioned policy in many environments at once, where every episode is decided by its own seed.

torch is imported where it is used: simulators' processes import this package too, and start sooner without it.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from eva_rl.cores import GUARD
from eva_rl.errors import UserError
from eva_rl.prepared import Prepared, PreparedEnv, members_of
from eva_rl.rollout.actor import Actor, ForJobs, Policy
from eva_rl.rollout.simulators import UNKNOWN, Board, Died, Job, LocalSimulator, Simulator, Simulators
from eva_rl.spaces import action_choices, action_numbers, action_parts, parts_of, spaces_from_text
from eva_rl.table import counted

if TYPE_CHECKING:
    import torch

    from eva_rl.interface import Interface

GROUP = 50
"""Episodes that step together: enough for efficient matrix products, few enough for several simulators to be busy."""
LONGEST = 10_000
"""Steps after which an episode of an environment without a time limit is cut."""
DEATHS = 3
"""Simulators that may die before a rollout gives up."""
REFRESH = 0.1
"""Seconds from one look at the progress to the next."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Episodes:
    """Finished episodes, in the order they were asked for."""

    returns: np.ndarray  #: (n,) undiscounted
    lengths: np.ndarray  #: (n,) steps
    successes: np.ndarray | None  #: (n,) bool: solved at any step; None where the environment does not say
    solved_at_end: np.ndarray | None  #: (n,) bool: solved at the last step

    def rows(self) -> Iterator[tuple]:
        """Each episode's return, length and successes."""
        unknown = np.full(len(self.returns), UNKNOWN)
        ever = unknown if self.successes is None else self.successes
        last = unknown if self.solved_at_end is None else self.solved_at_end
        yield from zip(self.returns, self.lengths, ever, last, strict=True)

    @classmethod
    def of(cls, rows: Sequence[tuple]) -> Episodes:
        """From each episode's return, length and successes."""
        returns, lengths, ever, last = (np.array(column) for column in zip(*rows, strict=True))
        says = (ever != UNKNOWN).any()
        return cls(returns, lengths, ever > 0 if says else None, last > 0 if says else None)


def rollout(
    make_policy: Callable[[int], Policy] | ForJobs,
    interface: Interface,
    jobs: Sequence[Job],
    simulators: Simulators,
    device: torch.device | str = "cpu",
    label: str = "roll out",
    finished: dict[int, tuple] | None = None,
    max_steps: int | None = None,
    longest: int = LONGEST,
) -> Episodes:
    """Run one episode for each job.

    The policy first asks for the job's target return. Every reward received is subtracted from what it asks for next
    (Chen et al. 2021, algorithm 1). Groups of episodes run side by side, each with a policy and a thread of its own.
    The thread waits while the group's environments step in their process. So every core has work, be it a model's or a
    simulator's.

    Args:
        make_policy: a policy for n episodes that begin, or for these jobs. Policies of several groups act at the same time.
        interface: which the environments' spaces must fit.
        finished: receives return, length and successes of the episodes that have ended, by their jobs' numbers, even if
            the rollout breaks off.
        max_steps: the number of steps after which episodes that go on are cut and scored, with a warning. None: the
            environment's own time limit ends them.
        longest: the same, where there is no such limit either.

    Raises:
        UserError: if there are no jobs, an environment's spaces do not fit, it fails or returns NaN, or simulators keep
            dying.
    """
    limits = _limits(jobs, interface, max_steps, longest)
    prepared = preparing(interface)
    jobs = [replace(job, make_env=prepared(job.make_env)) for job in jobs]
    size = min(GROUP, -(-len(jobs) // max(simulators.workers, 1)))
    groups = [_Group(range(i, min(i + size, len(jobs))), jobs, limits) for i in range(0, len(jobs), size)]
    rows = {} if finished is None else finished
    idle, whole = simulators.provide(len(groups), size, interface)[:], False
    as_here = _computing_as_here(device)
    bar = tqdm(total=len(jobs), desc=label, unit="episode", bar_format=BAR)
    show = partial(_show, bar, groups, max(limits.values()))
    stepped = (lambda: None) if simulators.workers else show  # other threads leave the bar, and its lock, to this one

    def play(simulator: Simulator | LocalSimulator, group: _Group) -> None:
        with as_here():
            group.play(simulator, make_policy, interface, device, stepped)

    with bar, _threads(simulators.workers) as pool:
        try:
            _play_all(groups, idle, simulators, pool, play, show)
            whole = True
        finally:
            try:
                for group in groups:
                    rows.update(group.ended)
            finally:
                if not whole:
                    _stop(simulators, pool)
    _report_cuts(groups, limits)
    return Episodes.of([rows[number] for number in range(len(jobs))])


def preparing(interface: Interface) -> Callable[[Callable[..., gym.Env]], Callable[..., gym.Env]]:
    """From what makes an environment to what makes it with its text and large pictures prepared as the model's training data were."""
    space = spaces_from_text(interface.spaces)[0] if interface.spaces else None
    if space is None or not any(isinstance(member, Prepared) for member in members_of(space)):
        return lambda make_env: make_env
    return lambda make_env: PreparedEnv(make_env, space)


def _show(bar: tqdm, groups: Sequence[_Group], limit: int) -> None:
    bar.n = sum(group.progress(limit) for group in groups)
    bar.update(0)


def _computing_as_here(device: torch.device | str) -> Callable[[], AbstractContextManager]:
    """What makes another thread compute without gradients, and with autocast as it is in this one: both hold for one thread."""
    import torch

    kind = torch.device(device).type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    @contextmanager
    def computing() -> Iterator[None]:
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            yield

    return computing


def _stop(simulators: Simulators, pool: Executor) -> None:
    """End the simulators, which may be in the middle of a step, and the threads that wait for them."""
    simulators.kill()
    pool.shutdown()
    simulators.close()


def _limits(jobs: Sequence[Job], interface: Interface, max_steps: int | None, longest: int) -> dict[str, int]:
    """Where each task's episodes are cut.

    Raises:
        UserError: if there are no jobs, the number of steps is none, or an environment's spaces do not fit.
    """
    if not jobs:
        raise UserError("episodes must be at least 1, got 0.")
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_episode_steps must be at least 1, got {max_steps}.")
    own = {job.task: check_spaces(job.make_env, interface) for job in {job.task: job for job in jobs}.values()}
    limits = {task: limit or max_steps or longest for task, limit in own.items()}
    return {task: min(limit, max_steps or limit) for task, limit in limits.items()}


def _play_all(
    groups: Sequence[_Group],
    idle: list[Simulator | LocalSimulator],
    simulators: Simulators,
    pool: Executor,
    play: Callable[[Simulator | LocalSimulator, _Group], None],
    show: Callable[[], None],
) -> None:
    """Play each group on a simulator that is idle.

    A group whose simulator died is played again on another.
    """
    waiting, busy, deaths = deque(groups), {}, 0
    while waiting or busy:
        while waiting and idle:
            simulator, group = idle.pop(), waiting.popleft()
            busy[pool.submit(play, simulator, group)] = simulator, group
        for over in wait(busy, REFRESH, FIRST_COMPLETED).done:
            simulator, group = busy.pop(over)
            try:
                over.result()
            except Died:
                deaths += 1
                _report_death(group, deaths)
                simulator = simulators.replace(simulator)
                waiting.appendleft(group)
            idle.append(simulator)
        show()


def check_spaces(make_env: Callable[[], gym.Env], interface: Interface) -> int | None:
    """The environment's time limit in steps, if it has one.

    Raises:
        UserError: unless the environment's observations and actions are those of `interface`.
    """
    env = preparing(interface)(make_env)()
    env.close()
    name = f"The environment '{env.spec.id if env.spec else env}'"
    try:
        acts = action_choices(env.action_space), action_parts(env.action_space), action_numbers(env.action_space)
        found = (parts_of(env.observation_space), *acts)
    except UserError as error:
        raise UserError(f"{name} can't be used: {error}") from error
    if found != (interface.parts, interface.choices, interface.action_parts, math.prod(interface.action_shape)):
        raise UserError(
            f"{name} has observations {env.observation_space} and actions {env.action_space}, but the model's interface "
            f"'{interface.name}' has {interface.in_words}."
        )
    return env.spec.max_episode_steps if env.spec else None


class _Group:
    """Episodes that step together, from their first step to the last one's end."""

    def __init__(self, numbers: Sequence[int], jobs: Sequence[Job], limits: Mapping[str, int]):
        self.numbers = numbers
        self.jobs = [jobs[number] for number in numbers]
        self.limits = np.array([limits[job.task] for job in self.jobs])
        self._begin()

    def _begin(self) -> None:
        count = len(self.jobs)
        self.alive = np.arange(count)
        self.returns, self.lengths = np.zeros(count), np.zeros(count, np.int64)
        self.solved = np.full((2, count), UNKNOWN, np.int8)  # at any step; at the last
        self.cut: list[str] = []  # the tasks of episodes that reached the limit and went on
        self.steps = -1  # none, not even reset

    def play(
        self,
        simulator: Simulator | LocalSimulator,
        make_policy: Callable[[int], Policy] | ForJobs,
        interface: Interface,
        device: torch.device | str,
        stepped: Callable[[], None],
    ) -> None:
        """Run the episodes, anew if they had begun, and call `stepped` after every step."""
        self._begin()
        targets = [job.target_return for job in self.jobs]
        policy = make_policy.make(self.jobs) if isinstance(make_policy, ForJobs) else make_policy(len(self.jobs))
        self.actor = Actor(policy, interface, targets, device)
        simulator.send(self.jobs)
        simulator.receive()
        while self.advance(simulator.board):
            simulator.send(None)
            stepped()
            simulator.receive()
        del self.actor  # and its memory

    def advance(self, board: Board) -> bool:
        """Take in what the environments did, and choose the next actions.

        Returns:
            False when all episodes have ended.
        """
        alive = self.alive
        self.steps += 1
        self.solved[0, alive] = np.maximum(self.solved[0, alive], board.solved[alive])
        self.solved[1, alive] = board.solved[alive]
        if self.steps:
            rewards = board.rewards[alive]
            self.returns[alive] += rewards
            self.lengths[alive] += 1
            over = alive[(board.ended[alive] == 0) & (self.lengths[alive] >= self.limits[alive])]
            self.cut += [self.jobs[row].task for row in over]
            board.ended[over] = True
            going = np.flatnonzero(board.ended[alive] == 0)
            if not len(going):
                self.alive = alive[going]
                return False
            self.actor.observe(board.actions[alive], rewards)
            if len(going) < len(alive):
                self.actor.keep(going)
                alive = self.alive = alive[going]
        board.actions[alive] = self.actor.act(board.observations[alive])
        return True

    def progress(self, limit: int) -> float:
        """Episodes' worth of steps done, the running ones counting for their share of the time limit."""
        return len(self.jobs) - len(self.alive) * (1 - min(max(self.steps, 0) / limit, 1.0))

    @property
    def ended(self) -> dict[int, tuple]:
        """Return, length and successes of the episodes that have ended, by the numbers of their jobs."""
        columns = zip(self.numbers, self.returns, self.lengths, *self.solved, strict=True)
        alive = set(self.alive.tolist())
        return {number: tuple(row) for i, (number, *row) in enumerate(columns) if i not in alive}


def _report_cuts(groups: Sequence[_Group], limits: Mapping[str, int]) -> None:
    cut = [task for group in groups for task in group.cut]
    for task in dict.fromkeys(cut):
        warnings.warn(
            f"{counted(cut.count(task), 'episode')} of '{task}' had not ended after {limits[task]} steps: cut there, and scored by what was "
            "earned so far; "
            "max_episode_steps=... sets another number.",
            stacklevel=3,
        )


def _report_death(group: _Group, deaths: int) -> None:
    tasks = ", ".join(sorted({job.task for job in group.jobs}))
    seeds = ", ".join(str(job.seed) for job in group.jobs)
    sentence = f"A simulator's process died in {tasks} (seeds {seeds})"
    if deaths > DEATHS:
        raise UserError(
            f"{sentence}, the {deaths}th to do so: look for what kills it, such as a lack of memory; or {GUARD}."
        )
    warnings.warn(f"{sentence}; its episodes are run again.", stacklevel=4)


@contextmanager
def _threads(workers: int) -> Iterator[Executor]:
    """What runs the groups: as many threads as there are simulators' processes, or this one where the simulator is in this
    process. Each computes by itself, whatever their number: products shared out among threads are rounded differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if workers:
            with ThreadPoolExecutor(workers, "policy", torch.set_num_threads, (1,)) as pool:
                yield pool
        else:
            yield _ThisThread()
    finally:
        torch.set_num_threads(before)


class _ThisThread(Executor):
    """For environments in this process: what they render with may belong to the thread that made them."""

    def submit(self, function: Callable[..., None], /, *args: object) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future
