"""Finished runs -> one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eva_rl.errors import UserError
from eva_rl.report.statistics import Estimate
from eva_rl.report.table import markdown


def read_results(folders: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The result of every complete fine-tuning run below these folders, and a sentence for each one left out.

    Raises:
        UserError: if a folder does not exist.
    """
    results, left_out = [], []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"The folder '{folder}' does not exist.")
        for config in sorted(folder.rglob("config.yaml")):
            path = config.with_name("result.json")
            try:
                result = json.loads(path.read_text())
                complete = result["status"] == "complete" and "zero_shot" in result and len(_alike(result)) > 0
            except (OSError, ValueError, KeyError, TypeError):
                complete = False
            if complete:
                results.append(result)
            else:
                left_out.append(f"{config.parent}: not a complete fine-tuning run, left out")
    return results, left_out


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Success rates before and after fine-tuning with their 95 % intervals: a row a run, and means of runs made alike."""
    rows, groups = [], {}
    for r in sorted(results, key=lambda r: (*_alike(r), r["task"], r["seed"])):
        after, before = _estimate(r["success_rate"]), _estimate(r["zero_shot"]["success_rate"])
        score = None if r["normalized_score"] is None else f"{r['normalized_score']['mean']:.2f}"
        init, train = (f"{r['seconds'][phase]:.0f}" for phase in ("init", "train"))
        rows.append((r["task"], *_alike(r), r["seed"], before, after, score, init, train))
        if r["success_rate"] is not None:
            groups.setdefault(_alike(r), []).append(r)
    for alike, members in groups.items():
        before = sum(m["zero_shot"]["success_rate"]["mean"] for m in members) / len(members)
        after = sum(m["success_rate"]["mean"] for m in members) / len(members)
        rows.append((f"mean of {len(members)} runs", *alike, "", f"{before:.3f}", f"{after:.3f}", "", "", ""))
    header = ["task", "adapter", "base", "episodes", "steps", "rate", "seed"]
    return markdown([*header, "zero-shot success", "success", "normalized", "init s", "train s"], rows)


def _alike(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs must have in common for their mean to mean something; the columns from adapter to rate."""
    return tuple(result[name] for name in ("adapter", "base", "demonstrations", "steps", "learning_rate"))


def _estimate(fields: Mapping[str, Any] | None) -> Estimate | None:
    return None if fields is None else Estimate(**fields)
