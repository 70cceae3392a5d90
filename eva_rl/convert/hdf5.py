"""HDF5 files, as h5py reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from eva_rl.errors import UserError, in_one_line

BROKEN = (RuntimeError, KeyError)
"""What h5py raises, besides `OSError` and `ValueError`, where a file is damaged within."""


def is_hdf5(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".hdf5", ".h5", ".hdf")


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading.

    Raises:
        UserError: if it is damaged or another program has it open.
    """
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise UserError(f"'{path}' is open for writing in another process: wait until that is done.") from error
    except OSError as error:
        raise UserError(f"'{path}' can't be read as HDF5 ({in_one_line(error)[:200]}): get it again.") from error
    with file:
        try:
            yield file
        except BROKEN as error:
            raise UserError(f"'{path}' is damaged ({in_one_line(error)[:200]}): get it again.") from error


def arrays(group: h5py.Group, prefix: str = "") -> dict[str, h5py.Dataset]:
    """The datasets of a group and of the groups in it, by their paths within it."""
    found = {}
    for name, member in group.items():
        if isinstance(member, h5py.Group):
            found |= arrays(member, f"{prefix}{name}/")
        elif isinstance(member, h5py.Dataset) and member.shape:
            found[f"{prefix}{name}"] = member
    return found


def read(dataset: h5py.Dataset, path: Path, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a dataset.

    Raises:
        UserError: if the file ends before, or is damaged there.
    """
    try:
        return dataset[rows]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"'{path}', column '{name}' can't be read ({in_one_line(error)[:200]}): get it again."
        ) from error
