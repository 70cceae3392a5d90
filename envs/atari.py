"""Atari 2600 games (Bellemare et al. 2013, https://ale.farama.org) in the usual preprocessing.

Observations: the last four frames, grey, 84 x 84, each the pixelwise maximum of the last two screens of a step.
Actions: the console's 18, the same for every game. Rewards: points of the game, unclipped. A step is four screens. An
episode ends with the game, not with a life, and is cut after 1000 steps (67 seconds of play). An episode therefore
takes seconds to play, and its observations take 28 MB to store.

Sticky actions (Machado et al. 2018): at each screen the console repeats its last input with probability 0.25. The games
themselves are deterministic. Without sticky actions there would be one episode for each number of no-ops at the start,
thirty in all, and evaluations would replay the training data. With them, every seed is an episode of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import gymnasium as gym
import numpy as np

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
WITH_BUTTON = {NO_OP: FIRE} | {move: move + 8 for move in range(UP, 10)}
ACROSS = {move: across for (across, _), move in MOVES.items()}
ACROSS |= {WITH_BUTTON[move]: across for move, across in ACROSS.items()}

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
        return self.registered("AtariGame", name, EPISODE_LENGTH, render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        self.require("ale_py")
        game, play = cast("AtariGame", env.unwrapped), EXPERTS[name]
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
        last = screen = np.zeros((), np.uint8)
        for _ in range(FRAME_SKIP):
            last = screen
            screen, reward, terminated, _, _ = self._console.step(int(action))
            total += float(reward)
            if terminated:
                break
        self.executed = [self.executed[-1], int(action)]
        self._frames[:-1] = self._frames[1:].copy()
        self._frames[-1] = self._shrink(np.maximum(last, screen))  # some games draw an object on every other screen
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


def play_pong(ram: np.ndarray, executed: list[int]) -> int:
    """Hit a slow ball with the button pressed, which doubles its speed, and with the paddle's end, which makes it steep.

    Memory 51 holds the right paddle, 49 and 54 the ball, and 58 and 56 its speed in pixels a screen, leftwards and
    down. The computer's paddle is too slow for a steep ball, mostly if the ball's way crosses the whole court.
    """
    x, y, paddle = (int(ram[address]) for address in (49, 54, 51))
    right, down = -int(ram[58].astype(np.int8)), int(ram[56].astype(np.int8))
    target, steps = 125.0, 4.0  # the place to wait at
    if right > 0 and x > 40:
        steps = max(190 - x, 0) / (right * FRAME_SKIP)
        hit = _reflected(y + down * FRAME_SKIP * steps, 45.25, 205.5)
        target = hit - (13 if hit < 165 else 1)  # the lower end, the upper end
    action = _steer(paddle, executed, np.clip(target, 38, 203), steps, press=(0, 9, 19, 22), right=-1)
    return WITH_BUTTON[action] if right == 1 and x > 150 else action


def play_breakout(ram: np.ndarray, executed: list[int]) -> int:
    """Be where the ball comes down, and serve if there is none.

    Memory 72 holds the paddle's left end, 99 and 101 the ball, and 105 and 103 its speed in pixels a screen, leftwards
    and down. The fractions of the speed are in 106 and 102.
    """
    x, y, paddle = (int(ram[address]) for address in (99, 101, 72))
    if y == 0:
        return FIRE
    right = -(int(ram[105].astype(np.int8)) + ram[106] / 256)
    down = int(ram[103].astype(np.int8)) + ram[102] / 256
    target, steps = float(x), 4.0  # below the ball while it goes up
    if down > 0:
        steps = max(177 - y, 0) / (down * FRAME_SKIP)
        target = _reflected(x + right * FRAME_SKIP * steps, 56, 200)
    return _steer(paddle, executed, np.clip(target - 8, 55, 191), steps, press=(0, 12, 23), right=1)


def play_freeway(ram: np.ndarray, executed: list[int]) -> int:
    """The quickest way to the top, by dynamic programming over the chicken's heights in the next steps.

    Memory 14 holds the chicken's height. Memory 108 to 117 holds where the cars of the ten lanes are, from the lowest
    lane to the highest. The screen is 160 pixels wide and wraps around.
    """
    height = np.arange(178)
    lane = (height - 13) // 16  # in which a car would hit the chicken
    speeds = FRAME_SKIP / np.array([5, 4, 3, 2, 1, -1, -2, -3, -4, -5])
    up, down = np.minimum(height + FRAME_SKIP, height[-1]), np.maximum(height - FRAME_SKIP, 6)
    cost = (height[-1] - height) / FRAME_SKIP  # steps to the top, if no car came after those planned here
    for step in range(40, 0, -1):
        hit = np.zeros(12)  # the last two are no lanes: the pavements 10 and -1
        hit[:10] = np.abs((ram[108:118] + speeds * step) % 160 - 46) < 9
        cost = cost + 15 * hit[lane]  # a car throws it back by about a lane
        ways = np.stack([cost[up], cost, cost[down]])
        cost = np.where(height < 176, 1 + ways.min(0), 0)
    return (UP, NO_OP, DOWN)[np.argmin(ways[:, ram[14]])]


def play_boxing(ram: np.ndarray, executed: list[int]) -> int:
    """Close in from above or below, where a punch lands, with the button held.

    Memory 32 and 34 hold one's own place, 33 and 35 the computer's.
    """
    right, down = int(ram[33]) - int(ram[32]), int(ram[35]) - int(ram[34])
    right -= int(np.copysign(8, right))
    down -= int(np.copysign(20, down))
    action = MOVES[np.sign(right) * (abs(right) > 4), np.sign(down) * (abs(down) > 4)]
    return WITH_BUTTON[action] if max(abs(right), abs(down)) <= 12 else action


def _reflected(position: float, low: float, high: float) -> float:
    """Where a ball is that would be at `position` without the walls at `low` and `high`."""
    position = (position - low) % (2 * (high - low))
    return low + min(position, 2 * (high - low) - position)


def _steer(
    position: float, executed: list[int], target: float, steps: float, press: tuple[int, ...], right: int
) -> int:
    """The first of the presses of the stick that bring a paddle nearest to `target` within `steps` steps.

    Args:
        press: how far a press of one step has moved the paddle after 0, 1, ... steps.
        right: 1 where the stick's right increases `position`, -1 where it decreases it.
    """
    steps = max(steps, 0.5)

    def travelled(time):
        return np.interp(time, range(len(press)), press)

    for age, action in enumerate(reversed(executed), start=1):
        position += right * ACROSS[action] * (travelled(steps + age) - travelled(age))
    times = steps - np.arange(np.clip(np.ceil(steps), 1, 3))
    presses = np.array(list(itertools.product((-1, 0, 1), repeat=len(times))))
    misses = np.abs(position + presses @ travelled(times) - target) + np.abs(presses).sum(1)  # calm: a press may stick
    return MOVES[right * presses[np.argmin(misses), 0], 0]


EXPERTS = {"Boxing": play_boxing, "Breakout": play_breakout, "Freeway": play_freeway, "Pong": play_pong}

DOMAIN = Atari()
