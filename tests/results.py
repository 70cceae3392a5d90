"""Results of fine-tuning runs that never ran, for the report."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eva_rl.run import RunResult
from eva_rl.study import Comparison, compared

SCORES = ("success_rate", "success_at_end", "episode_return", "normalized_score")


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": max(mean - 0.1, min(mean, 0.0)), "high": min(mean + 0.1, max(mean, 1.0)), "n": 20}


def result(
    adapter: str = "eva",
    task: str = "dummy/Steps-v0",
    seed: int = 0,
    success: float = 0.5,
    *,
    before: float | None = 0.0,
    curve: Mapping[int, float] | None = None,
    settings: Mapping[str, object] | None = None,
    **changes: object,
) -> dict[str, Any]:
    """A result.json; `settings` are those of the command line, with dots."""
    nested = {"base": "tiny", "task": task, "seed": seed, "steps": 100, "episodes": 20, "target_return": "max"}
    nested |= {"adapter": {"name": adapter, "rank": 8}, "training": {"batch_size": 32, "learning_rate": None}}
    for name, value in (settings or {}).items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return {
        "task": task,
        "adapter": adapter,
        "base": "tiny",
        "demonstrations": 4,
        "dataset": task,
        "target_return": 1.0,
        "steps": nested["steps"],
        "learning_rate": 1e-3,
        "seed": seed,
        "trainable_parameters": {"none": 0, "full": 1000}.get(adapter, 100),
        "total_parameters": 1000,
        "settings": nested,
        **{name: estimate(success) for name in SCORES},
        "zero_shot": {name: None if before is None else estimate(before) for name in SCORES},
        "curve": {str(step): {name: estimate(mean) for name in SCORES} for step, mean in (curve or {}).items()},
        "seconds": {"init": 1.2, "train": 30.4},
        "status": "complete",
        "versions": {"torch": "2"},
        **changes,
    }


def typed(contents: Iterable[Mapping[str, Any]]) -> list[RunResult]:
    """Results as they are read; `run` among their contents is their place."""
    return [RunResult.from_json(dict(own), str(own.get("run", ""))) for own in contents]


def comparison(contents: Iterable[Mapping[str, Any]]) -> Comparison:
    return compared(typed(contents))


def write_run(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder
