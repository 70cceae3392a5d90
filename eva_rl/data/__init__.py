"""Minari dataset -> packed tensors -> windows."""

from eva_rl.data.collection import Recipe, collect
from eva_rl.data.load import environment_of, load_dataset, score_scale_of
from eva_rl.data.trajectories import Trajectories, interface_of, pack, returns_to_go
from eva_rl.data.windows import WindowSampler

__all__ = [
    "Recipe",
    "Trajectories",
    "WindowSampler",
    "collect",
    "environment_of",
    "interface_of",
    "load_dataset",
    "pack",
    "returns_to_go",
    "score_scale_of",
]
