"""DeepMind Control Suite (Tassa et al. 2018, https://arxiv.org/abs/1801.00690): ten tasks of nine small simulated bodies.

Observations: the task's own observations, concatenated in the suite's order (3 to 24 numbers). Positions are in metres
and radians, velocities per second. Actions: 1 to 6 motor torques or forces, scaled to [-1, 1]. Rewards: 0 to 1 a
simulator control step, summed over the steps an action is repeated for. An episode's return therefore lies between 0
and 1000. The suite defines no success, so `info` has none.

The suite ships no experts. Those here are textbook controllers where there is one, and plan with the simulator itself
where there is none. They read the true state, so noise on the executed actions does not mislead them.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

import gymnasium as gym
import numpy as np

from eva_rl.envs.domain import Domain, Policy

EPISODE_LENGTH = 1000
"""Simulator control steps an episode, as everywhere in the suite."""

ACTION_REPEATS = {  # those of PlaNet (Hafner et al. 2019, https://arxiv.org/abs/1811.04551) where it has the task
    "ball_in_cup-catch": 4,
    "cartpole-balance": 8,
    "cartpole-swingup": 8,
    "cheetah-run": 4,
    "finger-spin": 2,
    "hopper-stand": 4,
    "pendulum-swingup": 4,
    "point_mass-easy": 4,
    "reacher-easy": 4,
    "walker-walk": 2,
}

HELD_OUT = ("cartpole-swingup", "reacher-easy", "walker-walk")
"""The first task's body is trained on with another aim (the cart-pole balances). The second has a new body with
familiar dynamics (two more motors on a plane, like the point mass). The third has a new body that walks, like none
of those trained on but the cheetah and hopper."""


class DMControl(Domain):
    name = "dmc"
    extra = "dmc"
    tasks = tuple(sorted(ACTION_REPEATS))
    shared_spaces = False
    splits = {  # noqa: RUF012
        "all": tuple(sorted(ACTION_REPEATS)),
        "train": tuple(sorted(set(ACTION_REPEATS) - set(HELD_OUT))),
        "heldout": HELD_OUT,
    }

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("dm_control")
        return self.registered(
            "SeededDMControl",
            f"{name}-v0",
            EPISODE_LENGTH // ACTION_REPEATS[name],
            render_mode,
            name=name,
            action_repeat=ACTION_REPEATS[name],
        )

    def expert(self, name: str, env: gym.Env) -> Policy:
        self.require("dm_control")
        return EXPERTS[name](cast("SeededDMControl", env.unwrapped))


class SeededDMControl(gym.Env):
    """A task of the suite whose episode follows from `reset(seed=...)`, with its simulator as `physics`."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, name: str, action_repeat: int, render_mode: str | None = None):
        suite = _import_suite()
        self.render_mode = render_mode
        self.action_repeat = action_repeat
        # No time limit of the suite's own: Gymnasium's wrapper truncates. The seed is that of `reset`.
        self._env = suite.load(*name.split("-", 1), task_kwargs={"random": 0, "time_limit": float("inf")})
        self.metadata = self.metadata | {"render_fps": round(1 / (self._env.control_timestep() * action_repeat))}
        bounds = self._env.action_spec()
        self._low, self._high = bounds.minimum, bounds.maximum
        self.action_space = gym.spaces.Box(-1.0, 1.0, bounds.shape, np.float32)
        size = sum(int(np.prod(part.shape)) for part in self._env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    @property
    def physics(self):
        """The suite's `Physics` of this task, MuJoCo's model and data within it."""
        return self._env.physics

    @property
    def simulator_steps(self) -> int:
        """MuJoCo's steps for one action."""
        return round(self._env.control_timestep() / self.physics.timestep()) * self.action_repeat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        # Always re-seeded, so that an episode depends on its own seed and not on the episodes before it.
        self._env.task.random.seed(int(self.np_random.integers(2**31)))
        self.expert_seed = int(self.np_random.integers(2**31))
        return _flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray):
        unit = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0  # (act_dim,)
        control = self._low + unit * (self._high - self._low)
        reward = 0.0
        for _ in range(self.action_repeat):
            step = self._env.step(control)
            reward += float(step.reward)
            if step.last():
                break
        return _flat(step.observation), reward, step.last(), False, {}

    def render(self):
        return self.physics.render(height=240, width=320, camera_id=0) if self.render_mode == "rgb_array" else None

    def close(self):
        self._env.close()


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)  # (obs_dim,)


