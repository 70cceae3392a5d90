"""The one loop: optimiser, schedule, checkpoints, resume."""

from eva_rl.training.checkpoint import check_run
from eva_rl.training.loop import TrainingConfig, TrainingResult, learning_rate_at, train
from eva_rl.training.precision import autocast, check_precision, choose_device

__all__ = [
    "TrainingConfig",
    "TrainingResult",
    "autocast",
    "check_precision",
    "check_run",
    "choose_device",
    "learning_rate_at",
    "train",
]
