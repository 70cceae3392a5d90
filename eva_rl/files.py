"""Files appear whole or not at all: everything is written under a temporary name and renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from eva_rl.errors import NO_SPACE, UserError, no_space

if TYPE_CHECKING:
    from torch import Tensor

UMASK = os.umask(0)
"""The permissions that new files do without here."""
os.umask(UMASK)


FULL = tuple(getattr(errno, name) for name in NO_SPACE if hasattr(errno, name))
"""Why the system takes no more of a file: the disk, the user's share of it, or the largest file is full."""


PROBE = 2**22
"""Bytes that `check_space` tries out at most: some network drives write each of them."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that no more can be written, be it the system's own or in the words of a library."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    numbers = {int(number) for number in re.findall(r"(?:errno = |os error )(\d+)", str(error))}  # h5py's and Rust's
    return bool(numbers & set(FULL)) or os.strerror(errno.ENOSPC) in str(error) or is_full(error.__cause__)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`.

    What is written there, a file or a folder, becomes `target` on success.
    """
    make_folder(target.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new = scratch / target.name
    try:
        yield new
        if not os.path.lexists(new):
            raise FileNotFoundError(f"Nothing was written to become '{target}'.")
        for path in (new, *new.rglob("*")):
            if path.is_file() and not path.is_symlink():  # safetensors keeps what it writes from all others
                path.chmod(path.stat().st_mode | (0o666 & ~UMASK))
        if target.is_dir() and not target.is_symlink():  # the system replaces a file in one step, a folder in two
            os.replace(target, scratch / "old")
        os.replace(new, target)
    except BaseException as error:
        if (scratch / "old").exists():
            os.replace(scratch / "old", target)
        if is_full(error):
            raise no_space(target) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_space(folder: Path, size: int) -> None:
    """Look whether so many bytes can be written below a folder, for libraries that fail badly where they can't be.

    Raises:
        UserError: if they can't be.
    """
    if shutil.disk_usage(folder).free < size:
        raise no_space(folder)
    if hasattr(os, "posix_fallocate"):  # what a quota leaves, the disk does not know
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, min(max(size, 1), PROBE))
        except OSError as error:  # other errors are of file systems that can't tell
            if error.errno in FULL:
                raise no_space(folder) from error


class InUseError(UserError):
    """Another process works in the folder."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it, on this machine or others that share its file system, out of the folder.

    Raises:
        InUseError: if another process has it.
    """
    with _named(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InUseError(f"Another process works in '{folder}': let it finish, or name another folder.") from error
    try:
        yield
    finally:
        try:
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it makes another
            with suppress(OSError):  # up to the first in which something came about
                for path in made:
                    path.rmdir()
        finally:
            lock.release()


def make_folder(path: Path) -> Path:
    """Create `path` and check that files can be written there.

    Raises:
        UserError: if it can't be created or written to.
    """
    with _named(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # not to be read or written, a name too long, a file in the way
        raise UserError(f"The folder '{folder}' can't be written to ({error.strerror}): name another one.") from error


def check_run_folder(path: Path, resume: bool = False) -> None:
    """Look, without making it, whether a run can write to this folder.

    Raises:
        UserError: if files can't be written there, or it holds the result of a run that this one does not resume.
    """
    with _named(path):
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    make_folder(nearest)
    if resume:
        return
    for name in ("result.json", "adapter", "model"):
        if (path / name).exists():
            raise UserError(
                f"'{path}' holds what an earlier run left, '{name}': set another run_dir, or remove the folder."
            )


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically.

    Raises:
        UserError: if it holds NaN or infinite numbers, which JSON does not have.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(f"'{path}' would hold NaN or infinite numbers ({error}): look for extreme values.") from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"The file '{path}' does not exist.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"The file '{path}' can't be read as JSON ({error}): make it again.") from error


def from_json(kind: Any, value: Any, place: str = "") -> Any:
    """Turn `value`, as JSON has it, into a dataclass or another type of its fields.

    This is the one place where what is read from disk is checked. Lists become tuples, and whole numbers become floats,
    where these are declared.

    kind: a dataclass, int, float, str, bool, Literal, tuple[X, ...], dict[str, X], or one of those or None.

    Raises:
        TypeError: if the value, or one within it, is not of its type, or a number is not finite. The message names the
            place.
    """
    if kind is Any:
        return value
    options = get_args(kind)
    if type(None) in options:
        return None if value is None else from_json(next(o for o in options if o is not type(None)), value, place)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if unknown := sorted(map(str, value.keys() - hints.keys())):
            raise TypeError(f"there is no {place}{unknown[0]}")
        needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        if absent := [name for name in needed if name not in value]:
            raise TypeError(f"{place}{absent[0]} is missing")
        return kind(**{name: from_json(hints[name], own, f"{place}{name}.") for name, own in value.items()})
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(from_json(options[0], own, f"{place}{number}.") for number, own in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {name: from_json(options[1], own, f"{place}{name}.") for name, own in value.items()}
    if get_origin(kind) is Literal and isinstance(value, str) and value in options:
        return value
    if (
        kind is float
        and type(value) is not bool
        and isinstance(value, int | float)
        and abs(value) <= sys.float_info.max
    ):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise TypeError(f"{place.rstrip('.') or 'it'} is {json.dumps(value)[:60]}, which is no {_in_words(kind)}")


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = {int: "whole number", float: "finite number", str: "text", bool: "true or false", tuple: "list"}
    return words.get(get_origin(kind) or kind, "section")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays, or what numpy makes arrays of, by their names as a `.npz`, atomically."""
    import numpy as np  # --help does without

    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these tensors that holds NaN or infinite numbers, or None where all are finite."""
    return next((name for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()), None)
