"""The cores of this machine, and processes that use one each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager

GUARD = 'put what a script runs below `if __name__ == "__main__":`, because a worker process imports the script first'

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_while_imported() -> None:
    """End a worker process that runs the script it should only import, before the script does its work once more.

    A process that is started anew (`spawn`, `forkserver`) imports the main script. Without the guard the script would work in
    it too: wait for a lock that its parent holds, or start processes of its own.

    Raises:
        SystemExit: in such a process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing looks at itself
        raise SystemExit(f"error: A worker process works instead of waiting for its work: {GUARD}.")


@contextmanager
def one_core_each() -> Iterator[None]:
    """Processes started within compute with one thread, as several on as many cores should: the matrix products of an
    environment, small as they are, would have each process wait for the threads of the others."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
