"""Atari 2600 games (Bellemare et al. 2013, https://ale.farama.org) in the usual preprocessing.

Observations: the last four frames, grey, 84 x 84, each the pixelwise maximum of the last two screens of a step.
Actions: the console's 18, the same for every game. Rewards: points of the game, unclipped. A step is four screens; an
episode ends with the game, not with a life, and is cut after 1000 steps (67 seconds of play), so that one takes seconds
to play and its observations 28 MB to store.

Sticky actions (Machado et al. 2018): at each screen the console repeats its last input with probability 0.25. The games
themselves are deterministic, so that without it there were one episode for each number of no-ops at the start, thirty
in all, and evaluations would replay the training data. With it every seed is an episode of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from eva_rl.envs.domain import Domain, Policy

EPISODE_LENGTH = 1000  # steps
FRAME_SKIP = 4  # screens a step
FRAMES = 4
SIZE = 84  # pixels
MAX_NO_OPS = 30  # screens
REPEAT_ACTION_PROBABILITY = 0.25

NO_OP, FIRE, UP, RIGHT, LEFT, DOWN = range(6)
MOVES = {  # by the signs of the steps to the right and downwards
    (0, 0): NO_OP, (0, -1): UP, (1, 0): RIGHT, (-1, 0): LEFT, (0, 1): DOWN,
    (1, -1): 6, (-1, -1): 7, (1, 1): 8, (-1, 1): 9,
}  # fmt: skip

ROMS = {"Boxing": "boxing", "Breakout": "breakout", "Freeway": "freeway", "Pong": "pong"}
HELDOUT = ("Breakout",)
FIRES_TO_START = ("Breakout",)


class Atari(Domain):
    name = "atari"
    extra = "atari"
    tasks = tuple(ROMS)
    splits = {  # noqa: RUF012
        "train": tuple(name for name in ROMS if name not in HELDOUT),
        "heldout": HELDOUT,
        "all": tuple(ROMS),
    }

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("ale_py")
        spec = EnvSpec(
            id=f"atari/{name}",
            entry_point="eva_rl.envs.atari:AtariGame",
            max_episode_steps=EPISODE_LENGTH,
            disable_env_checker=True,
            kwargs={"name": name},
        )
        return gym.make(spec, render_mode=render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        self.require("ale_py")
        game = env.unwrapped
        play = EXPERTS[name]()
        return lambda observation: np.int64(play(game.ram(), game.executed))


class AtariGame(gym.Env):
    """An Atari game whose episodes follow from `reset(seed=...)`: its no-ops at the start and its sticky actions."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 255, (FRAMES, SIZE, SIZE), np.uint8)
    action_space = gym.spaces.Discrete(18)

    def __init__(self, name: str, render_mode: str | None = None):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # before the console is made: it greets
        self.render_mode = render_mode
        self._name = name
        self._console = ale_py.AtariEnv(
            ROMS[name],
            obs_type="grayscale",
            frameskip=1,
            repeat_action_probability=REPEAT_ACTION_PROBABILITY,
            full_action_space=True,
            render_mode=render_mode,
        )
        self._shrink = _shrink_to(SIZE, *self._console.observation_space.shape)
        self._frames = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
        self.executed: list[int] = []
        """The actions of the episode's last steps, which need not be those that the expert had asked for."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        # Always re-seeded, so that an episode depends on its own seed and not on the episodes before it.
        screen, _ = self._console.reset(seed=int(self.np_random.integers(2**31)))
        start = [NO_OP] * int(self.np_random.integers(1, MAX_NO_OPS + 1))
        start += [FIRE] * FRAME_SKIP if self._name in FIRES_TO_START else []
        for action in start:
            screen, *_ = self._console.step(action)
        self.executed = [NO_OP, NO_OP]
        self._frames[:] = self._shrink(screen)
        return self._frames.copy(), {}

    def step(self, action: int):
        total, terminated = 0.0, False
        screens = [np.uint8(0), np.uint8(0)]
        for _ in range(FRAME_SKIP):
            screen, reward, terminated, _, _ = self._console.step(int(action))
            screens = [screens[-1], screen]
            total += float(reward)
            if terminated:
                break
        self.executed = [self.executed[-1], int(action)]
        self._frames[:-1] = self._frames[1:].copy()
        self._frames[-1] = self._shrink(np.maximum(*screens))  # some games draw an object on every other screen
        return self._frames.copy(), total, terminated, False, {}

    def ram(self) -> np.ndarray:
        """The console's memory, (128,)."""
        return self._console.ale.getRAM()

    def render(self):
        return self._console.render()

    def close(self):
        self._console.close()


