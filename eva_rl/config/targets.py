"""What settings may name to be made of them: peft's configs, optimisers, and functions that start adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.errors import HydraException

from eva_rl.errors import UserError, in_one_line


def instantiate(config: dict[str, Any]) -> Any:
    """The peft config or optimiser that `_target_` and its settings describe, with nested ones such as EVA's.

    A run's settings may be a stranger's, so no other name in them is imported. Hydra would resolve interpolations once
    more and call what `oc.create` makes of one without a check. These settings may therefore hold none.

    Raises:
        UserError: if `_target_` names anything else, an interpolation is left, or nothing can be made of these settings.
    """
    check_targets(config)
    if left := next((text for text in texts(config) if "${" in text), None):
        raise UserError(
            f"The settings of {config.get('_target_')} must be plain values, got {left[:200]}: write it out, without ${{."
        )
    try:
        return hydra.utils.instantiate(config, _convert_="all")  # plain lists: peft writes its config as JSON
    except HydraException as error:
        cause = error.__cause__ or error
        raise UserError(
            f"{config.get('_target_')} can't be made of the given settings ({in_one_line(cause)})."
        ) from error


TARGET = re.compile(
    r"peft\.(tuners\.[a-z0-9_]+\.config\.)?[A-Za-z0-9]+Config|eva_rl\.adapter\.\w+\.[A-Za-z]+Config|(torch\.optim|pytorch_optimizer)\.[A-Z]\w+|eva_rl\.(training\.optimizers|adapter\.allocators)\.(\w+)\.\4"
)
"""What `_target_` may name: configs of peft and our own like them, optimisers, and allocators."""
OF_HYDRA = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins\.\w+)\.\w+\.\w+(Launcher|Sweeper)")
"""What `_target_` may name besides in a folder of settings: Hydra's launchers and sweepers."""


def check_targets(settings: Any, where: str = "", also: re.Pattern[str] | None = None) -> None:
    """Raise a `UserError` if these settings, however nested, name anything to be called but peft's config classes and optimisers."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key == "_target_" and not (
                isinstance(value, str) and (TARGET.fullmatch(value) or (also and also.fullmatch(value)))
            ):
                raise UserError(
                    f"_target_{where} must be a config class of peft, such as peft.LoraConfig, or an optimiser, such as torch.optim.AdamW, got {value}."
                )
            check_targets(value, where, also)
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_targets(value, where, also)


def texts(settings: Any) -> Iterator[str]:
    """All texts among these settings, however nested."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for value in settings:
            yield from texts(value)
    elif isinstance(settings, str):
        yield settings


def start_function(name: str) -> Callable[..., Any]:
    """The function that initialises an adapter.

    Raises:
        UserError: if the name is none of a function.
    """
    try:
        return hydra.utils.get_method(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"adapter.start={name} names no function ({in_one_line(error)}).") from error
