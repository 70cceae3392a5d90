"""Two processes that work together, as under `torchrun`."""

import time
from collections.abc import Callable
from pathlib import Path

import torch


def in_two_processes(work: Callable[[int, Path], None], folder: Path, seconds: float) -> Path:
    """Run `work(process, folder)` in two processes, no longer than so many seconds; return the folder."""
    context = torch.multiprocessing.spawn(work, (folder,), nprocs=2, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return folder
