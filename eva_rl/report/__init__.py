"""Runs -> tables, confidence intervals, TensorBoard."""

from eva_rl.report.eva import EVA_CLAIM, eva_figures
from eva_rl.report.result import read_earlier, run_result, summary
from eva_rl.report.scores import SCORES, Scores, failures_counted, scores, to_json, to_scalars
from eva_rl.report.statistics import Estimate, mean, proportion
from eva_rl.report.stopwatch import Stopwatch
from eva_rl.report.sweep import save_sweep
from eva_rl.report.table import markdown
from eva_rl.report.tensorboard import TensorBoard
from eva_rl.report.versions import versions
from eva_rl.report.video import save_film

__all__ = [
    "EVA_CLAIM",
    "SCORES",
    "Estimate",
    "Scores",
    "Stopwatch",
    "TensorBoard",
    "eva_figures",
    "failures_counted",
    "markdown",
    "mean",
    "proportion",
    "read_earlier",
    "run_result",
    "save_film",
    "save_sweep",
    "scores",
    "summary",
    "to_json",
    "to_scalars",
    "versions",
]
