"""What a run costs: seconds by phase, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the wall time spent in named phases.

    Time in a phase within another does not count for the outer one.
    """

    def __init__(self, *phases: str):
        self._open: list[str] = []
        self._since = 0.0
        self.seconds = dict.fromkeys(phases, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._settle()
        self.seconds[phase] += 0.0  # one that was not named at first fails here
        self._open.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def rounded(self) -> dict[str, float]:
        """Seconds by phase as result.json states them, up to now."""
        self._settle()
        return {phase: round(seconds, 2) for phase, seconds in self.seconds.items()}

    def _settle(self) -> None:
        """Count the time since the last call for the innermost open phase."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def __str__(self) -> str:
        return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.rounded().items())


def peak_memory() -> int | None:
    """The most memory (MiB) this process has used, on CUDA once it uses any there, else in RAM (None on Windows)."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
