"""What a fine-tuning run writes to result.json, and what it says at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eva_rl.errors import UserError
from eva_rl.files import from_json as typed
from eva_rl.files import read_json
from eva_rl.report.scores import Scores, failures_counted, from_json, to_json
from eva_rl.report.stopwatch import Stopwatch, peak_memory
from eva_rl.report.table import markdown
from eva_rl.report.versions import versions


def run_result(
    facts: Mapping[str, Any],
    clock: Stopwatch,
    zero_shot: Scores,
    tuned: Scores | None,
    losses: Sequence[float] = (),
    curve: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of result.json; `tuned` is None while the run is under way.

    `losses`: the mean training loss of each tenth of the steps. `curve`: the scores while training, by optimiser steps.
    """
    steps = list(curve or {})
    played = [zero_shot, *([tuned] if tuned else []), *(from_json(curve[step]) for step in steps)]
    before, *after = map(to_json, failures_counted(played))
    return {
        **facts,
        "loss": [round(loss, 6) for loss in losses],
        "curve": dict(zip(steps, after[len(after) - len(steps) :], strict=True)),
        "peak_memory_mib": peak_memory(),
        **(after[0] if tuned else {}),
        "zero_shot": before,
        "seconds": clock.rounded(),
        "status": "complete" if tuned else "partial",
        "versions": versions(),
    }


def read_earlier(run_dir: Path, settings: Mapping[str, Any], base_sha256: str) -> dict[str, Any]:
    """The result.json of a run that is to be resumed, as far as it got; empty if it has not written any.

    Raises:
        UserError: if it is that of a run with other settings, or on other weights of the base.
    """
    path = run_dir / "result.json"
    earlier = read_json(path) if path.is_file() else {}
    try:
        before = flat(typed(dict[str, Any], earlier.get("settings", {}), "settings."))
        typed(dict[str, dict[str, Any]], earlier.get("curve", {}), "curve.")
    except (TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not as a run writes it ({error}): remove it, or set another run_dir.") from error
    now = flat(settings)
    changed = [
        f"{key}={before.get(key)} (now {now.get(key)})" for key in before | now if before.get(key) != now.get(key)
    ]
    if earlier and changed:
        raise UserError(f"'{path}' is the result of a run with {', '.join(changed[:4])}: set another run_dir.")
    if earlier.get("base_sha256", base_sha256) != base_sha256:
        raise UserError(
            f"'{path}' is the result of a run on other weights of base={settings['base']}: remove the folder, or set another "
            "run_dir."
        )
    return earlier


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names on the command line, such as `adapter.eva.rho`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return found


def summary(facts: Mapping[str, Any], clock: Stopwatch, zero_shot: Scores, tuned: Scores) -> str:
    """The scores before and after as a table, and what they cost."""
    zero_shot, tuned = failures_counted([zero_shot, tuned])
    rows = [(name.replace("_", " "), zero_shot[name], tuned[name]) for name in tuned]
    trainable, total = facts["trainable_parameters"], facts["total_parameters"]
    start = f"on {facts['base']}" if facts["settings"]["adapter"]["network"] == "base" else "from scratch"
    return "\n".join(
        [
            f"{facts['task']}: {facts['adapter']} {start}, {facts['demonstrations']} episodes, {facts['steps']} steps",
            "",
            markdown(["mean [95 % interval]", "zero-shot", "fine-tuned"], rows),
            "",
            f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.1f} %)",
            f"seconds: {clock}",
        ]
    )
