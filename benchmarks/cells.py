"""Fine-tuning runs as a grid of cells: each a process of its own, none run twice, what they found kept as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eva_rl.files import write_json

RUNS = Path("runs")


def run_cells(cells: Mapping[str, list[str]], results: Path, workers: int) -> dict[str, dict[str, Any]]:
    """The result of every cell that could be run, by name.

    Args:
        cells: a cell's name, which may hold slashes, and the arguments of `python -m eva_rl.finetune` that make it.
        results: where each cell's result.json is kept, as `<name>.json`; cells that have one are not run again.
        workers: processes at a time; they share the cores.
    """
    missing = {name: arguments for name, arguments in cells.items() if not (results / f"{name}.json").is_file()}
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(missing), unit="run") as bar,
    ):
        waiting = [pool.submit(_run, name, arguments, results, workers) for name, arguments in missing.items()]
        for done in waiting:
            done.add_done_callback(lambda _: bar.update())
        try:
            failed = [sentence for sentence in (done.result() for done in waiting) if sentence]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    for sentence in failed:
        print(sentence, file=sys.stderr)
    paths = {name: results / f"{name}.json" for name in cells}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def _run(name: str, arguments: list[str], results: Path, workers: int) -> str | None:
    """Run one cell, or continue it; return a sentence if it failed. Its folder goes once its result is kept."""
    folder = RUNS / results.name / name
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    done = subprocess.run(
        [sys.executable, "-m", "eva_rl.finetune", *arguments, f"run_dir={folder}", "resume=true"],
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}"
    write_json(results / f"{name}.json", json.loads((folder / "result.json").read_text()))
    shutil.rmtree(folder)
    return None
