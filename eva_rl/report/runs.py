"""Folders -> the finished runs in them, as a table and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eva_rl.errors import UserError
from eva_rl.report.result import flat
from eva_rl.report.scores import SCORES
from eva_rl.report.statistics import Estimate
from eva_rl.report.table import markdown

FACTS = ("task", "adapter", "base", "demonstrations", "steps", "learning_rate", "seed")
NEEDED = (*FACTS, *SCORES, "zero_shot", "settings", "seconds", "trainable_parameters", "total_parameters")


def read_results(folders: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The result of every complete fine-tuning run below these folders, and a sentence for each one left out.

    Where a run did not roll out the base, its zero-shot scores are those of the run of the same base, task, seed and
    episodes that trained nothing, if there is one. Of two runs made alike, down to the seed, the second is left out.

    Raises:
        UserError: if a folder does not exist.
    """
    results, places, left_out = {}, {}, []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"The folder '{folder}' does not exist.")
        found = {path.parent for name in ("config.yaml", "result.json") for path in folder.rglob(name)}
        for run in sorted(run for run in found if not run.name.startswith(".")):  # those are files half written
            try:
                result = json.loads((run / "result.json").read_text())
                complete = result["status"] == "complete" and all(name in result for name in NEEDED)
            except (OSError, ValueError, KeyError, TypeError):
                complete = False
            if not complete:
                left_out.append(f"{run}: not a complete fine-tuning run, left out")
                continue
            key = json.dumps(result["settings"], sort_keys=True)
            if places.setdefault(key, run) == run:
                results[key] = result
            else:
                left_out.append(f"{run}: the same run as {places[key]}, left out")
    found = sorted(results.values(), key=lambda r: (*(str(r[name]) for name in FACTS), str(r["settings"])))
    untrained = {_place(r): r["zero_shot"] for r in found if not r["trainable_parameters"]}
    for result in found:
        if result["zero_shot"]["episode_return"] is None:
            result["zero_shot"] = untrained.get(_place(result), result["zero_shot"])
    return found, left_out


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
        before = [m["zero_shot"]["success_rate"] for m in members]
        before = None if None in before else f"{sum(b['mean'] for b in before) / len(members):.3f}"
        after = sum(m["success_rate"]["mean"] for m in members) / len(members)
        rows.append((f"mean of {len(members)} runs", *alike, "", before, f"{after:.3f}", "", "", ""))
    header = ["task", "adapter", "base", "episodes", "steps", "rate", "seed"]
    return markdown([*header, "zero-shot success", "success", "normalized", "init s", "train s"], rows)


def to_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """A line a run: what was run, its scores with their intervals, before and after, its sizes and times, its settings."""
    phases = list(dict.fromkeys(phase for r in results for phase in r["seconds"]))
    settings = [flat(r["settings"]) for r in results]
    names = [name for name in sorted(set().union(*settings)) if name not in FACTS]
    ends = ("mean", "low", "high", "n")
    header = [*FACTS, *(f"{score}_{end}" for score in SCORES for end in ends)]
    header += [f"zero_shot_{score}_{end}" for score in SCORES for end in ends]
    header += ["trainable_parameters", "total_parameters", *(f"seconds_{phase}" for phase in phases), *names]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for r, own in zip(results, settings, strict=True):
        found = [(group[score] or {}).get(end) for group in (r, r["zero_shot"]) for score in SCORES for end in ends]
        sizes = [r["trainable_parameters"], r["total_parameters"], *(r["seconds"].get(phase) for phase in phases)]
        writer.writerow([*(r[name] for name in FACTS), *found, *sizes, *(own.get(name) for name in names)])
    return stream.getvalue()


def _place(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides the scores of the base as it is."""
    settings = result["settings"]
    decides = ("base", "task", "seed", "dataset", "demonstrations", "target_return")
    return (*(result[name] for name in decides), settings["episodes"], settings["training"].get("precision"))


def _alike(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs must have in common for their mean to mean something; the columns from adapter to rate."""
    return tuple(result[name] for name in ("adapter", "base", "demonstrations", "steps", "learning_rate"))


def _estimate(fields: Mapping[str, Any] | None) -> Estimate | None:
    return None if fields is None else Estimate(**fields)
