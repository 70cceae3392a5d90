"""Gymnasium's own control tasks (https://gymnasium.farama.org): classic control, and walking and landing in Box2D.

Each task has observations and actions of its own, so each goes through an interface of its own. The Box2D tasks need the
extra. The classic ones come with Gymnasium.
"""

from __future__ import annotations

import math
from typing import Any, cast

import gymnasium as gym
import numpy as np

from eva_rl.envs.domain import Domain, Policy, time_limit

BOX2D = ("BipedalWalker-v3", "LunarLander-v3", "LunarLanderContinuous-v3")
CLASSIC = ("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")
# Near and far: the world of a training task with discrete actions instead, and a world that no training task shares.
HELDOUT = ("LunarLander-v3", "Pendulum-v1")
TASKS = tuple(sorted(BOX2D + CLASSIC))

SOLVED_RETURN = {  # the points from which on Gymnasium's documentation calls an episode a solution
    "BipedalWalker-v3": 300.0,
    "LunarLander-v3": 200.0,
    "LunarLanderContinuous-v3": 200.0,
}
REACHES_ITS_GOAL = ("Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")
"""Tasks that terminate in the goal and nowhere else."""


class Gymnasium(Domain):
    name = "gym"
    extra = "box2d"
    tasks = TASKS
    splits = {"train": tuple(t for t in TASKS if t not in HELDOUT), "heldout": HELDOUT, "all": TASKS}  # noqa: RUF012
    shared_spaces = False

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        if name in BOX2D:
            self.require("Box2D")
        if render_mode is not None:
            self.require("pygame")
        return self.registered("GymnasiumTask", name, time_limit(name), render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        if name == "BipedalWalker-v3":
            from gymnasium.envs.box2d.bipedal_walker import BipedalWalkerHeuristics

            gait = BipedalWalkerHeuristics()
            # As shipped it stumbles in most episodes. Slower, and on a straighter leg, it falls in one of twenty; but it
            # walks until the time limit, and passes 300 points in six episodes of ten.
            gait.SPEED = 0.25
            gait.SUPPORT_KNEE_ANGLE = gait.supporting_knee_angle = 0.05
            return lambda observation: gait.step_heuristic(observation).astype(np.float32)
        if name == "LunarLanderContinuous-v3":
            from gymnasium.envs.box2d.lunar_lander import heuristic

            simulator = cast("GymnasiumTask", env.unwrapped).simulator
            return lambda observation: np.asarray(heuristic(simulator, observation), np.float32)
        return CONTROLLERS[name]


class GymnasiumTask(gym.Env):
    """A task of Gymnasium that says in `info["success"]` whether it is solved, where the field agrees on what that is.

    - CartPole: the pole is still up at the time limit.
    - Acrobot, MountainCar: the goal is reached.
    - LunarLander, BipedalWalker: the episode ended with at least 200 or 300 points.
    - Pendulum has no such mark, and no `info["success"]`.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, name: str, render_mode: str | None = None):
        self.name = name
        self.render_mode = render_mode
        self.limit = time_limit(name)
        # Without its own time limit: the one of the spec that makes this environment is enough.
        self.simulator: Any = gym.make(
            name, render_mode=render_mode, max_episode_steps=-1, disable_env_checker=True
        ).unwrapped
        self.metadata = self.simulator.metadata
        self.observation_space = self.simulator.observation_space
        self.action_space = self.simulator.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if self.name == "BipedalWalker-v3":
            self._clear_world()
        # Always seeded, so that an episode depends on its own seed and not on the episodes before it.
        observation, _ = self.simulator.reset(
            seed=int(self.np_random.integers(2**31)) if seed is None else seed, options=options
        )
        self.steps, self.episode_return = 0, 0.0
        return observation, self._info(False)

    def step(self, action: Any):
        observation, reward, terminated, truncated, _ = self.simulator.step(action)
        self.steps += 1
        self.episode_return += float(reward)
        return observation, float(reward), bool(terminated), bool(truncated), self._info(bool(terminated))

    def render(self):
        return self.simulator.render()

    def close(self):
        self.simulator.close()

    def _info(self, terminated: bool) -> dict[str, float]:
        at_limit = self.steps >= self.limit
        if self.name == "CartPole-v1":
            solved = at_limit and not terminated
        elif self.name in REACHES_ITS_GOAL:
            solved = terminated
        elif self.name in SOLVED_RETURN:
            # Only at the end: a walker with enough points can still fall, which costs it 100.
            solved = (terminated or at_limit) and self.episode_return >= SOLVED_RETURN[self.name]
        else:
            return {}
        return {"success": float(solved)}

    def _clear_world(self) -> None:
        """Begin in a new world: one that was emptied remembers its earlier bodies in the order it solves contacts."""
        self.simulator._destroy()
        self.simulator.world = type(self.simulator.world)()


def acrobot(observation: np.ndarray) -> int:
    """Push the joint the way that adds energy, read off the links' angles and speeds, with gains found by search."""
    _, sine_1, _, sine_2, speed_1, speed_2 = observation
    return 2 if -0.57 * speed_1 + 0.11 * speed_2 - 0.75 * sine_1 - 0.32 * sine_2 > 0 else 0


def cartpole(observation: np.ndarray) -> int:
    """The sign of a linear feedback that drives position, speed, angle and angular speed to zero, the angle first."""
    return int(observation @ np.array([1.0, 1.5, 18.0, 3.0]) > 0)


def lunar_lander(observation: np.ndarray) -> int:
    """Lean against the drift, and sink along a funnel above the pad.

    The stronger of the two needs chooses the engine. Gymnasium's own heuristic gives up steering at the first touch of
    a leg, and slides down slopes beside the pad. It lands four episodes of five. This one steers until it touches the
    pad, and lands nearly all. The gains were found by search.
    """
    x, y, speed_x, speed_y, angle, angular_speed, left_leg, right_leg = observation.tolist()
    lean = min(max(0.47 * x + 0.91 * speed_x, -0.36), 0.36)  # radians
    turn = 0.75 * (lean - angle) - 1.22 * angular_speed
    lift = 0.29 * (0.63 * abs(x) - y) - 0.4 * speed_y
    if (left_leg or right_leg) and abs(x) < 0.2:  # the pad's half-width
        turn, lift = 0.0, -0.6 * speed_y
    if lift > max(abs(turn), 0.075):
        return 2  # the main engine
    if abs(turn) > 0.075:
        return 1 if turn > 0 else 3  # a side engine
    return 0


def mountain_car(observation: np.ndarray) -> int:
    """Push along the velocity, which adds energy.

    The curve, fitted by search, saves a swing where one is enough.
    """
    position, velocity = observation
    x = position + 0.5  # from the valley's floor
    return 2 if velocity > -0.0006 + 0.0214 * x - 0.0176 * x**3 else 0


def mountain_car_continuous(observation: np.ndarray) -> np.ndarray:
    """Push along the velocity, in proportion to it: force costs its square, and does most work at speed."""
    _, velocity = observation
    force = math.copysign(0.3, velocity) + 20.0 * velocity
    return np.clip(np.array([force], np.float32), -1.0, 1.0)


def pendulum(observation: np.ndarray) -> np.ndarray:
    """Pump energy up to that of the upright pose (Åström and Furuta 2000), and hold that pose by PD control near it."""
    cosine, sine, speed = observation
    hold = -12.0 * math.atan2(sine, cosine) - 3.0 * speed
    if cosine > 0 and abs(hold) < 4.0:  # twice the largest torque: close enough for holding to work
        torque = hold
    else:
        missing = 15.0 * (1.0 - cosine) - 0.5 * speed**2  # 3g / 2l = 15, in units of the moment of inertia
        torque = 3.0 * missing * math.copysign(1.0, speed)
    return np.clip(np.array([torque], np.float32), -2.0, 2.0)


CONTROLLERS: dict[str, Policy] = {
    "Acrobot-v1": acrobot,
    "CartPole-v1": cartpole,
    "LunarLander-v3": lunar_lander,
    "MountainCar-v0": mountain_car,
    "MountainCarContinuous-v0": mountain_car_continuous,
    "Pendulum-v1": pendulum,
}

DOMAIN = Gymnasium()
