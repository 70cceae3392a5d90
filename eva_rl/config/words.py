"""A job as Python's callers describe it -> the words of its command line -> the settings they stand for.

So both are completed, checked and refused by the same code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from eva_rl.config.grids import check_resume, check_sizes
from eva_rl.config.mistakes import explain
from eva_rl.config.parse import parse
from eva_rl.errors import UserError
from eva_rl.settings import AdapterSettings, EvaluateConfig, FinetuneConfig, PretrainConfig

Job = FinetuneConfig | PretrainConfig | EvaluateConfig

COMMANDS: Mapping[type, tuple[str, str]] = {
    FinetuneConfig: ("finetune", "eva_rl.configs"),
    PretrainConfig: ("pretrain", "eva_rl.configs"),
    EvaluateConfig: ("evaluate", "eva_rl.configs.evaluate"),
}
"""Each job's command, and the package of its file of settings."""


def completed(job: Job, words: Sequence[str] = ()) -> Job:
    """The job with all that it leaves to the files in `configs/`.

    The words are more of its settings, as on the command line. A job that has its adapter's settings was read from such
    files, and stays as it is.

    Raises:
        UserError: if its settings make no sense, as the command says.
    """
    if isinstance(getattr(job, "adapter", None), AdapterSettings):
        if words:
            raise UserError(f"{words[0]} was given for a job that is complete: change it with dataclasses.replace.")
        return job
    schema = type(job)
    name, folder = COMMANDS[schema]
    words = [*words_of(job), *words]
    try:
        with initialize_config_module(folder, version_base="1.3"):
            config = parse(compose(name, words), schema)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, schema)) from error
    except ValueError as error:  # Hydra's answer to `model=3`
        raise UserError(f"{' '.join(words)}: {explain(error, schema)}") from error
    check_resume(config)
    check_sizes(config, words)
    return config


def words_of(job: Job) -> list[str]:
    """Every setting that is not the default, as a word of the command line."""
    hints, given = get_type_hints(type(job)), {f.name: getattr(job, f.name) for f in fields(job)}
    changed = {f.name: given[f.name] for f in fields(job) if f.default is MISSING or given[f.name] != f.default}
    return [word for name, value in changed.items() for word in _words(name, value, is_dataclass(hints[name]))]


def _words(name: str, value: Any, section: bool) -> Iterator[str]:
    """`name=value`, or such a word for each setting of a section."""
    if section and is_dataclass(value):  # all of it
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if section and isinstance(value, Mapping):
        for key, own in value.items():
            yield f"{name}.{key}={_in_words(own)}"
    else:
        yield f"{name}={_in_words(value)}"


def _in_words(value: Any) -> str:
    """A value as the command line has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z][\w./-]*", value) and value not in ("null", "true", "false", "inf", "nan"):
            return value
        escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (m[2] and "\\'"), value)
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_words(own)}" for key, own in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_in_words, value)) + "]"
    return str(value)
