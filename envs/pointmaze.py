"""PointMaze (Fu et al. 2020, https://robotics.farama.org/envs/maze/point_maze): a ball pushed through a maze to a goal.

Observations: 6 numbers (position and velocity of the ball, position of the goal). Actions: 2 numbers in [-1, 1] (force).
Reward: 1 in the step that reaches the goal, 0 before. The walls are not observed: a policy learns each maze by heart.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np

from eva_rl.envs.domain import Domain, Policy

EPISODE_LENGTHS = {"Large": 800, "Medium": 600, "UMaze": 300}  # those of gymnasium-robotics
TASKS = tuple(EPISODE_LENGTHS)
HELDOUT = ("Large",)  # the one whose paths are longer than any in training

# How the controller pushes, in parts of the largest force.
POSITION_GAIN = 3.0  # for each metre to the waypoint
VELOCITY_GAIN = 0.5  # against each metre a second


class PointMaze(Domain):
    name = "pointmaze"
    extra = "pointmaze"
    tasks = TASKS
    splits = {"train": tuple(t for t in TASKS if t not in HELDOUT), "heldout": HELDOUT, "all": TASKS}  # noqa: RUF012

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("gymnasium_robotics")
        return self.registered("FlatPointMaze", name, EPISODE_LENGTHS[name], render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        """Follow the shortest path, from one of its turns to the next, by PD control of the position."""
        simulator = cast("FlatPointMaze", env.unwrapped).simulator
        maze, goal = simulator.maze, simulator.goal.copy()
        waypoints = _waypoints(maze.maze_map, tuple(maze.cell_xy_to_rowcol(goal)))

        def act(observation: np.ndarray) -> np.ndarray:
            position, velocity = observation[:2], observation[2:4]
            waypoint = waypoints.get(tuple(maze.cell_xy_to_rowcol(position)))
            target = goal if waypoint is None else maze.cell_rowcol_to_xy(np.array(waypoint))
            force = POSITION_GAIN * (target - position) - VELOCITY_GAIN * velocity
            return np.clip(force, -1.0, 1.0).astype(np.float32)

        return act


def _waypoints(maze_map: list[list[Any]], goal: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every free cell but the goal's: the end of the straight stretch that its shortest path begins with."""
    following: dict[tuple[int, int], tuple[int, int]] = {}
    queue = deque([goal])
    while queue:  # breadth first, from the goal outwards
        cell = queue.popleft()
        for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            neighbour = (cell[0] + step[0], cell[1] + step[1])
            if neighbour != goal and neighbour not in following and maze_map[neighbour[0]][neighbour[1]] != 1:
                following[neighbour] = cell
                queue.append(neighbour)
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for cell, end in following.items():  # nearest to the goal first, so `ends` knows the rest of each path
        straight = end != goal and (following[end][0] - end[0], following[end][1] - end[1]) == (
            end[0] - cell[0],
            end[1] - cell[1],
        )
        ends[cell] = ends[end] if straight else end
    return {cell: end for cell, end in ends.items() if end != goal}


class FlatPointMaze(gym.Env):
    """A maze of gymnasium-robotics with one flat observation, in which an episode ends when the goal is reached.

    The robotics package's own observation is a dictionary that names the position twice. Its own task goes on at the
    goal for the rest of the time limit. Here every step of an episode is one on the way, and the return is 1 for every
    episode that gets there, from wherever it started. One return-to-go can therefore be asked for in all of them.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 100}  # noqa: RUF012
    observation_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, name: str, render_mode: str | None = None):
        from gymnasium_robotics.envs.maze import maps
        from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

        self.render_mode = render_mode
        if render_mode is not None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        mazes: dict[str, Any] = {"Large": maps.LARGE_MAZE, "Medium": maps.MEDIUM_MAZE, "UMaze": maps.U_MAZE}
        self.simulator = PointMazeEnv(mazes[name], render_mode=render_mode, continuing_task=False)
        Path(self.simulator.tmp_xml_file_path).unlink(missing_ok=True)  # read by now, and left behind otherwise

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        # Always seeded, so that an episode depends on its own seed and not on the episodes before it.
        observation, info = self.simulator.reset(
            seed=int(self.np_random.integers(2**31)) if seed is None else seed, options=options
        )
        return _flat(observation), {"success": float(info["success"])}

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = self.simulator.step(action)
        return _flat(observation), float(reward), terminated, truncated, {"success": float(info["success"])}

    def render(self):
        return self.simulator.render()

    def close(self):
        self.simulator.close()


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([observation["observation"], observation["desired_goal"]], dtype=np.float32)  # (6,)


DOMAIN = PointMaze()
