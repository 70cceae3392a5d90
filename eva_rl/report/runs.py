"""Folders -> the finished runs in them, as a table and as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from eva_rl.errors import UserError
from eva_rl.report.labels import differing, in_words, labels, protocol_of
from eva_rl.report.result import flat
from eva_rl.report.scores import SCORES, failures_counted, from_json, to_json
from eva_rl.report.statistics import Estimate
from eva_rl.report.table import markdown

FACTS = ("task", "adapter", "base", "demonstrations", "steps", "learning_rate", "seed")
NUMBERS = ("demonstrations", "target_return", "steps", "learning_rate", "trainable_parameters", "total_parameters")

COMPUTED = ("trainable_parameters", "total_parameters", "base_sha256", "device", "precision")


def read_results(folders: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The result of every complete fine-tuning run below these folders, and a sentence for each one left out.

    Where a run did not roll out the base, its zero-shot scores are those of the run of the same base, task, seed and
    episodes that trained nothing, if there is one. Of two runs made alike, down to the seed, the second is left out.

    Raises:
        UserError: if a folder does not exist.
    """
    results, places, left_out = {}, {}, []
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is not a folder: name one that holds runs.")
        if not (found := sorted(_runs_below(folder))) and len(folders) > 1:
            left_out.append(f"{folder}: there are no runs below it")
        for run in found:
            try:
                result = json.loads((run / "result.json").read_text(encoding="utf-8"))
                complete = result["status"] == "complete" and "zero_shot" in result
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                complete = False
            if not complete:
                left_out.append(f"{run}: not a complete fine-tuning run, left out")
                continue
            if wrong := _malformed(result):
                left_out.append(f"{run}: left out, as {wrong} in its result.json is not as expected")
                continue
            result.setdefault("versions", {})
            result["run"] = (run if len(folders) > 1 else run.relative_to(folder)).as_posix()
            key = in_words(result["settings"])
            if places.setdefault(key, run) == run:
                results[key] = result
            else:
                other = "" if _one_base(result, results[key]) else ", but for the weights of its base"
                left_out.append(f"{run}: the same run as {places[key]}{other}, left out")
    found = sorted(results.values(), key=lambda r: (*(str(r[name]) for name in FACTS), str(r["settings"])))
    _count_failures(found)
    untrained = {_place(r): r for r in found if not r["trainable_parameters"]}
    for result in found:
        other = untrained.get(_place(result))
        if other and result["zero_shot"]["episode_return"] is None and _one_base(result, other):
            result["zero_shot"] = other["zero_shot"]
    return found, left_out


def _count_failures(results: Sequence[dict[str, Any]]) -> None:
    """Give runs the rate 0 which others of their task show that the task has, see `failures_counted`."""
    for task in {result["task"] for result in results}:
        own = [result for result in results if result["task"] == task]
        groups = [group for r in own for group in (r, r["zero_shot"], *r["curve"].values())]
        for group, counted in zip(groups, failures_counted(list(map(from_json, groups))), strict=True):
            group.update(to_json(counted))


