"""The cores of this machine, and processes that use one each."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

GUARD = 'put what a script runs below `if __name__ == "__main__":`, because a worker process imports the script first'

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def available_cores() -> int:
    """Cores this process may use: those it is bound to, and no more than its container's share of time makes up."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return bound if quota is None else max(1, min(bound, math.floor(quota)))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores' worth of time that Linux control groups, of either version, leave this process.

    None where they set no limit.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # another system
        return None
    quotas = []
    for _, controllers, place in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for folder in (root if not controllers else root / name for name in dict.fromkeys(("", controllers, "cpu"))):
            for group in (folder / place.lstrip("/"), *(folder / place.lstrip("/")).parents):
                if group.is_relative_to(folder) and (found := _quota_of(group)) is not None:
                    quotas.append(found)
    return min(quotas, default=None)


def _quota_of(group: Path) -> float | None:
    """The quota that one group's folder states, in cores."""
    try:
        if (group / "cpu.max").is_file():  # version 2: "max 100000" or "150000 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:  # version 1: -1 is no limit
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def refuse_while_imported() -> None:
    """End a worker process that runs the script it should only import, before the script does its work once more.

    A process that is started anew (`spawn`, `forkserver`) imports the main script. Without the guard the script would work in
    it too: wait for a lock that its parent holds, or start processes of its own.

    Raises:
        SystemExit: in such a process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing looks at itself
        raise SystemExit(f"error: A worker process works instead of waiting for its work: {GUARD}.")


def end_with_parent() -> None:
    """End this worker process when the process that started it is gone, even if it was killed without a word.

    A pool's worker holds both ends of the queue that it waits at, and so would wait there for ever.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def one_core_each() -> Iterator[None]:
    """Have processes started within compute with one thread each, as several on as many cores should.

    Otherwise the matrix products of an environment, small as they are, would have each process wait for the threads of
    the others.
    """
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
