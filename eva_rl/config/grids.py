"""The runs of a grid: their tasks, their folders, and what goes on where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode

from eva_rl.config.identity import protocol
from eva_rl.errors import UserError
from eva_rl.settings import ADAMW, NO_ALLOCATOR, AdapterSettings, FinetuneConfig

GRID = ("-m", "--multi", "hydra.mode=MULTIRUN", "study=")
"""What words of the command line that ask for a grid begin with."""


def with_tasks_listed(word: str, splits: Callable[[], Mapping[str, Sequence[str]]]) -> str:
    """A word of a grid's command line, with the tasks of a split in the place of its name."""
    if not word.lstrip("+").startswith("task="):
        return word
    try:
        given = OverridesParser.create().parse_override(word)
        names = list(given.sweep_string_iterator()) if given.is_sweep_override() else [str(given.value())]
    except HydraException:  # it is said when Hydra reads all words
        return word
    names = [name.strip("'\"") for name in names]
    known = splits()  # imports the domains, which other words do without
    if known.keys().isdisjoint(names):
        return word
    return f"{word.partition('=')[0]}={','.join(','.join(known.get(name, (name,))) for name in names)}"


def checked(config: Any) -> Any:
    """A config whose settings go together with each other and with what the command line names.

    A fine-tuning run of a grid that was given no folder gets one that its settings name, and goes on with what is there. It makes no film
    unless asked for one.

    Raises:
        UserError: if they don't.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        check_resume(config)
    elif isinstance(config, FinetuneConfig):
        config = replace(config, video=bool(config.video))
        if config.run_dir is None:
            config = replace(config, run_dir=str(_folder_in_grid(config)), resume=config.resume is not False)
    check_sizes(config, HydraConfig.get().overrides.task)
    return config


def check_resume(config: Any) -> None:
    """Raise a `UserError` if a run is to go on that is not named."""
    if getattr(config, "resume", False) and config.run_dir is None:
        raise UserError("resume=true was given without run_dir=..., the folder of the run to go on with.")


def check_sizes(config: Any, words: Sequence[str]) -> None:
    """Raise a `UserError` if the words of the command line set what the budget decides."""
    method = getattr(config, "adapter", None)
    if isinstance(method, AdapterSettings) and method.budget is not None:
        overrides = OverridesParser.create().parse_overrides(list(words))
        given = set().union(*(_given(word.key_or_group, word.value()) for word in overrides))
        for name in method.size or ():
            if f"adapter.config.{name}" in given:
                raise UserError(
                    f"adapter.config.{name} was given, which adapter.budget={method.budget} decides: set adapter.rank or "
                    f"adapter.size.{name} (how much it grows with the size), or adapter.budget=null."
                )


def _given(key: str, value: Any) -> set[str]:
    """The settings that `key=value` on the command line sets, those within a section by their full names."""
    if not isinstance(value, dict):
        return {key}
    return {key}.union(*(_given(f"{key}.{name}", own) for name, own in value.items()))


def _folder_in_grid(config: FinetuneConfig) -> Path:
    """`runs/grid/<adapter>/<task>-<seed>-<digest>`, the digest being that of all that decides the run's result.

    An optimiser other than AdamW, and an allocator, follow the adapter's name: `<adapter>-<optimizer>`.
    """
    digest = hashlib.sha256(json.dumps(protocol(config), sort_keys=True, allow_nan=False).encode()).hexdigest()
    more = [
        chosen.name
        for chosen, usual in ((config.optimizer, ADAMW), (config.allocator, NO_ALLOCATOR))
        if chosen != usual
    ]
    name = "-".join([config.adapter.name, *more])
    return Path(HydraConfig.get().sweep.dir, name, f"{config.task}-{config.seed}-{digest[:8]}")
