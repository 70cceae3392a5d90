"""DeepMind Control Suite (Tassa et al. 2018, https://arxiv.org/abs/1801.00690): ten tasks of nine small simulated bodies.

Observations: the task's own observations, concatenated in the suite's order (3 to 24 numbers; positions in metres and
radians, velocities per second). Actions: 1 to 6 motor torques or forces, scaled to [-1, 1]. Rewards: 0 to 1 a simulator
control step, summed over the steps an action is repeated for, so that an episode's return lies between 0 and 1000. The
suite defines no success, so `info` has none.

The suite ships no experts. Those here are controllers of the textbook where there is one, and plan with the simulator
itself where there is none; they read the true state, so that noise on the executed actions does not mislead them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

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


class DMControl(Domain):
    name = "dmc"
    extra = "dmc"
    tasks = tuple(sorted(ACTION_REPEATS))
    splits = {"all": tuple(sorted(ACTION_REPEATS))}

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("dm_control")
        spec = EnvSpec(
            id=f"dmc/{name}-v0",
            entry_point="eva_rl.envs.dmc:SeededDMControl",
            max_episode_steps=EPISODE_LENGTH // ACTION_REPEATS[name],
            disable_env_checker=True,
            kwargs={"name": name, "action_repeat": ACTION_REPEATS[name]},
        )
        return gym.make(spec, render_mode=render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        self.require("dm_control")
        return EXPERTS[name](env.unwrapped)

    def interface(self, name: str) -> str:
        return f"dmc_{name.replace('-', '_')}"


class SeededDMControl(gym.Env):
    """A task of the suite whose episode follows from `reset(seed=...)`; `physics` is its simulator."""

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
    """Swing-up by energy pumping (Åström & Furuta 2000), then LQR about the upright."""

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        model = env.physics.model
        self.weight = model.body_subtreemass[1] * 9.81 * np.linalg.norm(model.body_ipos[1])  # m g l, Nm
        self.inertia = model.body_inertia[1, 1] + model.body_mass[1] * np.sum(model.body_ipos[1] ** 2)  # about the hinge
        self.gain = lqr(env, np.zeros(1), state_cost=(1.0, 0.1), control_cost=0.1)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        angle, velocity = _wrapped(self.physics.data.qpos[0]), self.physics.data.qvel[0]
        # The motor holds the unstable mode, which grows at sqrt(mgl/I), only within u_max / mgl of the upright.
        if abs(angle + velocity / np.sqrt(self.weight / self.inertia)) < CATCH / self.weight:
            return _action(-self.gain @ (angle, velocity))
        energy = self.inertia * velocity**2 / 2 + self.weight * (np.cos(angle) - 1)  # 0 upright at rest
        return _action([PUMP * (ENERGY - energy) * (1.0 if velocity >= 0 else -1.0)])
CATCH, PUMP, ENERGY = 0.9, 1.0, 0.1

class Cartpole:
    """Swing-up by energy pumping with the cart held near the middle, then LQR about the upright."""

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        self.gain = lqr(env, np.zeros(2), state_cost=CQ, control_cost=CR)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        position, angle = self.physics.data.qpos[0], _wrapped(self.physics.data.qpos[1])
        speed, velocity = self.physics.data.qvel
        if abs(angle + velocity / 3.8) < CC:
            return _action(-self.gain @ (position, angle, speed, velocity))
        energy = velocity**2 * 1.333/ 2 / 2 + 9.81 *(np.cos(angle) - 1)  # 0 upright at rest
        pump = CP * (energy -CE) * np.sign(velocity * np.cos(angle))
        return _action([np.clip(pump, -CM, CM) - CX * position - CV * speed])
CQ, CR = (1.0, 1.0, 0.1, 0.1), 1.0
CC, CP, CE, CM, CX, CV = 0.5, 1.0, 0.2, 0.8, 0.5, 0.3


class PointMass:
    """LQR to the middle of the plane, where the target is."""

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        self.gain = lqr(env, np.zeros(2), state_cost=(1.0, 1.0, 0.0, 0.0), control_cost=PR)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        return _action(-self.gain @ np.concatenate([self.physics.data.qpos, self.physics.data.qvel]))
PR=1e-3

class Reacher:
    """LQR in joint space to the nearer of the two poses whose finger is on the target."""

    def __init__(self, env: SeededDMControl):
        self.physics = env.physics
        qpos = env.physics.data.qpos
        links = 0.12
        x, y = env.physics.named.model.geom_pos["target", :2]
        wrist = np.arccos(np.clip((x**2 + y**2) / (2 * links**2) - 1, -1, 1))  # law of cosines
        goals = [np.array([np.arctan2(y, x) - bend / 2, bend]) for bend in (wrist, -wrist)]
        for goal in goals:  # the shoulder turns without end
            goal[0] = qpos[0] + _wrapped(goal[0] - qpos[0])
        self.goal = min(goals, key=lambda goal: np.abs(goal - qpos).max())
        self.gain = lqr(env, self.goal, state_cost=(1.0, 1.0, 0.0, 0.0), control_cost=RR)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        error = np.clip(self.physics.data.qpos - self.goal, -RC, RC)
        return _action(-self.gain @ np.concatenate([error, self.physics.data.qvel]))
RR,RC=0.1,0.5

def lqr(env: SeededDMControl, qpos: np.ndarray, state_cost: tuple[float, ...], control_cost: float) -> np.ndarray:
    """The gain K (act_dim, state_dim) of u = -K (x - x*), x = (qpos, qvel), for the equilibrium at `qpos`.

    The discrete dynamics x' = A x + B u of one action are finite differences of the simulator's own; the gain follows
    from iterating their Riccati equation.
    """
    import mujoco

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


def _action(control) -> np.ndarray:
    return np.clip(control, -1.0, 1.0).astype(np.float32)


EXPERTS = {
    "cartpole-balance": Cartpole,
    "cartpole-swingup": Cartpole,
    "pendulum-swingup": Pendulum,
    "point_mass-easy": PointMass,
    "reacher-easy": Reacher,
}
DOMAIN = DMControl()
