"""A domain of your own, once copied to `envs/`: walk to a goal on a line. Run it as `python examples/new_domain.py`."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from eva_rl.envs.domain import Domain


class CorridorEnv(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.Box(-0.2, 0.2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state.copy(), {"success": 0.0}

    def step(self, action):
        self.state[0] = np.clip(self.state[0] + action[0], -1, 1)
        there = bool(abs(self.state[1] - self.state[0]) < 0.05)
        return self.state.copy(), float(there), there, False, {"success": float(there)}


class Corridor(Domain):
    name, extra, tasks, splits = "corridor", "corridor", ("Walk",), {"train": ("Walk",)}

    def make(self, name, render_mode=None):
        return gym.make(EnvSpec(f"corridor/{name}", f"{__name__}:CorridorEnv", max_episode_steps=20))

    def expert(self, name, env):
        return lambda seen: np.clip(seen[1:] - seen[:1], -0.2, 0.2)


DOMAIN = Corridor()
if __name__ == "__main__":
    env = DOMAIN.make("Walk")
    (observation, info), expert = env.reset(seed=0), DOMAIN.expert("Walk", env)
    while not info["success"]:
        observation, _, _, _, info = env.step(expert(observation))
    print("solved")
