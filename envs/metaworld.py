"""Meta-World (Yu et al. 2019, https://meta-world.github.io): fifty manipulation tasks of one simulated robot arm.

Observations: 39 numbers (hand, gripper and two objects, now and one step ago, and the goal). Actions: 4 numbers in
[-1, 1] (hand displacement, gripper). Rewards: 0 to 10 a step. The goal is part of the observation.
"""

from __future__ import annotations

import os
import sys
import warnings
from copy import copy
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np

from eva_rl.envs.domain import Domain, Policy

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import RenderMode, SawyerXYZEnv

EPISODE_LENGTH = 200

CW10 = (  # the ten tasks of Continual World (Wołczyk et al. 2021), EVA's fine-tuning tasks
    "hammer-v3", "push-wall-v3", "faucet-close-v3", "push-back-v3", "stick-pull-v3", "handle-press-side-v3", "push-v3",
    "shelf-place-v3", "window-close-v3", "peg-unplug-side-v3",
)  # fmt: skip
MT40 = (  # the other forty
    "assembly-v3", "basketball-v3", "bin-picking-v3", "box-close-v3", "button-press-topdown-v3",
    "button-press-topdown-wall-v3", "button-press-v3", "button-press-wall-v3", "coffee-button-v3", "coffee-pull-v3",
    "coffee-push-v3", "dial-turn-v3", "disassemble-v3", "door-close-v3", "door-lock-v3", "door-open-v3",
    "door-unlock-v3", "drawer-close-v3", "drawer-open-v3", "faucet-open-v3", "hand-insert-v3", "handle-press-v3",
    "handle-pull-side-v3", "handle-pull-v3", "lever-pull-v3", "peg-insert-side-v3", "pick-out-of-hole-v3",
    "pick-place-v3", "pick-place-wall-v3", "plate-slide-back-side-v3", "plate-slide-back-v3", "plate-slide-side-v3",
    "plate-slide-v3", "reach-v3", "reach-wall-v3", "soccer-v3", "stick-push-v3", "sweep-into-v3", "sweep-v3",
    "window-open-v3",
)  # fmt: skip

DEV = ("box-close-v3", "coffee-push-v3", "handle-pull-side-v3", "stick-push-v3", "sweep-into-v3")
"""Five of MT40 on which recipes are chosen, with a base that has seen the other thirty-five (the split `mt35`).

They are of the kinds that CW10 has: something to be placed, pushed, pulled by a handle, moved with a tool, and swept.
Each has a relative among the thirty-five, as CW10's tasks have among MT40.
"""


SCALAR_LAST = {
    "coffee-pull-v3", "coffee-push-v3", "door-close-v3", "door-open-v3", "lever-pull-v3", "peg-insert-side-v3", "pick-place-v3",
    "pick-place-wall-v3", "plate-slide-back-side-v3", "plate-slide-back-v3", "plate-slide-side-v3", "plate-slide-v3", "push-back-v3",
    "push-v3", "push-wall-v3", "reach-v3", "reach-wall-v3", "shelf-place-v3", "soccer-v3", "stick-pull-v3", "stick-push-v3",
    "sweep-into-v3",
}  # fmt: skip
"""Tasks whose quaternions are (x, y, z, w), as SciPy has them. Those of the others are (w, x, y, z), as in MuJoCo."""


