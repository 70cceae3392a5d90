"""All runs of a report, a row each: as a Markdown table and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from eva_rl.run import SCORES
from eva_rl.study.labels import FACTS, Labelled, differing, in_words
from eva_rl.table import markdown

COMPUTED = ("trainable_parameters", "total_parameters", "base_sha256", "device", "precision")


def table(runs: Sequence[Labelled]) -> str:
    """Success rates before and after fine-tuning with their 95 % intervals, a row a run."""
    further = [name for name in differing([own.protocol for own in runs]) if name not in FACTS]
    rows = []
    for own in runs:
        run, normalized = own.run, own.run.scores["normalized_score"]
        facts = [getattr(run, fact) for fact in ("base", "demonstrations", "steps", "learning_rate")]
        method = (own.method, *facts, *(own.protocol.get(setting) for setting in further))
        found = [run.zero_shot["success_rate"], run.scores["success_rate"]]
        costs = (f"{run.seconds[phase]:.0f}" for phase in ("init", "train"))
        place = own.method, *facts, in_words(own.protocol), run.task, run.seed
        row = (run.task, *method, run.seed, *found, None if normalized is None else f"{normalized.mean:.2f}", *costs)
        rows.append((place, row))
    header = ["task", "method", "base", "demonstrations", "steps", "rate", *further, "seed"]
    header += ["zero-shot success", "success", "normalized", "init s", "train s"]
    return markdown(header, [row for _, row in sorted(rows, key=lambda row: row[0])])


def to_csv(runs: Sequence[Labelled]) -> str:
    """A line a run: what was run, its scores with their intervals, before and after, its sizes and times, its settings."""
    phases = list(dict.fromkeys(phase for own in runs for phase in own.run.seconds))
    software = sorted(set().union(*(own.run.versions for own in runs)))
    names = [name for name in sorted(set().union(*(own.settings for own in runs))) if name not in FACTS]
    ends = ("mean", "low", "high", "n")
    header = ["run", "method", *FACTS, *(f"{score}_{end}" for score in SCORES for end in ends)]
    header += [f"zero_shot_{score}_{end}" for score in SCORES for end in ends]
    header += [*COMPUTED, *(f"seconds_{phase}" for phase in phases), *(f"version_{name}" for name in software), *names]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for own in runs:
        run = own.run
        facts = [getattr(run, name) for name in FACTS]
        groups = (run.scores, run.zero_shot)
        found = [getattr(group[score], end, None) for group in groups for score in SCORES for end in ends]
        computed = [*(getattr(run, name) for name in COMPUTED), *(run.seconds.get(phase) for phase in phases)]
        computed += [run.versions.get(name) for name in software]
        writer.writerow([run.run, own.method, *facts, *found, *computed, *(own.settings.get(name) for name in names)])
    return stream.getvalue()
