"""Where a run writes its folder."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def run_folder(run_dir: str | None, what: str = "run", how: str | None = None) -> Path:
    """Where a run writes: `run_dir`, or `runs/<what>/<how>-<date>`, as TensorBoard then names it.

    In a multirun without `run_dir`, each job has a folder of its own in the multirun's.
    """
    if run_dir is not None:
        folder = Path(run_dir)
    elif HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        folder = Path(HydraConfig.get().sweep.dir) / str(HydraConfig.get().job.num)
    else:
        name = "-".join([*([] if how is None else [how]), datetime.now().strftime("%Y-%m-%d-%H-%M-%S")])
        folder = Path("runs", what.replace("/", "-"), name.replace("/", "-"))
    here = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else os.getcwd()
    return folder if here == os.getcwd() else Path(here, folder)  # Ray's processes start elsewhere
