"""Seconds and memory, on the CPU and on CUDA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch


@torch.no_grad()
def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that a call takes, and what it gives."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


class Memory:
    """The most memory (MiB) in use beyond what there was when this was made: the process's, or CUDA's."""

    def __init__(self, device: str):
        self.cuda, self.peak, self.stop = device == "cuda", 0.0, threading.Event()
        self.before = self._used()

    def _used(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, (self._used() - self.before) / 2**20)

    def __enter__(self) -> Memory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.cuda:
            self.peak = (torch.cuda.max_memory_allocated() - self.before) / 2**20
