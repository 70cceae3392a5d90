"""Trackers beside TensorBoard, through accelerate's classes: the same scalars, pictures and settings in each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eva_rl.errors import UserError, did_you_mean, in_one_line
from eva_rl.files import make_folder
from eva_rl.run.result import RunResult, flat
from eva_rl.run.tensorboard import TensorBoard, outcome

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from matplotlib.figure import Figure

TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD, "wandb", "mlflow", "trackio")
PROJECT = "eva_rl"
"""The project, or experiment, that runs are filed under."""


def check_tracker(name: str) -> None:
    """Raise a `UserError` unless there is a tracker of this name, and its package is installed."""
    if name not in TRACKERS:
        raise UserError(f"tracker={name} must be one of {', '.join(TRACKERS)}. {did_you_mean(name, TRACKERS)}".rstrip())
    if name != TENSORBOARD and find_spec(name) is None:
        raise UserError(f"tracker={name} needs the package {name}: run `pip install {name}`.")


def open_tracker(name: str, run_dir: Path, settings: Mapping[str, Any]) -> TensorBoard:
    """What a run is logged to: TensorBoard's files in its folder, and the tracker of this name.

    Args:
        settings: of the run, for the tracker's own table of runs.
    """
    return TensorBoard(run_dir) if name == TENSORBOARD else Tracked(name, run_dir, settings)


class Tracked(TensorBoard):
    """TensorBoard, and a tracker that is told the same."""

    def __init__(self, name: str, run_dir: Path, settings: Mapping[str, Any]):
        # accelerate's base class declares little of what its trackers have.
        self.tracker: Any = _started(name, run_dir, {key: _plain(value) for key, value in flat(settings).items()})
        super().__init__(run_dir)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        super().log(step, scalars)
        if scalars:
            self.tracker.log({name: float(value) for name, value in scalars.items()}, step=step)

    def figures(self, step: int, figures: Mapping[str, Figure]) -> None:
        for name, figure in figures.items():
            if self.tracker.name == "mlflow":
                self.tracker.log_figure(figure, f"{name}-{step}.png")
            elif self.tracker.name == "trackio":
                import trackio  # pyright: ignore[reportMissingImports] (no dependency)

                self.tracker.log({name: trackio.Image(_pixels(figure))}, step=step)
            else:
                self.tracker.log_images({name: [_pixels(figure)]}, step=step)
        super().figures(step, figures)  # which closes them

    def hparams(self, result: RunResult) -> None:
        super().hparams(result)
        self.tracker.log(outcome(result), step=result.steps)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error[0] is not None and self.tracker.name == "mlflow":  # accelerate has no word for a run that failed
            import mlflow  # pyright: ignore[reportMissingImports] (no dependency)

            mlflow.end_run("FAILED")
        elif error[0] is not None and self.tracker.name == "wandb":
            self.tracker.tracker.finish(exit_code=1)
        else:
            self.tracker.finish()


def _started(name: str, run_dir: Path, settings: Mapping[str, Any]) -> GeneralTracker:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    make_folder(run_dir)
    PartialState()  # accelerate asks it which process this is
    run_name = "/".join(run_dir.resolve().parts[-2:])
    given = {
        "wandb": {"run_name": PROJECT, "name": run_name, "dir": str(run_dir)},
        "mlflow": {"experiment_name": PROJECT, "run_name": run_name},
        "trackio": {"run_name": PROJECT, "name": run_name},
    }[name]
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**given)
        tracker.start()
        tracker.store_init_configuration(settings)
    except Exception as error:
        raise UserError(
            f"tracker={name} can't start ({in_one_line(error)[:300]}): set it up as its own documentation says, or leave it out."
        ) from error
    return tracker


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
