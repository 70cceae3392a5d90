"""What a fine-tuning run writes to result.json, typed, and what it says at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from eva_rl.errors import UserError
from eva_rl.files import from_json as typed
from eva_rl.files import read_json, write_json
from eva_rl.run.intervals import Estimate
from eva_rl.run.rows import find_row
from eva_rl.run.scores import RATES, SCORES, Scores, failures_counted, to_json
from eva_rl.run.stopwatch import Stopwatch, peak_memory
from eva_rl.run.versions import versions
from eva_rl.table import counted, markdown

Settings = dict[str, Any]
"""Nested, as the files of `configs/` hold and explain them."""
RESULT = "result.json"
COUNTS = ("demonstrations", "steps", "trainable_parameters", "total_parameters")


@dataclass(frozen=True)
class RunResult:
    """What a run was made with and what came of it, as its result.json says."""

    task: str
    adapter: str
    """The method's name."""
    base: str
    seed: int
    steps: int
    """Optimiser steps."""
    learning_rate: float
    dataset: str
    demonstrations: int
    """Episodes that there were to learn from."""
    target_return: float
    """The return that its rollouts asked for."""
    trainable_parameters: int
    total_parameters: int
    settings: Settings
    zero_shot: Scores
    """Before training. All are None where the base was not rolled out."""
    seconds: dict[str, float]
    """By phase, `init` and `train` among them."""
    status: Literal["complete", "partial"]
    scores: Scores = field(default_factory=lambda: dict.fromkeys(SCORES))
    """After training. All are None while it goes on."""
    curve: dict[str, Scores] = field(default_factory=dict)
    """The scores while training, by optimiser steps."""
    loss: tuple[float, ...] = ()
    """The mean training loss of each tenth of the steps."""
    learned_from: int | None = None
    """How many of the demonstrations it was trained on. None in older results, which don't say."""
    peak_memory_mib: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    base_sha256: str | None = None
    """None where a run is older than this, or sees nothing of the base."""
    device: str | None = None
    precision: str | None = None
    run: str = ""
    """Its folder, below the one it was looked for in. This is not part of result.json."""

    @classmethod
    def from_json(cls, content: Any, run: str = "") -> RunResult:
        """A result as result.json has it.

        Anything else that other versions write is left aside.

        Raises:
            TypeError: if it is not as a run writes it. The message names the place.
        """
        if not isinstance(content, dict):
            raise TypeError("it is no section")
        own = {f.name: content[f.name] for f in fields(cls) if f.name in content} | {"run": run}
        own["scores"] = _of_scores(content) if content.get("status") == "complete" else {}
        own["zero_shot"] = _of_scores(content.get("zero_shot"))
        if isinstance(curve := content.get("curve", {}), dict):
            own["curve"] = {step: _of_scores(found) for step, found in curve.items()}
        result = typed(cls, own)
        result._check()
        return result

    def _check(self) -> None:
        """Fill in what older results lack.

        Raises:
            TypeError: for values that have their types and yet make no sense.
        """
        if not isinstance(self.settings.get("training"), dict):
            raise TypeError("settings.training is no section")
        for name in ("task", "seed", "steps"):
            if self.settings.get(name) != getattr(self, name):
                raise TypeError(f"settings.{name} is not the run's {name}")
        if wrong := [name for name in COUNTS if not 0 <= getattr(self, name) < 2**63]:
            raise TypeError(f"{wrong[0]} is no number of things")
        if absent := [name for name in ("init", "train") if name not in self.seconds]:
            raise TypeError(f"seconds.{absent[0]} is missing")
        if wrong := [step for step in self.curve if not step.isdecimal()]:
            raise TypeError(f"curve.{wrong[0]} is no number of steps")
        for place, found in self._groups():
            _check_scores(found, place, may_lack=SCORES if self.status == "partial" and not place else LATER)

    def _groups(self) -> Iterator[tuple[str, Scores]]:
        """All scores of the run, each with its place in result.json."""
        yield "", self.scores
        yield "zero_shot.", self.zero_shot
        yield from ((f"curve.{step}.", found) for step, found in self.curve.items())

    def to_json(self) -> dict[str, Any]:
        """As result.json has it: the scores beside the facts, and nothing for what is not known."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("scores", "run")}
        known = {name: value for name, value in plain.items() if value is not None}
        known |= {"loss": list(self.loss), "curve": {step: to_json(found) for step, found in self.curve.items()}}
        after = to_json(self.scores) if self.status == "complete" else {}
        return known | after | {"zero_shot": to_json(self.zero_shot)}

    def write(self, run_dir: Path) -> None:
        """Write it to the run's result.json, atomically.

        Raises:
            UserError: if it holds numbers that are not finite.
        """
        write_json(run_dir / RESULT, self.to_json())


LATER = ("success_at_end",)
"""Scores that older results don't have."""


