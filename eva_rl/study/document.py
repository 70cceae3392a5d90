"""A report of many runs: one Markdown document with its pictures, a CSV, and TensorBoard's HParams."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eva_rl.errors import UserError
from eva_rl.files import make_folder, replacing, write_text
from eva_rl.run import RunResult
from eva_rl.run.tensorboard import write_hparams
from eva_rl.study.compare import Comparison, Varied
from eva_rl.study.plots import plots, to_png, to_svg, varied_plot
from eva_rl.study.runs import table, to_csv
from eva_rl.study.study import Study
from eva_rl.study.tables import improvement_table, method_table, task_table, varied_table
from eva_rl.table import counted

if TYPE_CHECKING:  # importing matplotlib takes seconds
    from matplotlib.figure import Figure

Picture = Literal["png", "svg"]
OWN_PICTURE = re.compile(r"(scores|pareto|improvement|curves|varied)(-\d+)?\.(png|svg)")
STATED = {
    "base": "base {}".format,
    "demonstrations": lambda value: (
        counted(value, "demonstration") if isinstance(value, int) else f"{value} demonstrations"
    ),
    "steps": "{} steps".format,
    "adapter.rank": "rank {}".format,
    "episodes": "{} episodes a score".format,
}
"""The settings of a protocol that its section begins with, and how it says them."""
INTERVALS = (
    "95 % intervals by stratified bootstrap over runs: of no width where all runs of each task agree, and none of a "
    "probability where on each task all pairs of runs compare alike."
)
BOLD = (
    "Methods are compared pair by pair, the runs of one task and seed. Bold, here and in the picture: the two runs of each pair, "
    "exchanged at random, make a mean difference as large in less than 5 % of the draws (no correction for the number of pairs)."
)


def save_report(output: Path, comparison: Comparison, kind: Picture = "png") -> None:
    """Write `report.md`, `runs.csv`, every picture as one kind of file, and `hparams/`.

    The same runs make the same bytes with the same versions of matplotlib, but for `hparams/`, which holds times.

    Raises:
        UserError: if files can't be written there, or its `hparams/` is not a report's.
    """
    make_folder(output)
    hparams = output / "hparams"
    if os.path.lexists(hparams) and not _is_own(hparams):
        raise UserError(f"'{hparams}' is not a report's, which would replace it: name another --output.")
    pictures, names = _pictures(comparison)
    for old in output.iterdir():
        if OWN_PICTURE.fullmatch(old.name) and (old.stem not in pictures or old.suffix != f".{kind}"):
            old.unlink()
    for name, figure in pictures.items():
        with replacing(output / f"{name}.{kind}") as temporary:
            temporary.write_bytes(to_png(figure) if kind == "png" else to_svg(figure))
    write_text(output / "runs.csv", to_csv(comparison.runs))
    write_text(output / "report.md", document(comparison, names, kind) + "\n")
    with replacing(hparams) as temporary:
        write_hparams(temporary, [own.run for own in comparison.runs])


def _pictures(comparison: Comparison) -> tuple[dict[str, Figure], list[list[str]]]:
    """All pictures by name, and the names of each study's."""
    pictures: dict[str, Figure] = {}
    names = []
    for number, study in enumerate(comparison.studies, start=1):
        ending = f"-{number}" if len(comparison.studies) > 1 else ""
        own = {f"{name}{ending}": figure for name, figure in plots(study).items()} if study.methods else {}
        names.append(list(own))
        pictures |= own
    if comparison.varied:
        pictures["varied"] = varied_plot(comparison.varied)
    return pictures, names


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _curves(study: Study) -> str:
    """A sentence on where learning curves have points, if there are any."""
    steps = sorted({step for name in study.methods for step, _ in study.mean_curve(name)})
    if len(steps) < 3:
        return ""
    return f" Learning curves are straight lines between the scores at steps {', '.join(map(str, steps))}."


def _unlike(study: Study) -> str:
    """A sentence for all in which runs differ that no setting says: device, precision, the base's weights, versions."""
    runs = [run for own in study.methods.values() for run in own]
    names = sorted({name for run in runs for name in run.versions})
    kinds = {
        "device": [run.device or "not stated" for run in runs],
        "precision": [_precision(run) for run in runs],
        "SHA-256 of the base's weights": [run.base_sha256[:12] for run in runs if run.base_sha256 is not None],
    }
    kinds |= {f"version of {name}": [run.versions[name] for run in runs if name in run.versions] for name in names}
    found = ""
    for what, own in kinds.items():
        counts = sorted(Counter(own).items())
        if len(counts) > 1:
            found += f" Runs differ in the {what}: {', '.join(f'{kind} ({n})' for kind, n in counts)}."
    return found


def _precision(run: RunResult) -> str:
    asked = run.settings["training"].get("precision", "auto")
    return run.precision or ("not stated" if asked == "auto" else asked)


def _is_own(hparams: Path) -> bool:
    """Whether this is a folder and all in it, but for a system's hidden files, is as a report writes it."""
    return (
        hparams.is_dir()
        and not hparams.is_symlink()
        and all(re.match(r"\d{4}-", p.name) or (p.name.startswith(".") and p.is_file()) for p in hparams.iterdir())
    )


def document(comparison: Comparison, pictures: Sequence[Sequence[str]] | None = None, kind: Picture = "png") -> str:
    """The report as Markdown: for each protocol its methods, then all runs.

    Args:
        pictures: the names of each study's pictures. Without them the report is shortened to what a terminal should
            show.
    """
    left_out, parts = comparison.left_out, []
    if comparison.varied:
        parts += _varied_part(comparison.varied)
        parts += [f"![varied](varied.{kind})"] if pictures else []
    for study, own in zip(comparison.studies, pictures or [()] * len(comparison.studies), strict=True):
        if not study.methods:
            left_out = [*left_out, *study.amiss]
            continue
        parts += _study_part(study)
        parts += [f"![{name.partition('-')[0]}]({name}.{kind})" for name in own]
    if pictures and left_out:
        parts.append("Runs left out:\n\n" + "\n".join(f"- {sentence}" for sentence in left_out))
    if pictures or not parts:
        parts += ["## Runs", table(comparison.runs)] if parts else [table(comparison.runs)]
    return "\n\n".join(parts)


def _varied_part(found: Varied) -> list[str]:
    parts = [f"## {found.setting}", varied_table(found)]
    if found.left_out:
        parts.append(f"Left out here, as not every value of {found.setting} has them: {found.left_out}.")
    return parts


def _study_part(study: Study) -> list[str]:
    """The methods of one protocol: what they share, what is amiss, and the tables."""
    settings = study.protocol
    stated = [say(settings[name]) for name, say in STATED.items() if settings.get(name) is not None]
    parts = [
        f"## {study.title or 'Methods'}\n\n{counted(len(study.tasks), 'task')}, {_seeds(study.seeds)}; "
        f"{', '.join(stated)}. {INTERVALS if len(study.seeds) > 1 else 'One seed: no intervals.'}"
        + _curves(study)
        + _unlike(study)
    ]
    if study.amiss:
        parts.append("Left out or missing:\n\n" + "\n".join(f"- {sentence}" for sentence in study.amiss))
    parts += [method_table(study), task_table(study)]
    return [*parts, improvement_table(study), BOLD] if len(study.methods) > 1 else parts