class MetaWorld(Domain):
    name = "metaworld"
    extra = "metaworld"
    tasks = tuple(sorted(MT40 + CW10))
    splits = {  # noqa: RUF012
        "mt40": MT40,
        "cw10": CW10,
        "mt50": tuple(sorted(MT40 + CW10)),
        "dev": DEV,
        "mt35": tuple(name for name in MT40 if name not in DEV),
    }

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("metaworld")
        return self.registered("SeededMetaWorld", name, EPISODE_LENGTH, render_mode)

    def mirror(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """At the plane x = 0, in which the robot stands: a quaternion (w, x, y, z) becomes (w, x, -y, -z)."""
        y, z = (1, 2) if name in SCALAR_LAST else (2, 3)
        signs = np.ones(39, np.float32)
        for first in (0, 18):  # now, and one step ago
            signs[[first, first + 4, first + 11]] = -1  # x of the hand and of both objects
            for quaternion in (first + 7, first + 14):
                signs[[quaternion + y, quaternion + z]] = -1
        signs[36] = -1  # x of the goal
        return signs, np.array([-1, 1, 1, 1], np.float32)

    def expert(self, name: str, env: gym.Env) -> Policy:
        policy = self.require("metaworld.policies").ENV_POLICY_MAP[name]()

        def act(observation: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():  # the policies warn that they leave the clipping to the environment
                warnings.filterwarnings("ignore", message="Constant")
                return np.clip(policy.get_action(observation), -1.0, 1.0).astype(np.float32)

        return act


@cache
def compiled_once(environment: type[SawyerXYZEnv]) -> type[SawyerXYZEnv]:
    """The class of Meta-World with a copy of its model where it would compile it again: fifty environments in a fifth of the time."""

    class Copied(environment):
        def _initialize_simulation(self) -> tuple[Any, Any]:
            mujoco = import_module("mujoco")  # compiled, and without stubs
            model = copy(compiled(self.fullpath))
            size = model.vis.global_  # as gymnasium does it: the picture grows with what is asked for
            size.offwidth, size.offheight = max(size.offwidth, self.width), max(size.offheight, self.height)
            return model, mujoco.MjData(model)

    return Copied


@lru_cache(maxsize=1)
def compiled(path: str) -> Any:
    """The model of this XML file, of which each environment takes a copy, because it changes its own."""
    return import_module("mujoco").MjModel.from_xml_path(path)


class SeededMetaWorld(gym.Env):
    """A Meta-World task whose goal and object positions follow from `reset(seed=...)`.

    Meta-World's own environments ignore that seed and draw from numpy's global state or from a list of fifty fixed
    goals. Here every seed is a goal of its own.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 80}  # noqa: RUF012
    observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, name: str, render_mode: str | None = None):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.render_mode = render_mode
        if render_mode is not None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        make = compiled_once(ALL_V3_ENVIRONMENTS[name])
        self._env = make(render_mode=cast("RenderMode | None", render_mode), camera_name="corner2")
        self._env._partially_observable = False  # the goal is observed
        # The observation space is cached and observations are clipped to it: one made before would zero the goal.
        vars(self._env).pop("sawyer_observation_space", None)
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env.touching_object = self._touching

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        # Always re-seeded, so that an episode depends on its own seed and not on the episodes before it.
        self._env.seed(int(self.np_random.integers(2**31)) if seed is None else seed)
        observation, _ = self._env.reset()
        return observation, {"success": 0.0}

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = self._env.step(action)
        return observation, float(reward), terminated, truncated, {"success": float(info["success"])}

    def _touching(self, object_geom_id: int) -> bool:
        """Whether both pads of the gripper press on a geom.

        The answer of Meta-World's `touching_object`, which goes through all contacts twice in Python: a third to a half of a step
        in the tasks that ask.
        """
        data = self._env.data
        pairs = data.contact.geom  # (contacts, 2)
        on_geom = (pairs == object_geom_id).any(1)

        def pressed(pad: str) -> bool:
            touching = on_geom & (pairs == data.geom(pad).id).any(1)
            return sum(data.efc_force[data.contact.efc_address[touching]]) > 0

        return pressed("leftpad_geom") and pressed("rightpad_geom")

    def render(self):
        picture = self._env.render()
        if self.render_mode == "rgb_array":
            picture = np.rot90(np.asarray(picture), 2)  # the camera hangs upside down
        return picture

    def close(self):
        self._env.close()


DOMAIN = MetaWorld()