def _of_scores(found: Any) -> Any:
    """The scores among what a section of result.json holds.

    Anything that is no section is returned as it is, for its type to be refused.
    """
    return {name: found[name] for name in SCORES if name in found} if isinstance(found, dict) else found


def _check_scores(found: Scores, place: str, may_lack: Sequence[str]) -> None:
    """Fill in None for scores that may be absent.

    Raises:
        TypeError: if one is absent that may not be, or is no estimate.
    """
    for name in SCORES:
        if name not in found and name not in may_lack:
            raise TypeError(f"{place}{name} is missing")
        own = found.setdefault(name, None)
        if own is not None and not _makes_sense(own, is_rate=name in RATES):
            raise TypeError(f"{place}{name} is {own}, which is no estimate")


def _makes_sense(own: Estimate, is_rate: bool) -> bool:
    """Whether an estimate has both ends of its interval or none, and a rate lies within 0 and 1."""
    if (own.low is None) != (own.high is None) or own.n < 1:
        return False
    numbers = [number for number in (own.mean, own.low, own.high) if number is not None]
    return not is_rate or all(-1e-9 <= number <= 1 + 1e-9 for number in numbers)


def run_result(
    facts: Mapping[str, Any],
    clock: Stopwatch,
    zero_shot: Scores,
    tuned: Scores | None,
    losses: Sequence[float] = (),
    curve: Mapping[str, Scores] | None = None,
) -> RunResult:
    """The result of a run.

    `facts`: the fields of `RunResult` that are known before training. `tuned`: None while the run is under way.
    `losses`: the mean training loss of each tenth of the steps. `curve`: the scores while training, by optimiser steps.
    """
    curve = curve or {}
    before, *after = failures_counted([zero_shot, *([tuned] if tuned else []), *curve.values()])
    return RunResult(
        **facts,
        zero_shot=before,
        seconds=clock.rounded(),
        status="complete" if tuned else "partial",
        scores=after[0] if tuned else dict.fromkeys(SCORES),
        curve=dict(zip(curve, after[1 if tuned else 0 :], strict=True)),
        loss=tuple(round(loss, 6) for loss in losses),
        peak_memory_mib=peak_memory(),
        versions=versions(),
    )


def read_earlier(run_dir: Path, settings: Mapping[str, Any], base_sha256: str) -> RunResult | None:
    """The result.json of a run that is to be resumed, as far as it got, or its row in a `runs.jsonl`.

    None if the run has neither.

    Raises:
        UserError: if it is that of a run with other settings, or on other weights of the base.
    """
    path = run_dir / RESULT
    content, what = (read_json(path), f"'{path}'") if path.is_file() else (None, "")
    if not path.is_file() and (row := find_row(run_dir)):
        content, what = row.content, f"'{row.file}', in the row of '{row.run}',"
    if content in (None, {}):
        return None
    try:
        earlier = RunResult.from_json(content)
    except TypeError as error:
        raise UserError(f"{what} is not as a run writes it ({error}): remove it, or set another run_dir.") from error
    before, now = flat(earlier.settings), flat(settings)
    changed = [
        f"{key}={before.get(key)} (now {now.get(key)})" for key in before | now if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(f"{what} is the result of a run with {', '.join(changed[:4])}: set another run_dir.")
    if earlier.base_sha256 not in (None, base_sha256):
        raise UserError(
            f"{what} is the result of a run on other weights of base={earlier.base}: remove the folder, or set another run_dir."
        )
    return earlier


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names on the command line, such as `adapter.eva.rho`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return found


def summary(result: RunResult) -> str:
    """The scores before and after as a table, and what they cost."""
    rows = [(name.replace("_", " "), result.zero_shot[name], result.scores[name]) for name in SCORES]
    trainable, total = result.trainable_parameters, result.total_parameters
    start = f"on {result.base}" if result.settings["adapter"]["network"] == "base" else "from scratch"
    seconds = ", ".join(f"{phase} {spent:.1f}" for phase, spent in result.seconds.items())
    episodes = result.learned_from or result.demonstrations
    return "\n".join(
        [
            f"{result.task}: {result.adapter} {start}, {counted(episodes, 'episode')}, {result.steps} steps",
            "",
            markdown(["mean [95 % interval]", "zero-shot", "fine-tuned"], rows),
            "",
            f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.1f} %)",
            f"seconds: {seconds}",
        ]
    )
