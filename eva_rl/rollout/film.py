"""Episodes to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from eva_rl.errors import UserError, in_one_line
from eva_rl.rollout.rollout import LONGEST, ForJobs, Policy, rollout
from eva_rl.rollout.simulators import Job, Simulators

if TYPE_CHECKING:
    import torch

    from eva_rl.interface import Interface

EVERY = 4
"""Steps from one frame to the next."""


def film(
    make_policy: Callable[[int], Policy] | ForJobs,
    interface: Interface,
    job: Job,
    device: torch.device | str = "cpu",
    max_steps: int | None = None,
    longest: int = LONGEST,
    every: int = EVERY,
) -> np.ndarray:
    """(T, height, width, 3) uint8: the job's episode. `job.make_env` takes a `render_mode`.

    max_steps, longest: where it is cut, as in `rollout`.
    every: steps from one frame to the next.

    Raises:
        UserError: if the environment can't be rendered here.
    """
    frames: list[np.ndarray] = []

    def make_env() -> gym.Env:
        try:
            return _Filmed(job.make_env(render_mode="rgb_array"), frames, job.task, every)
        except (TypeError, gym.error.Error) as error:  # it knows no such mode
            raise Unseen(job.task, in_one_line(error)) from error

    with Simulators(0) as simulators:
        jobs = [replace(job, make_env=make_env)]
        rollout(
            make_policy, interface, jobs, simulators, device, f"film {job.task}", max_steps=max_steps, longest=longest
        )
    return np.stack(frames)


class Unseen(UserError):
    """An environment that can't be rendered here."""

    def __init__(self, task: str, why: str):
        super().__init__(
            f"The environment of '{task}' can't be rendered ({why[:200]}): set video=false; where there is no display, "
            "MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa and that library."
        )


class _Filmed(gym.Wrapper):
    def __init__(self, env: gym.Env, frames: list[np.ndarray], task: str, every: int):
        super().__init__(env)
        self.frames, self.task, self.every, self.steps = frames, task, every, 0

    def reset(self, **options: Any):
        result = self.env.reset(**options)
        self._keep()
        return result

    def step(self, action: Any):
        result = self.env.step(action)
        self.steps += 1
        if self.steps % self.every == 0 or result[2] or result[3]:
            self._keep()
        return result

    def _keep(self) -> None:
        try:
            frame = self.env.render()
        except Exception as error:
            raise Unseen(self.task, f"{type(error).__name__}: {in_one_line(error)}") from error
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise Unseen(self.task, "it returned no picture")
        self.frames.append(frame.astype(np.uint8))
