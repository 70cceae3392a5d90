"""The one loop: optimiser, schedule, checkpoints, resume."""

from eva_rl.settings import TrainingConfig, check_precision
from eva_rl.training.by_domain import by_domain
from eva_rl.training.checkpoint import BASE, check_run
from eva_rl.training.loop import (
    Hooks,
    Rules,
    Saves,
    TrainingResult,
    check_shares,
    learning_rate_at,
    train,
)
from eva_rl.training.optimizers import Recipe
from eva_rl.training.precision import autocast, choose_device, resolved
from eva_rl.training.processes import Processes, processes

__all__ = [
    "BASE",
    "Hooks",
    "Processes",
    "Recipe",
    "Rules",
    "Saves",
    "TrainingConfig",
    "TrainingResult",
    "autocast",
    "by_domain",
    "check_precision",
    "check_run",
    "check_shares",
    "choose_device",
    "learning_rate_at",
    "processes",
    "resolved",
    "train",
]
