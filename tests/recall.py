"""Toy environments for simulators' processes, which import this module: nothing heavy here."""

import os
import signal
import time

import gymnasium as gym
import numpy as np

START = 5
KILLER = 13
"""The seed whose episode kills its process."""


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


class Fragile(Recall):
    """Kills its own process once, at step 2 of the episode with this seed."""

    def __init__(self, marker: str):
        super().__init__(2)
        self.marker = marker

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.seed = seed
        return super().reset(seed=seed)

    def step(self, action):
        if self.seed == KILLER and self.step_number == 1 and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Mortal(Recall):
    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(Recall):
    def step(self, action):
        if self.length == 8 and self.step_number == 6:
            raise ValueError("the arm\nis stuck")
        return super().step(action)


class Stuck(Raises):
    """Once reset, it can't be closed."""

    def __init__(self):
        super().__init__()
        self.begun = False

    def reset(self, **options):
        self.begun = True
        return super().reset(**options)

    def close(self):
        if self.begun:
            raise OSError("no such\ndisplay")


class Hangs(Recall):
    def step(self, action):
        time.sleep(60)


class Forks(Hangs):
    """Its process has a child that outlives it for a while."""

    def step(self, action):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        return super().step(action)
