"""What needs no base: networks that start from nothing, against which a pretrained one has to earn its place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from eva_rl.data import interface_of
from eva_rl.model import CloningConfig, CloningMLP, DecisionTransformer

if TYPE_CHECKING:
    from eva_rl.data import Trajectories
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
        network: `mlp`, a perceptron that sees one observation; `fresh`, the transformer that the base is.
        like: the base's architecture.
        name: of the interface.
    """
    interface = interface_of(name, [trajectories], STD_FLOOR)
    if network == "fresh":
        return DecisionTransformer(replace(like, dropout=DROPOUT), [interface])
    space = trajectories.action_space
    bounded = not hasattr(space, "is_bounded") or space.is_bounded()
    return CloningMLP(CloningConfig(bounded=bounded), interface)
