"""Whatever goes wrong on a command line -> one sentence."""

from __future__ import annotations

import traceback

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from eva_rl.config.parse import setting_names
from eva_rl.errors import UserError, did_you_mean, in_one_line, refused_path


def mistake(error: Exception, schema: type) -> str:
    """One sentence for an error that is a user's mistake, and an empty text for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, schema)
    if isinstance(error, TypeError) and _raised_in(error) == "hydra._internal.defaults_list":  # by `model=[1,2]`
        return "What is chosen from a group, such as adapter, model or optimizer, must be one name."
    if isinstance(error, yaml.YAMLError):
        return f"A config can't be read ({in_one_line(error)}): mend it."
    return refused_path(error)


def _raised_in(error: Exception) -> str:
    """The name of the module that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def of_plugin(error: Exception) -> str:
    """One sentence for what a Hydra launcher could not do, such as reach its cluster, and an empty text otherwise.

    The runs it launches say themselves why they failed, and end in a `UserError`. Any other error that leaves a
    launcher is the launcher's own.
    """
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    name = next((module.split(".")[1] for module in modules if module.startswith("hydra_plugins.")), None)
    return f"Hydra's plugin {name} failed ({type(error).__name__}: {in_one_line(error)})." if name else ""


def explain(error: Exception, schema: type) -> str:
    """One sentence for what Hydra or OmegaConf found wrong with the command line."""
    message = in_one_line(error)
    key = getattr(error.__cause__ or error, "full_key", None)
    if "is not in struct" in message or "Could not override" in message:
        given = str(key or message.partition("'")[2].partition("'")[0])
        if given in setting_names(schema):
            section = given.rpartition(".")[0]
            if section in setting_names(schema):
                return f"'{given}' can't be set here: what was chosen has no '{section}'."
            return f"'{given}' can't be chosen here ({message}): a run's own config holds one choice of it already."
        if (section := given.rpartition(".")[0]) in OPEN:
            return f"'{section}' has no '{given.rpartition('.')[2]}' here: +{given}=..., with a plus, adds it."
        return f"There is no setting '{given}'. {did_you_mean(given, setting_names(schema))}".rstrip()
    if "missing EQUAL" in message:
        given = message.partition("'")[2].partition("'")[0]
        return f"'{given}' is no setting: settings are given as key=value, such as task=... or run_dir=..."
    if "override_grammar" in message:
        said = message.partition(" See https")[0].removeprefix("LexerNoViableAltException: ").rstrip(" ^.")
        return (
            f"An argument can't be read ({said}): a value with =, commas, brackets, spaces or letters beyond a to z stands in "
            "quotes, as in \"run_dir='a=ä'\"."
        )
    if "Could not find" in message:  # a choice of a group that there is not
        found, _, options = message.partition(" Config search path:")[0].partition(" Available options in ")
        choice = found.rpartition("Could not find ")[2].strip("'").removesuffix("'")
        group, _, name = choice.rpartition("/")
        known = options.partition(":")[2].split()
        listed = f"The options are {', '.join(known)}." if len(known) <= 12 else f"'{group}=?' lists all."
        near = did_you_mean(name, known)
        return f"There is no '{choice}'. {near if near.startswith('Did') else ''} {listed}".replace("  ", " ")
    return message.removesuffix(".") + "."


OPEN = (
    "adapter.config",
    "adapter.ratios",
    "adapter.size",
    "allocator.config",
    "optimizer.config",
    "optimizer.matrices",
    "optimizer.others",
    "weights",
)
"""Sections that take any name."""
