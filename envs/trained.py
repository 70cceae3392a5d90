"""Trained policies that ship with the domains: `experts/<domain>.<task>.safetensors`, each a few snapshots of one training.

A file holds `weights` (K, act, obs) and `biases` (K, act) of K linear policies in the order of training, each an action
for an observation: clip(W o + b). `returns` (K,) are their mean undiscounted episode returns. The last is the expert.
The metadata's `medium` is the number of the one about halfway in return between random actions and the expert. Where
none is, a file holds the expert alone. `python -m tools.experts` makes these files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
from safetensors import safe_open

from eva_rl.envs.domain import Policy

FOLDER = Path(__file__).with_name("experts")
QUALITIES = ("expert", "medium", "mixed")


@dataclass(frozen=True)
class Snapshots:
    """Linear policies of one training, from its beginning to the expert."""

    weights: np.ndarray  #: (K, act, obs)
    biases: np.ndarray  #: (K, act)
    returns: np.ndarray  #: (K,)
    medium: int

    def policy(self, number: int, space: gym.spaces.Box) -> Policy:
        """The policy of one snapshot, its actions within `space`."""
        weights, bias = self.weights[number], self.biases[number]
        return lambda observation: np.clip(weights @ observation + bias, space.low, space.high)

    def chosen(self, quality: str, episode: int) -> int:
        """The snapshot that plays this episode: for `mixed`, all in turn.

        Each round begins one later, so that a snapshot does not meet the same action noise, which is taken in turn, too, in all of them.
        """
        count = len(self.weights)
        if quality == "mixed":
            return (episode + episode // count) % count
        return self.medium if quality == "medium" else count - 1


def path_of(domain: str, name: str) -> Path:
    """Where the trained policies of a task are, if it has any."""
    return FOLDER / f"{domain}.{name}.safetensors"


@cache
def load(domain: str, name: str) -> Snapshots | None:
    """The trained policies of a task, or None where it has none."""
    path = path_of(domain, name)
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as file:
        weights, biases, returns = (file.get_tensor(part) for part in ("weights", "biases", "returns"))
        return Snapshots(weights, biases, returns, int(file.metadata()["medium"]))
