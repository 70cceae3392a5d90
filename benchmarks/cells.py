"""Fine-tuning runs as a grid of cells: each a process of its own, none run twice, what they found kept as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from tqdm import tqdm

from eva_rl.config import FinetuneConfig, identity, parse
from eva_rl.files import write_json

RUNS = Path("runs")


def run_cells(cells: Mapping[str, list[str]], results: Path, workers: int) -> dict[str, dict[str, Any]]:
    """The result of every cell that could be run, by name.

    Args:
        cells: a cell's name, which may hold slashes, and the arguments of `python -m eva_rl.finetune` that make it.
        results: where each cell's result.json is kept, as `<name>.json`, with the settings it was made with; a cell that
            has one of the same settings is not run again.
        workers: processes at a time; they share the cores.
    """
    settings = _settings(cells)
    missing = [name for name in cells if _kept(results / f"{name}.json", settings[name]) is None]
    _collect({(settings[name]["task"], settings[name]["seed"]) for name in missing})
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(missing), unit="run") as bar,
    ):
        waiting = [pool.submit(_run, name, cells[name], settings[name], results, workers) for name in missing]
        for done in waiting:
            done.add_done_callback(lambda _: bar.update())
        try:
            failed = [sentence for sentence in (done.result() for done in waiting) if sentence]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    for sentence in failed:
        print(sentence, file=sys.stderr)
    found = {name: _kept(results / f"{name}.json", settings[name]) for name in cells}
    return {name: result for name, result in found.items() if result is not None}


def _settings(cells: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """All that decides a cell's result, as its files in configs/ stand now."""
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        configs = {
            name: parse(compose("finetune", overrides=arguments), FinetuneConfig) for name, arguments in cells.items()
        }
    decides = {name: identity(config) | {"episodes": config.episodes} for name, config in configs.items()}
    for settings in decides.values():
        if settings["training"]["learning_rate"] is not None:
            del settings["adapter"]["learning_rate"]  # it does not count
    return json.loads(json.dumps(decides))


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that was kept, if it was made with these settings."""
    result = json.loads(path.read_text()) if path.is_file() else {}
    return result if result.get("settings") == settings else None


def _collect(datasets: set[tuple[str, int]]) -> None:
    """Make the datasets first, so that no cell's seconds hold those of collecting."""
    for task, seed in sorted(datasets):
        subprocess.run([sys.executable, "-m", "eva_rl.collect", f"task={task}", f"seed={seed}"], check=True)


def _run(name: str, arguments: list[str], settings: Mapping[str, Any], results: Path, workers: int) -> str | None:
    """Run one cell, or continue it; return a sentence if it failed. Its folder goes once its result is kept."""
    stamp = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    folder = RUNS / results.name / f"{name}-{stamp:08x}"
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    done = subprocess.run(
        [sys.executable, "-m", "eva_rl.finetune", *arguments, "workers=0", f"run_dir={folder}", "resume=true"],
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}"
    result = json.loads((folder / "result.json").read_text())
    write_json(results / f"{name}.json", {**result, "settings": settings})
    shutil.rmtree(folder)
    return None
