"""A composed config -> the dataclass it is for, its values of the declared types."""

from __future__ import annotations

import contextlib
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from eva_rl.errors import UserError, did_you_mean


def parse(config: DictConfig, schema: type) -> Any:
    """The dataclass `schema` filled from a composed config, its values converted to the declared types.

    Raises:
        UserError: if a value is missing, unknown or of the wrong type.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"'{missing[0]}' is not set: add {missing[0]}=... to the command line.")
    built = _build(schema, cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True)), "")
    if not 0 <= getattr(built, "seed", 0) < 2**63:
        raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, got {built.seed}.")
    return built


def _build(schema: type, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(schema)
    names = [f.name for f in fields(schema)]
    unknown = sorted(values.keys() - set(names))
    if unknown:
        raise UserError(f"There is no setting '{prefix}{unknown[0]}'. {did_you_mean(unknown[0], names)}".rstrip())
    if "mirror" in names and not prefix:
        values = {**BEFORE, **values}
    for f in fields(schema):
        if f.name not in values and not _has_default(f):
            raise UserError(f"'{prefix}{f.name}' is not set: add {prefix}{f.name}=... to the command line.")
    return schema(**{name: _convert(values[name], hints[name], prefix + name) for name in names if name in values})


BEFORE = {"mirror": False, "filter": "all"}
"""What the settings of an earlier run mean that are not in its file, where today's default is another."""
ADDED = frozenset({"allocator", "library", "noise", "optimizer", "task_vectors", "tracker"})
"""Settings that the files of earlier runs do not have."""


def _has_default(field: Field) -> bool:
    """Whether a setting may be left out of a file. What is given by keyword has its default for Python's callers alone."""
    return field.default is not MISSING and (not field.kw_only or field.name in ADDED)


def _convert(value: Any, hint: Any, key: str) -> Any:
    options = get_args(hint) if get_origin(hint) not in (tuple, dict) else ()
    if type(None) in options:
        if value is None or value == "None":  # as Python spells null
            return None
        hint = next(option for option in options if option is not type(None))
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, key + ".")
    if get_origin(hint) is tuple and isinstance(value, str | int | float) and not isinstance(value, bool):
        value = [value]  # one is a list of one
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(item, get_args(hint)[0], key) for item in value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            return float(value)
    if get_origin(hint) is dict and isinstance(value, dict):
        kind = get_args(hint)[1]
        return value if kind is Any else {k: _convert(v, kind, f"{key}.{k}") for k, v in value.items()}
    plain = hint if isinstance(hint, type) else None
    if plain is str and value == "":
        raise UserError(f"{key}= was given without a value.")
    if plain in (int, str, bool) and type(value) is plain:
        return value
    if plain is str and isinstance(value, int | float):
        return str(value)
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        plain, "a list or section"
    )
    raise UserError(f"{key} must be {kind}, got {value}.")


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """All settings of an entry point, nested ones with dots."""
    names: list[str] = []
    for name, hint in get_type_hints(schema).items():
        names.append(prefix + name)
        for section in (hint, *get_args(hint)):
            if isinstance(section, type) and is_dataclass(section):
                names += setting_names(section, f"{prefix}{name}.")
    return names
