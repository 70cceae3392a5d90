"""Runs -> tables, confidence intervals, TensorBoard."""

from eva_rl.report.tensorboard import TensorBoard

__all__ = ["TensorBoard"]
