"""Minari dataset -> packed tensors -> windows."""

from eva_rl.data.collection import Recipe, collect
from eva_rl.data.environments import names_environment
from eva_rl.data.load import load_dataset
from eva_rl.data.mirror import MirroredSampler
from eva_rl.data.mixture import MixtureSampler, domain_weights
from eva_rl.data.tasks import TaskSource, datasets, find_source, find_sources, has_mirror_image
from eva_rl.data.trajectories import Trajectories, interface_of, pack, returns_to_go
from eva_rl.data.windows import WindowSampler
from eva_rl.data.write import check_new_id, write_dataset

__all__ = [
    "MirroredSampler",
    "MixtureSampler",
    "Recipe",
    "TaskSource",
    "Trajectories",
    "WindowSampler",
    "check_new_id",
    "collect",
    "datasets",
    "domain_weights",
    "find_source",
    "find_sources",
    "has_mirror_image",
    "interface_of",
    "load_dataset",
    "names_environment",
    "pack",
    "returns_to_go",
    "write_dataset",
]