def _shrink_to(size: int, height: int, width: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that shrinks a picture (height, width) to (size, size) by the mean over the area under each pixel.

    The weights are whole numbers, and small enough for float32 sums to be exact: every machine gives the same pixels.
    """
    rows, columns = _overlaps(height, size), _overlaps(width, size)
    area = rows[0].sum() * columns[0].sum()
    rows, columns = rows.astype(np.float32), columns.astype(np.float32).T

    def shrink(picture: np.ndarray) -> np.ndarray:
        sums = rows @ picture.astype(np.float32) @ columns  # (size, size)
        return ((sums + area // 2) // area).astype(np.uint8)

    return shrink


def _overlaps(length: int, size: int) -> np.ndarray:
    """How much of each of `length` pixels lies under each of `size` pixels, (size, length), in whole units."""
    unit = np.gcd(length, size)
    fine, coarse = size // unit, length // unit  # the lengths of a pixel before and after, in units
    starts, starts_before = np.arange(size)[:, None] * coarse, np.arange(length) * fine
    ends, ends_before = starts + coarse, starts_before + fine
    return np.clip(np.minimum(ends, ends_before) - np.maximum(starts, starts_before), 0, None)


class PongExpert:
    """Where to hit the ball so that the computer's paddle, which is a little slower than a steep ball, misses it.

    The right paddle's position (memory 51) answers a press of the stick over three steps, 22 pixels in all. The ball
    (x 49, y 54; velocities per screen 56 and, leftwards, 58) leaves steeply when hit with the paddle's ends. A steep ball
    wins if its last way to the computer's side crosses the whole court, that is if it starts from about the middle.
    """

    TOP, BOTTOM = 45.25, 205.5  # where the ball turns
    CONTACT = 188  # the ball's x at the paddle
    REST = 125
    CENTRE, UPPER_END, LOWER_END = 6.5, -1.0, 14.0  # of the paddle, relative to its position
    PRESS = (0, 9, 19, 22)  # pixels that a press has moved the paddle after 0, 1, 2 and 3 steps

    def __call__(self, ram: np.ndarray, executed: list[int]) -> int:
        x, y, paddle = (int(ram[address]) for address in (49, 54, 51))
        down, left = (int(ram[address].astype(np.int8)) for address in (56, 58))
        if left < 0 and x > 40:
            steps = max(self.CONTACT - x, 0) / (-left * FRAME_SKIP)
            hit = self._reflected(y + down * FRAME_SKIP * steps)
            if hit < self.REST:
                end = self.LOWER_END
            elif hit < 162:
                end = self.UPPER_END
            else:
                end = self.CENTRE
            return self._steer(paddle, executed, hit - end, max(steps, 0.5))
        return self._steer(paddle, executed, self.REST, 4.0)

    def _reflected(self, y: float) -> float:
        span = self.BOTTOM - self.TOP
        y = (y - self.TOP) % (2 * span)
        return self.TOP + min(y, 2 * span - y)

    def _steer(self, paddle: int, executed: list[int], target: float, steps: float) -> int:
        """The first of the presses that bring the paddle nearest to `target` within `steps` steps."""
        moved = paddle
        for age, action in enumerate(reversed(executed), start=1):
            direction = {LEFT: 1, RIGHT: -1}.get(action % 7 + NO_OP, 0) if action in (RIGHT, LEFT) else 0
            moved += direction * (self._travel(steps + age) - self._travel(age))
        presses = np.array(list(itertools.product((-1, 0, 1), repeat=int(np.clip(np.ceil(steps), 1, 3)))))
        reach = np.clip(moved + presses @ self._travel(steps - np.arange(presses.shape[1])), 38, 203)
        costs = np.abs(reach - target) + 0.1 * np.abs(presses).sum(1)  # of equal ones the calmest
        return (RIGHT, NO_OP, LEFT)[presses[np.argmin(costs), 0] + 1]  # right is up

    def _travel(self, steps):
        return np.interp(steps, range(4), self.PRESS)
