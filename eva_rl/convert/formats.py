"""The formats: found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

import eva_rl.convert
from eva_rl.convert.episodes import Format
from eva_rl.errors import UserError, did_you_mean


@cache
def formats() -> dict[str, Format]:
    """Every format by name. A module of this package that has a `FORMAT` is one."""
    names = (found.name for found in pkgutil.iter_modules(eva_rl.convert.__path__) if found.name != "__main__")
    modules = (importlib.import_module(f"eva_rl.convert.{name}") for name in names)
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def find_format(source: Path, name: str | None = None) -> Format:
    """The format of this name, or the one that the files look like.

    Raises:
        UserError: if there is none.
    """
    if name is not None:
        if name not in formats():
            raise UserError(f"There is no format '{name}'. {did_you_mean(name, formats())}")
        return formats()[name]
    found = next((known for known in formats().values() if known.recognises(source)), None)
    if found is None:
        raise UserError(
            f"source={source} holds none of the known formats ({', '.join(formats())}): name a folder of .npz, .npy, .csv or .parquet "
            "files, an HDF5 file of robomimic's or D4RL's layout, or a LeRobot folder."
        )
    return found