def _one_base(result: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs on a base of one name had, as far as they say, the same weights."""
    own = result.get("base_sha256")
    return own is None or other.get("base_sha256", own) == own


def _runs_below(folder: Path) -> Iterator[Path]:
    """The folders in which a run has begun; it may be under way, so that files come and go.

    Raises:
        OSError: if a folder can't be read.
    """

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for place, inner, files in os.walk(folder, onerror=unless_gone):
        inner[:] = [name for name in inner if not name.startswith(".")]  # those are half written
        if not {"config.yaml", "result.json", ".lock"}.isdisjoint(files):
            yield Path(place)


def _malformed(result: Mapping[str, Any]) -> str:
    """What in a complete run's result.json is not as a run writes it; empty if all is."""
    if not isinstance(settings := result.get("settings"), dict) or not isinstance(settings.get("training"), dict):
        return "settings"
    if not all(isinstance(result.get(name), str) for name in ("task", "adapter", "base", "dataset")):
        return "task, adapter, base or dataset"
    if not all(isinstance(result.get(name, ""), str) for name in ("base_sha256", "device", "precision")):
        return "base_sha256, device or precision"
    versions = result.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        return "versions"
    if type(result.get("seed")) is not int:
        return "seed"
    for name in NUMBERS:
        if not _is_number(result.get(name)):
            return name
    for name in ("task", "seed", "steps"):
        if settings.get(name) != result[name]:
            return f"settings.{name}"
    seconds = result.get("seconds")
    if (
        not isinstance(seconds, dict)
        or not {"init", "train"} <= seconds.keys()
        or not all(map(_is_number, seconds.values()))
    ):
        return "seconds"
    if not isinstance(curve := result.get("curve"), dict) or not all(step.isdecimal() for step in curve):
        return "curve"
    groups = {
        "": result,
        "zero_shot.": result["zero_shot"],
        **{f"curve.{step}.": found for step, found in curve.items()},
    }
    for place, group in groups.items():
        for name in SCORES:
            if not isinstance(group, dict) or not _is_score(group.get(name, ()), name.startswith("success")):
                return place + name
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_score(value: Any, is_rate: bool) -> bool:
    """Whether this is an `Estimate`, of a share from 0 to 1 if it is a rate; or null for a score that the task does not have."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {f.name for f in fields(Estimate)}:
        return False
    ends = [value["low"], value["high"]]
    numbers = [value["mean"], *(ends if ends != [None, None] else ())]
    if not all(map(_is_number, numbers)) or type(value["n"]) is not int or value["n"] < 1:
        return False
    return not is_rate or all(-1e-9 <= number <= 1 + 1e-9 for number in numbers)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Success rates before and after fine-tuning with their 95 % intervals, a row a run."""
    names, protocols = labels(results), [protocol_of(r) for r in results]
    further = [name for name in differing(protocols) if name not in FACTS]
    rows = []
    for r, name, protocol in zip(results, names, protocols, strict=True):
        after, before = estimate(r["success_rate"]), estimate(r["zero_shot"]["success_rate"])
        score = None if r["normalized_score"] is None else f"{r['normalized_score']['mean']:.2f}"
        init, train = (f"{r['seconds'][phase]:.0f}" for phase in ("init", "train"))
        facts = [r[fact] for fact in ("base", "demonstrations", "steps", "learning_rate")]
        own = (name, *facts, *(protocol.get(setting) for setting in further))
        place = name, *facts, in_words(protocol), r["task"], r["seed"]
        rows.append((place, (r["task"], *own, r["seed"], before, after, score, init, train)))
    header = ["task", "method", "base", "demonstrations", "steps", "rate", *further, "seed"]
    header += ["zero-shot success", "success", "normalized", "init s", "train s"]
    return markdown(header, [row for _, row in sorted(rows, key=lambda row: row[0])])


def to_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """A line a run: what was run, its scores with their intervals, before and after, its sizes and times, its settings."""
    phases = list(dict.fromkeys(phase for r in results for phase in r["seconds"]))
    software = sorted(set().union(*(r["versions"] for r in results)))
    settings = [flat(r["settings"]) for r in results]
    names = [name for name in sorted(set().union(*settings)) if name not in FACTS]
    ends = ("mean", "low", "high", "n")
    header = ["run", "method", *FACTS, *(f"{score}_{end}" for score in SCORES for end in ends)]
    header += [f"zero_shot_{score}_{end}" for score in SCORES for end in ends]
    header += [*COMPUTED, *(f"seconds_{phase}" for phase in phases), *(f"version_{name}" for name in software), *names]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for r, method, own in zip(results, labels(results), settings, strict=True):
        found = [(group[score] or {}).get(end) for group in (r, r["zero_shot"]) for score in SCORES for end in ends]
        computed = [*(r.get(name) for name in COMPUTED), *(r["seconds"].get(phase) for phase in phases)]
        computed += [r["versions"].get(name) for name in software]
        writer.writerow(
            [r["run"], method, *(r[name] for name in FACTS), *found, *computed, *(own.get(name) for name in names)]
        )
    return stream.getvalue()


def _place(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides the scores of the base as it is."""
    settings = result["settings"]
    decides = ("base", "task", "seed", "dataset", "demonstrations", "target_return")
    asked = (settings.get(name) for name in ("episodes", "max_episode_steps", "trust_environment"))
    return (*(result[name] for name in decides), *asked, settings["training"].get("precision"))


def estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    """A score as result.json states it."""
    return None if found is None else Estimate(**found)
