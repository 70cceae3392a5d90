"""What an adapter's own configuration may ask for: it may come from a stranger."""

from __future__ import annotations

import json
from pathlib import Path

from eva_rl.errors import UserError
from eva_rl.files import read_json

OTHER_FILES = (
    "XLORA",
    "CARTRIDGE",
    "SHADOW",
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
)
"""Kinds of adapter for which peft reads more than the adapter's folder, such as a tokenizer, or that are none of a layer's weights."""


def check_adapter_config(folder: Path) -> None:
    """Look, before peft does, whether an adapter's `adapter_config.json` asks for nothing but an adapter of this model's layers.

    Raises:
        UserError: if it is of an unknown kind, needs files beside its own, or names a module to import.
    """
    from peft import PeftType

    path = folder / "adapter_config.json"
    settings = read_json(path)
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str) or kind not in {known.value for known in PeftType} or kind in OTHER_FILES:
        raise UserError(
            f"The 'peft_type' in '{path}' must be one of peft's for linear layers, such as 'LORA', got {json.dumps(kind)}."
        )
    if settings.get("megatron_config"):
        raise UserError(
            f"'{path}' sets 'megatron_config', for which peft imports the module it names: get another adapter."
        )
    if key := _target(settings):
        raise UserError(f"'{path}' holds '{key}', which names something to be called: get the adapter again.")


def _target(settings: object) -> str | None:
    """The first key, however nested, that would have a reader call what its value names."""
    if isinstance(settings, dict):
        return next((key for key in settings if key == "_target_"), None) or _target(list(settings.values()))
    if isinstance(settings, list):
        return next(filter(None, map(_target, settings)), None)
    return None
