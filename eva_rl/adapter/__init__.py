"""Frozen model and batches -> peft model with an initialised adapter. Knows no model and no dataset of this project."""

from eva_rl.adapter.attach import attach, load_adapter, save_adapter, trainable_parameters
from eva_rl.adapter.eva import EvaSettings

__all__ = ["EvaSettings", "attach", "load_adapter", "save_adapter", "trainable_parameters"]
