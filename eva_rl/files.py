"""Files appear whole or not at all: everything is written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from eva_rl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UMASK = os.umask(0)
"""The permissions that new files do without here."""
os.umask(UMASK)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; what is written there, a file or a folder, becomes `target` on success."""
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
        if "No space left on device" in str(error):  # an OSError, or the words of a library that has its own kind
            raise UserError(f"There is no space left for '{target}': free some, or write elsewhere.") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these tensors that holds NaN or infinite numbers; None where all are finite."""
    return next((name for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()), None)
