"""Hydra's YAML -> typed, frozen dataclasses, and mistakes on the command line -> one sentence.

This package alone knows Hydra. It is imported before anything heavy, so that `--help` answers at once.
"""

from eva_rl.config.command import entry_point
from eva_rl.config.compose import choices
from eva_rl.config.folder import run_folder
from eva_rl.config.grids import checked
from eva_rl.config.identity import Plan, identity, plan, protocol, to_yaml
from eva_rl.config.parse import parse, setting_names
from eva_rl.config.targets import instantiate
from eva_rl.settings import (
    ADAMW,
    NO_ALLOCATOR,
    AdapterSettings,
    AllocatorSettings,
    CollectConfig,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    MergeConfig,
    OptimizerSettings,
    PretrainConfig,
    PublishConfig,
    TaskListConfig,
)

__all__ = [
    "ADAMW",
    "NO_ALLOCATOR",
    "AdapterSettings",
    "AllocatorSettings",
    "CollectConfig",
    "ConvertConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "MergeConfig",
    "OptimizerSettings",
    "Plan",
    "PretrainConfig",
    "PublishConfig",
    "TaskListConfig",
    "checked",
    "choices",
    "entry_point",
    "identity",
    "instantiate",
    "parse",
    "plan",
    "protocol",
    "run_folder",
    "setting_names",
    "to_yaml",
]
