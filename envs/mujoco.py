"""Gymnasium's MuJoCo tasks (https://gymnasium.farama.org/environments/mujoco), the locomotion that offline RL is compared on.

Observations: 9 to 23 numbers, the simulator's positions and velocities, as Gymnasium gives them, in float32. Actions: 1 to 7 torques.
Each task goes through an interface of its own. The tasks define no success.

Scores of HalfCheetah, Hopper and Walker2d are normalised by the returns of D4RL (Fu et al. 2020,
https://arxiv.org/abs/2004.07219), which were measured on version 2 of these tasks. The other tasks' scores are
normalised by the returns of random actions and of the expert here.
"""

from __future__ import annotations

import os
import sys
from typing import Any, cast

import gymnasium as gym
import numpy as np

from eva_rl.envs.domain import Domain, Policy, ReferenceScores, time_limit
from eva_rl.envs.trained import QUALITIES, load

TASKS = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "InvertedDoublePendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Walker2d-v5",
)
# Near: a second leg for the hopper, and the reacher's arm in three dimensions, with something to push.
HELDOUT = ("Pusher-v5", "Walker2d-v5")

D4RL = {
    "HalfCheetah-v5": ReferenceScores(-280.178953, 12135.0),
    "Hopper-v5": ReferenceScores(-20.272305, 3234.3),
    "Walker2d-v5": ReferenceScores(1.629008, 4592.3),
}
"""Returns of random actions and of a trained SAC: `REF_MIN_SCORE` and `REF_MAX_SCORE` of d4rl/infos.py."""


class MuJoCo(Domain):
    name = "mujoco"
    extra = "mujoco"
    tasks = TASKS
    splits = {"train": tuple(t for t in TASKS if t not in HELDOUT), "heldout": HELDOUT, "all": TASKS}  # noqa: RUF012
    shared_spaces = False

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("mujoco")
        return self.registered("MuJoCoTask", name, time_limit(name), render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        return self.demonstrator(name, env, "expert", 0)

    def qualities(self, name: str) -> tuple[str, ...]:
        snapshots = load(self.name, name)
        return QUALITIES if snapshots and len(snapshots.weights) > 1 else ("expert",)

    def demonstrator(self, name: str, env: gym.Env, quality: str, episode: int) -> Policy:
        if name == "Reacher-v5":
            return reacher
        snapshots = load(self.name, name)
        assert snapshots is not None, name
        return snapshots.policy(snapshots.chosen(quality, episode), cast("gym.spaces.Box", env.action_space))

    def reference_scores(self, name: str) -> ReferenceScores | None:
        return D4RL.get(name) or super().reference_scores(name)


class MuJoCoTask(gym.Env):
    """A task of Gymnasium's that is seeded anew with each episode and observed in float32."""

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"]}  # noqa: RUF012

    def __init__(self, name: str, render_mode: str | None = None):
        self.render_mode = render_mode
        if render_mode is not None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        # Without its own time limit: the one of the spec that makes this environment is enough.
        self.simulator = gym.make(
            name, render_mode=render_mode, max_episode_steps=-1, disable_env_checker=True
        ).unwrapped
        self.metadata = self.simulator.metadata
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.simulator.observation_space.shape, np.float32)
        self.action_space = self.simulator.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        # Always seeded, so that an episode depends on its own seed and not on the episodes before it.
        observation, _ = self.simulator.reset(
            seed=int(self.np_random.integers(2**31)) if seed is None else seed, options=options
        )
        return observation.astype(np.float32), {}

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, _ = self.simulator.step(action)
        return observation.astype(np.float32), float(reward), bool(terminated), bool(truncated), {}

    def render(self):
        return self.simulator.render()

    def close(self):
        self.simulator.close()


def reacher(observation: np.ndarray) -> np.ndarray:
    """Pull the fingertip to the target through the transposed Jacobian, and damp the joints.

    The gains were found by search. A linear policy can't do this, because which way a joint moves the fingertip depends
    on the arm's pose.
    """
    cosine, cosine_2, sine, sine_2, _, _, speed, speed_2, *from_target = observation.tolist()
    both_cosine, both_sine = cosine * cosine_2 - sine * sine_2, sine * cosine_2 + cosine * sine_2  # of the angles' sum
    outer = np.array([-0.11 * both_sine, 0.11 * both_cosine])  # m, the fingertip's way for a radian of the outer joint
    inner = outer + np.array([-0.1 * sine, 0.1 * cosine])
    pull = -40.0 * np.array(from_target)
    torque = [inner @ pull - 0.13 * speed - 0.07 * speed_2, outer @ pull - 0.07 * (speed + speed_2)]
    return np.clip(torque, -1.0, 1.0).astype(np.float32)


DOMAIN = MuJoCo()
