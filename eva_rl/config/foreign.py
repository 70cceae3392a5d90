"""A folder of settings that somebody else wrote -> an error, if anything in it would be called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from eva_rl.config.targets import OF_HYDRA, check_targets, texts
from eva_rl.errors import UserError, in_one_line

REFERENCE = re.compile(r"\$\{(share:)?[\w.,\[\] -]*\}")
"""An interpolation that calls nothing: another setting's name, or our own resolver."""


def _calls(text: str) -> bool:
    """Whether a text holds interpolations, even within others, that do more than refer to other settings."""
    while text != (shorter := REFERENCE.sub("0", text)):
        text = shorter
    return "${" in text


STARTS = "eva_rl.adapter.starts."
"""Where functions that initialise adapters are: a run's settings name no others, the command line may."""


def check_config_folders(words: Sequence[str]) -> None:
    """Raise a `UserError` if a folder of settings that the command line names holds any that would call something foreign.

    Hydra itself makes whatever a config names as its callback or launcher, before a run begins.
    """
    for flag, value in zip(words, [*words[1:], ""], strict=False):
        name, _, given = flag.partition("=")
        if name not in ("--config-dir", "-cd", "--config-path", "-cp"):
            continue
        for path in sorted(_settings_below(Path(given or value))):
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                raise UserError(f"The settings in '{path}' can't be read ({in_one_line(error)}): mend them.") from error
            check_targets(settings, f" in '{path}'", OF_HYDRA)
            if called := next((text for text in texts(settings) if _calls(text)), None):
                raise UserError(
                    f"'{path}' must hold plain values, got {called[:200]}: write it out, or name another setting as in ${{seed}}."
                )
            _check_foreign(settings, path, words)


def _settings_below(folder: Path) -> Iterator[Path]:
    """The files of settings that Hydra would find there, those in linked folders too, each once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        yield from (Path(here, name) for name in names if name.endswith((".yaml", ".yml")))


def _check_foreign(settings: Any, path: Path, words: Sequence[str]) -> None:
    """As `check_targets`, for a start function, for what Hydra itself makes, and for more folders of settings."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in ("hydra", "callbacks", "start") and (text := next((t for t in texts(value) if "${" in t), None)):
            raise UserError(f"'{path}' must hold plain values for {key}, got {text[:200]}: write it out.")
        if key == "searchpath" and value:
            raise UserError(f"hydra.searchpath={value} is set in '{path}': name that folder with --config-dir instead.")
        ours = value is None or (isinstance(value, str) and value.startswith(STARTS))
        if str(key).rpartition(".")[2] == "start" and not ours and f"adapter.start={value}" not in words:
            raise UserError(
                f"adapter.start in '{path}' must be a function of {STARTS[:-1]}, got {value}: add adapter.start={value} to the command "
                "line if you trust it."
            )
        _check_foreign(value, path, words)
