"""Processes that step environments, a group each, and exchange observations and actions through shared memory."""

from __future__ import annotations

import math
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from eva_rl.cores import available_cores, one_core_each, refuse_while_imported
from eva_rl.errors import UserError, in_one_line
from eva_rl.spaces import action_row, flatten, one_number, solved_in, to_action

if TYPE_CHECKING:  # it needs torch, and simulators' processes start sooner without it
    from eva_rl.interface import Interface

UNKNOWN = -1
"""An environment that does not say whether its task is solved."""
LOOK = 1.0
"""Seconds from one look at whether a process that says nothing is alive to the next."""


@dataclass(frozen=True)
class Job:
    """One episode: everything random in it follows from the seed."""

    task: str
    make_env: Callable[..., gym.Env]
    """Must be a function that pickle can name, if other processes are to call it."""
    seed: int
    target_return: float


@dataclass
class Board:
    """What a group's environments and its policy tell each other, a row an episode."""

    observations: np.ndarray  #: (n, obs) flat, see `eva_rl.spaces`
    actions: np.ndarray  #: (n, act) float64, in the environment's units, which clips them; choices count from 0
    rewards: np.ndarray  #: (n,) float64
    ended: np.ndarray  #: (n,) uint8: terminated or truncated at the last step or before
    solved: np.ndarray  #: (n,) int8: at this moment; or `UNKNOWN`

    @classmethod
    def sizes(cls, rows: int, interface: Interface) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Each array's type and shape."""
        return {
            "observations": (interface.observation_dtype, (rows, interface.observation_size)),
            "actions": ("f8", (rows, math.prod(interface.action_shape))),
            "rewards": ("f8", (rows,)),
            "ended": ("u1", (rows,)),
            "solved": ("i1", (rows,)),
        }


class Stage:
    """The environments of one group. Those of a task stay for the next group that has it."""

    def __init__(self, board: Board):
        self.board = board
        self.made: dict[tuple[str, int], gym.Env] = {}
        self.jobs: Sequence[Job] = ()
        self.envs: list[gym.Env] = []
        self.steps = 0

    def reset(self, jobs: Sequence[Job]) -> None:
        """Begin the episodes of `jobs`."""
        self.jobs, self.envs, self.steps = jobs, [], 0
        self.board.ended[:], self.board.solved[:] = True, UNKNOWN
        for gone in [key for key in self.made if key[0] not in {job.task for job in jobs}]:
            self._close(gone)  # a simulator may take 20 MB, and a split has many tasks
        for row, job in enumerate(jobs):
            with _named(job, "at its start"):
                env = self.made.get((job.task, row))
                if env is None:
                    env = self.made[job.task, row] = job.make_env()
                self.envs.append(env)
                observation, info = env.reset(seed=job.seed)
                self._show(row, env, observation, info)
            self.board.ended[row] = False

    def step(self) -> None:
        """One step in every episode that has not ended, by the actions on the board."""
        board = self.board
        self.steps += 1
        for row, (env, job) in enumerate(zip(self.envs, self.jobs, strict=True)):
            if board.ended[row]:
                continue
            with _named(job, f"at step {self.steps}"):
                observation, reward, terminated, truncated, info = env.step(self._action(row, env.action_space))
                board.rewards[row] = _earned(reward)
                board.ended[row] = terminated or truncated
                self._show(row, env, observation, info)

    def _action(self, row: int, space: gym.Space) -> Any:
        action = to_action(space, self.board.actions[row])
        self.board.actions[row] = action_row(space, action)  # what is done in the end
        return action

    def _show(self, row: int, env: gym.Env, observation: Any, info: dict[str, Any]) -> None:
        try:
            flat = flatten(env.observation_space, observation)
        except UserError as error:
            raise UserError(f"returned {error}") from error
        if not self.board.ended[row] or self.steps == 0:
            if not np.isfinite(flat).all():
                raise UserError("returned observations that are NaN or infinite")
            self.board.observations[row] = flat
        if (solved := solved_in(info)) is not None:
            self.board.solved[row] = solved
        elif self.board.solved[row] != UNKNOWN:  # some mention success only where there is one
            self.board.solved[row] = 0

    def close(self) -> None:
        for key in list(self.made):
            self._close(key)

    def _close(self, key: tuple[str, int]) -> None:
        try:
            self.made.pop(key).close()
        except Exception as error:  # noqa: BLE001 (its episodes are over, or broke off with an error that counts)
            what = f"raised {type(error).__name__} when it was closed: {in_one_line(error)}"
            warnings.warn(f"The environment of '{key[0]}' {what}.", stacklevel=2)


def _earned(reward: Any) -> float:
    found = one_number(reward)
    if found is None or not np.isfinite(found):
        what = "that is NaN or infinite" if np.size(reward) == 1 else f"of shape {np.shape(reward)}"
        raise UserError(f"returned a reward {what}")
    return found