def _import_suite():
    """`dm_control.suite`, which chooses how it renders when it is first imported."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY") and "MUJOCO_GL" not in os.environ
    if headless:
        os.environ["MUJOCO_GL"] = "egl"
    try:
        from dm_control import suite
    except ImportError:
        if not headless:
            raise
        del os.environ["MUJOCO_GL"]  # no EGL on this machine: everything but pictures works without
        from dm_control import suite
    return suite


class Pendulum:
    """Swing-up by energy pumping (Åström & Furuta 2000, https://doi.org/10.1016/S0005-1098(99)00140-5), then LQR."""

    PUMP = 2.5  # 1 / (J s)
    ENERGY = 0.5  # J above that of the upright at rest, for what friction takes on the way

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        model = env.physics.model
        lever = np.linalg.norm(model.body_ipos[1])  # m
        self.weight = -model.opt.gravity[2] * model.body_mass[1] * lever  # m g l, N m
        self.inertia = model.body_inertia[1, 1] + model.body_mass[1] * lever**2  # about the hinge, kg m^2
        self.gain = lqr(env, np.zeros(1), state_cost=(1.0, 0.1), control_cost=0.1)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        angle, velocity = _wrapped(self.physics.data.qpos[0]), self.physics.data.qvel[0]
        # The motor's 1 N m holds the unstable mode, which grows at sqrt(mgl / I), only within 1 / mgl of the upright.
        if abs(angle + velocity / np.sqrt(self.weight / self.inertia)) < 1 / self.weight:
            return _action(-self.gain @ (angle, velocity))
        energy = self.inertia * velocity**2 / 2 + self.weight * (np.cos(angle) - 1)  # J, 0 upright at rest
        return _action([self.PUMP * (self.ENERGY - energy) * np.copysign(1.0, velocity)])


class Cartpole:
    """A planned swing-up, from which LQR about the upright takes over where the motor has the force for it."""

    RATE = np.sqrt(1.5 * 9.81)  # 1/s, at which the angle of an inverted rod of 1 m grows

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        self.planner = Planner(env, self.score, horizon=20, knots=5, samples=40, noise=1.5)
        self.gain = lqr(env, np.zeros(2), state_cost=(1.0, 1.0, 0.1, 0.1), control_cost=1.0)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        (position, angle), (speed, velocity) = self.physics.data.qpos, self.physics.data.qvel
        angle = _wrapped(angle)
        control = -self.gain @ (position, angle, speed, velocity)
        # Near the upright, on a motion that leads to it, and where the motor (of 1) has about the force asked for.
        if abs(angle) < 1 and abs(angle + velocity / self.RATE) < 0.4 and abs(control[0]) < 1.5:
            return _action(control)
        return self.planner(observation)

    @staticmethod
    def score(qpos: np.ndarray, qvel: np.ndarray, sensors: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """1 upright to -1 hanging, less for a cart away from the middle."""
        return np.cos(qpos[..., 1]) - 0.1 * qpos[..., 0] ** 2


class PointMass:
    """LQR to the middle of the plane, where the target is."""

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        self.gain = lqr(env, np.zeros(2), state_cost=(1.0, 1.0, 0.0, 0.0), control_cost=1e-3)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        return _action(-self.gain @ np.concatenate([self.physics.data.qpos, self.physics.data.qvel]))


class Reacher:
    """LQR in joint space to the nearer of the two poses whose finger is on the target."""

    LINK = 0.12  # m, each of the two
    STRIDE = 0.5  # rad: joints further from their goal than this are sent no harder

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        start = env.physics.data.qpos
        x, y = env.physics.named.model.geom_pos["target", :2]
        wrist = np.arccos(np.clip((x**2 + y**2) / (2 * self.LINK**2) - 1, -1, 1))  # law of cosines
        poses = [np.array([np.arctan2(y, x) - bend / 2, bend]) for bend in (wrist, -wrist)]
        for pose in poses:  # the shoulder turns without end
            pose[0] = start[0] + _wrapped(pose[0] - start[0])
        self.goal = min(poses, key=lambda pose: np.abs(pose - start).max())
        self.gain = lqr(env, self.goal, state_cost=(1.0, 1.0, 0.0, 0.0), control_cost=0.1)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        error = np.clip(self.physics.data.qpos - self.goal, -self.STRIDE, self.STRIDE)
        return _action(-self.gain @ np.concatenate([error, self.physics.data.qvel]))


Score = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Rates (..., nq) positions, (..., nv) velocities, (..., nsensordata) sensor readings and (..., act_dim) actions."""


class Planner:
    """Predictive sampling (Howell et al. 2022, https://arxiv.org/abs/2212.00541) with the simulator as its model.

    The plan is a spline of `knots` points through the next `horizon` actions. A call moves the last plan on by one
    action, simulates it and `samples` - 1 noisy copies of it from the true state, and keeps the copy that `score` rates
    highest on average. `timestep` is that of the simulation, in seconds, where it may be coarser than the
    environment's. Only every `every`-th call plans.
    """

    def __init__(
        self,
        env: SeededDMControl,
        score: Score,
        *,
        horizon: int,
        knots: int,
        samples: int,
        noise: float,
        timestep: float | None = None,
        every: int = 1,
    ):
        mujoco = import_module("mujoco")  # compiled, and without stubs

        self.physics, self.score, self.samples, self.noise, self.every = env.physics, score, samples, noise, every
        self.model = copy.copy(env.physics.model.ptr)
        seconds = env.simulator_steps * self.model.opt.timestep
        self.model.opt.timestep = timestep or self.model.opt.timestep
        self.substeps = round(seconds / self.model.opt.timestep)
        self.data = mujoco.MjData(self.model)
        self.rng = np.random.default_rng(env.expert_seed)
        self.plan = np.zeros((horizon, self.model.nu))  # (horizon, act_dim)
        at = np.linspace(0, knots - 1, horizon)[:, None]
        self.spline = np.maximum(0.0, 1.0 - np.abs(at - np.arange(knots)))  # (horizon, knots), linear interpolation
        self.calls = 0

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        if self.calls:
            self.plan = np.concatenate([self.plan[1:], self.plan[-1:]])
        if self.calls % self.every == 0:
            self.improve()
        self.calls += 1
        return _action(self.plan[0])

    def improve(self) -> None:
        mujoco, rollout = import_module("mujoco"), import_module("mujoco.rollout")

        # The sizes of the noise rise from 0, the last plan itself, to `noise`: small ones refine, large ones explore.
        sizes = self.noise * np.linspace(0, 1, self.samples)[:, None, None]
        points = sizes * self.rng.standard_normal((self.samples, self.spline.shape[1], self.model.nu))
        plans = np.clip(self.plan + self.spline @ points, -1.0, 1.0)  # (samples, horizon, act_dim)
        controls = np.repeat(plans, self.substeps, axis=1)  # (samples, horizon * substeps, act_dim)
        kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
        state = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.physics.model.ptr, self.physics.data.ptr, state, kind)
        states, sensors = rollout.rollout(self.model, self.data, np.tile(state, (self.samples, 1)), controls)
        seen = slice(self.substeps - 1, None, self.substeps)  # the state each action ends in
        _, qpos, qvel = np.split(states[:, seen], [1, 1 + self.model.nq], axis=-1)  # (samples, horizon, nq or nv)
        scores = self.score(qpos, qvel, sensors[:, seen], plans).mean(axis=1)  # (samples,)
        self.plan = plans[np.argmax(scores)]


class BallInCup:
    """Planned until the ball lies in the cup, which then comes to rest slowly, so that the ball stays in it."""

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        self.planner = Planner(env, self.score, horizon=15, knots=5, samples=40, noise=0.7, timestep=0.004)
        self.last = np.zeros(2)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        cup, ball = np.split(self.physics.data.qvel, 2)
        if self.physics.in_target() and np.abs(cup - ball).max() < 0.5:  # m/s
            self.last = 0.9 * self.last
            self.planner.plan[:] = self.last
            return _action(self.last)
        self.last = self.planner(observation)
        return self.last

    @staticmethod
    def score(qpos: np.ndarray, qvel: np.ndarray, sensors: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """1 for the ball in the cup, less its distance from there, m."""
        cup_x, cup_z, ball_x, ball_z = np.moveaxis(qpos, -1, 0)
        away = np.abs(np.stack([ball_x - cup_x, ball_z + 0.2 - (cup_z + 0.6 - 0.05)]))  # of the inside's middle
        return (away < 0.025).all(axis=0) - np.hypot(*away)


def spin_score(qpos: np.ndarray, qvel: np.ndarray, sensors: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The task's reward, and a slope towards it."""
    velocity = -qvel[..., 2]  # rad/s
    return (velocity >= 15) + 0.2 * np.clip(velocity, -20, 20) / 15


def run_score(qpos: np.ndarray, qvel: np.ndarray, sensors: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The forward speed of the whole body, m/s."""
    return sensors[..., 0]


def walk_score(qpos: np.ndarray, qvel: np.ndarray, sensors: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The task's reward without flat parts, so that a fallen walker feels what lifts it."""
    standing = np.clip((1.3 + qpos[..., 0]) / 1.2, 0, 1)
    stand = (3 * standing + (1 + np.cos(qpos[..., 2])) / 2) / 4
    return stand * (5 * np.clip(sensors[..., 0], -0.5, 1) + 1) / 6 + stand / 2


def stand_score(qpos: np.ndarray, qvel: np.ndarray, sensors: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The task's reward, and a slope towards it: torso high over foot and upright, hip stretched.

    Without the last it may settle in a squat, its torso on the ground.
    """
    tilt = np.cumsum(qpos[..., 2:7], axis=-1)  # rad, of torso, pelvis, thigh, calf and foot
    lengths = np.array([0.05 + 0.08, 0.2, 0.33, 0.32])  # m; 0.08 to the torso's centre of mass
    height = np.cos(tilt[..., :4]) @ lengths + 0.045 * np.sin(tilt[..., 4])
    reward = (height > 0.62) * (1 - 0.2 * np.mean(actions**2, axis=-1))
    return reward + np.clip(height, -1, 0.7) + 0.2 * np.cos(tilt[..., 0]) + 0.3 * np.cos(qpos[..., 4])


def lqr(env: SeededDMControl, qpos: np.ndarray, state_cost: tuple[float, ...], control_cost: float) -> np.ndarray:
    """The gain K (act_dim, state_dim) of u = -K (x - x*), x = (qpos, qvel), for the equilibrium at `qpos`.

    The discrete dynamics x' = A x + B u of one action are finite differences of the simulator's own. The gain follows
    from iterating their Riccati equation.
    """
    mujoco = import_module("mujoco")
    model = env.physics.model.ptr
    data = mujoco.MjData(model)
    n, m, epsilon = 2 * model.nv, model.nu, 1e-4

    def after(deviation: np.ndarray) -> np.ndarray:
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = qpos + deviation[: model.nq], deviation[model.nq : n]
        data.ctrl[:] = deviation[n:]
        mujoco.mj_step(model, data, env.simulator_steps)
        return np.concatenate([data.qpos, data.qvel])

    columns = [(after(step) - after(-step)) / (2 * epsilon) for step in epsilon * np.eye(n + m)]
    a, b = np.split(np.stack(columns, axis=1), [n], axis=1)  # (n, n), (n, m)
    cost_to_go = q = np.diag(state_cost)
    for _ in range(1000):
        gain = np.linalg.solve(control_cost * np.eye(m) + b.T @ cost_to_go @ b, b.T @ cost_to_go @ a)
        cost_to_go = q + a.T @ cost_to_go @ (a - b @ gain)
    return gain


def _wrapped(angle: float) -> float:
    """The same angle in [-pi, pi), rad."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _action(control: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.clip(control, -1.0, 1.0).astype(np.float32)


EXPERTS: dict[str, Callable[[SeededDMControl], Policy]] = {
    "ball_in_cup-catch": BallInCup,
    "cartpole-balance": Cartpole,
    "cartpole-swingup": Cartpole,
    "cheetah-run": lambda env: Planner(env, run_score, horizon=15, knots=8, samples=60, noise=1.5),
    "finger-spin": lambda env: Planner(env, spin_score, horizon=10, knots=10, samples=150, noise=4.0),
    "hopper-stand": lambda env: Planner(env, stand_score, horizon=20, knots=6, samples=40, noise=2.0, timestep=0.01),
    "pendulum-swingup": Pendulum,
    "point_mass-easy": PointMass,
    "reacher-easy": Reacher,
    "walker-walk": lambda env: Planner(
        env, walk_score, horizon=24, knots=6, samples=24, noise=1.0, timestep=0.005, every=2
    ),
}

DOMAIN = DMControl()
