"""What needs no base: networks that start from nothing, against which a pretrained one has to earn its place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np

from eva_rl.data import interface_of
from eva_rl.model import CloningConfig, CloningMLP, DecisionTransformer
from eva_rl.spaces import nested

if TYPE_CHECKING:
    from eva_rl.data import Trajectories
    from eva_rl.interface import Interface
    from eva_rl.model import ModelConfig

STD_FLOOR = 1.5
"""Least standard deviation of an observation, in medians over the dimensions, as in pretraining: what rests in a few demonstrations,
such as the goal of a single one, moves in a rollout (benchmarks/results/recipe.md)."""
DROPOUT = 0.1


def untrained(
    network: str, like: ModelConfig, name: str, trajectories: Trajectories
) -> CloningMLP | DecisionTransformer:
    """A network with fresh weights for these trajectories alone, normalised by their own statistics.

    Args:
        network: `mlp`, a perceptron that sees one observation, or `fresh`, the transformer that the base is.
        like: the base's architecture.
        name: of the interface.
    """
    interface = interface_of(name, [trajectories], STD_FLOOR)
    if network == "fresh":
        return DecisionTransformer(replace(like, dropout=DROPOUT), [interface])
    return CloningMLP(CloningConfig(bounded=_scaled_by_bounds(trajectories.action_space, interface)), interface)


def _scaled_by_bounds(space: gym.Space, interface: Interface) -> bool:
    """Whether what a tanh reaches is all that the environment takes, as where no action was scaled by the data instead.

    Discrete actions have no bounds to leave. The outputs that predict actions of several parts go through no tanh.
    """
    if not isinstance(space, gym.spaces.Box):
        return not nested(space)
    reach = np.asarray(interface.action_mean) + np.outer((-1, 1), interface.action_scale)  # (2, act)
    return bool(np.allclose(reach, (space.low.ravel(), space.high.ravel())))
