"""Arrays of your own -> a Minari dataset that `task=minari/mine/example-v0` takes: `python examples/own_dataset.py [id]`."""

import sys
from collections.abc import Iterator

import gymnasium as gym
import numpy as np

from eva_rl.data import load_dataset, write_dataset


def episodes(count: int = 8, steps: int = 30) -> Iterator[dict]:
    """Episodes of a point that is driven to the middle, in place of yours, which come from your logs.

    There is one observation more than actions: what followed the last.
    """
    rng = np.random.default_rng(0)
    for _ in range(count):
        position = [rng.uniform(-1, 1, 2)]
        actions = []
        for _ in range(steps):
            actions.append(-0.5 * position[-1] + rng.normal(0, 0.05, 2))
            position.append(position[-1] + 0.2 * actions[-1])
        yield {
            "observations": np.array(position, np.float32),  # (T + 1, 2)
            "actions": np.array(actions, np.float32),  # (T, 2)
            "rewards": -np.linalg.norm(position[1:], axis=1),  # (T,)
            "terminations": np.zeros(steps, bool),
            "truncations": np.arange(steps) == steps - 1,
        }


if __name__ == "__main__":
    dataset_id = sys.argv[1] if len(sys.argv) > 1 else "mine/example-v0"
    free = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    write_dataset(
        dataset_id, episodes(), free, gym.spaces.Box(-1, 1, (2,), np.float32), "A point driven to the middle."
    )
    print(load_dataset(dataset_id, f"minari/{dataset_id}").statistics())