class _named:
    """Errors of a job's environment, with its task, seed and moment in their sentence."""

    def __init__(self, job: Job, when: str):
        self.job, self.when = job, when

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) and type(error) is not UserError:
            return  # such as a missing package: it says all there is to say
        if isinstance(error, Exception):
            happened = f"{error} {self.when}"
            if not isinstance(error, UserError):
                happened = f"raised {type(error).__name__} {self.when}: {in_one_line(error)}"
            raise UserError(f"The environment of '{self.job.task}', seed {self.job.seed}, {happened}.") from error


class Died(Exception):
    """A simulator's process ended without a word."""


class Simulator:
    """A stage in a process of its own."""

    def __init__(self, sizes: dict[str, tuple[str, tuple[int, ...]]]):
        context = multiprocessing.get_context("spawn")  # forked, it would inherit threads that no longer run
        memory = {
            name: context.RawArray("b", int(np.prod(shape)) * np.dtype(kind).itemsize)
            for name, (kind, shape) in sizes.items()
        }
        self.board = _view(memory, sizes)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, memory, sizes), daemon=True)
        with one_core_each():
            self.process.start()
        theirs.close()  # so that ours ends when the process does

    def send(self, message: Sequence[Job] | None) -> None:
        """Send jobs to begin, or None for a step.

        `receive` returns when it is done.
        """
        with suppress(BrokenPipeError, ConnectionResetError):  # `receive` will find out
            self.connection.send(message)

    def receive(self) -> None:
        """Wait for the answer.

        Raises:
            UserError: what the simulator raised.
            Died: if its process is no more.
        """
        try:
            while not self.connection.poll(LOOK):
                if not self.process.is_alive():  # children of its own may keep the connection open
                    raise Died
            error = self.connection.recv()
        except (EOFError, ConnectionResetError) as ended:
            raise Died from ended
        if error is not None:
            raise error

    def kill(self) -> None:
        """End its process at once, so that whoever is waiting in `receive` learns that it died."""
        self.process.kill()

    def close(self) -> None:
        self.connection.close()  # its process ends by itself
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class LocalSimulator:
    """A stage in this process."""

    def __init__(self, sizes: dict[str, tuple[str, tuple[int, ...]]]):
        self.board = Board(**{name: np.zeros(shape, kind) for name, (kind, shape) in sizes.items()})
        self.stage = Stage(self.board)

    def send(self, message: Sequence[Job] | None) -> None:
        if message is None:
            self.stage.step()
        else:
            self.stage.reset(message)

    def receive(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self.stage.close()


class Simulators:
    """A number of simulators, started when first needed and kept until `close`.

    With 0 workers there is one, in this process.
    """

    def __init__(self, workers: int | None = None):
        refuse_while_imported()
        self.workers = available_cores() if workers is None else workers
        if self.workers < 0:
            raise UserError(f"workers must be a whole number of at least 0, got {workers}.")
        if self.workers > (cores := available_cores()):
            warnings.warn(
                f"workers={workers} was given on {cores} cores: simulators beyond these wait for each other.",
                stacklevel=2,
            )
        self.sizes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.running: list[Simulator | LocalSimulator] = []

    def provide(self, count: int, rows: int, interface: Interface) -> list[Simulator | LocalSimulator]:
        """At most `count` simulators for groups of this many rows."""
        sizes = Board.sizes(rows, interface)
        if self.sizes != sizes:
            self.close()
            self.sizes = sizes
        make = Simulator if self.workers else LocalSimulator
        while len(self.running) < min(max(self.workers, 1), count):
            self.running.append(make(sizes))
        return self.running[:count]

    def replace(self, dead: Simulator | LocalSimulator) -> Simulator | LocalSimulator:
        """A new simulator in the place of one that died."""
        dead.close()
        self.running[self.running.index(dead)] = new = type(dead)(self.sizes)
        return new

    def kill(self) -> None:
        """End their processes at once, whatever they are doing.

        `close` must still be called.
        """
        for simulator in self.running:
            simulator.kill()

    def close(self) -> None:
        while self.running:
            self.running.pop().close()

    def __enter__(self) -> Simulators:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _view(memory: dict[str, Any], sizes: dict[str, tuple[str, tuple[int, ...]]]) -> Board:
    return Board(**{name: np.frombuffer(memory[name], kind).reshape(shape) for name, (kind, shape) in sizes.items()})


def _serve(connection: Connection, memory: dict[str, Any], sizes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """What a simulator's process does until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the connection
    stage = Stage(_view(memory, sizes))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = connection.recv()
            try:
                stage.step() if message is None else stage.reset(message)
            except UserError as error:
                connection.send(error)
            else:
                connection.send(None)
    stage.close()
