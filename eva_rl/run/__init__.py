"""One run's folder: its result and scores, TensorBoard, films, seconds, versions. They are written and read here alone."""

from eva_rl.run.eva import EVA_CLAIM, eva_figures
from eva_rl.run.intervals import Estimate, mean, proportion
from eva_rl.run.result import RunResult, read_earlier, run_result, summary
from eva_rl.run.rows import check_run_folder
from eva_rl.run.scores import SCORES, Scores, failures_counted, scores, to_json, to_scalars
from eva_rl.run.stopwatch import Stopwatch
from eva_rl.run.sweep import save_sweep
from eva_rl.run.tensorboard import TensorBoard
from eva_rl.run.trackers import check_tracker, open_tracker
from eva_rl.run.versions import versions
from eva_rl.run.video import save_film

__all__ = [
    "EVA_CLAIM",
    "SCORES",
    "Estimate",
    "RunResult",
    "Scores",
    "Stopwatch",
    "TensorBoard",
    "check_run_folder",
    "check_tracker",
    "eva_figures",
    "failures_counted",
    "mean",
    "open_tracker",
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
