"""Frozen model and batches -> peft model with an initialised adapter. Knows no model and no dataset of this project."""

from eva_rl.adapter import starts
from eva_rl.adapter.allocators import Allocator
from eva_rl.adapter.attach import Adapter, attach, load_adapter, save_adapter, trainable_parameters
from eva_rl.adapter.budget import within_budget
from eva_rl.adapter.eva import EvaSettings
from eva_rl.adapter.starts import TaskData

__all__ = [
    "Adapter",
    "Allocator",
    "EvaSettings",
    "TaskData",
    "attach",
    "load_adapter",
    "save_adapter",
    "starts",
    "trainable_parameters",
    "within_budget",
]
