"""Mistakes a user can make and mend. Entry points print them as one sentence, without a traceback."""

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What was given, what was expected, and what to do, in one sentence."""


class MissingExtra(UserError):
    """A domain's optional packages are not installed."""

    def __init__(self, domain: str, extra: str, missing: str | None):
        self.given = (domain, extra, missing)
        super().__init__(
            f"The domain '{domain}' needs the package '{missing}', which is not installed: "
            f"run `pip install 'eva_rl[{extra}]'`."
        )

    def __reduce__(self):  # so that one raised in a worker process reaches its parent
        return type(self), self.given


def in_one_line(error: BaseException | None) -> str:
    """A library's message without its line breaks, to stand in a sentence of ours."""
    return " ".join(str(error).split())


def did_you_mean(given: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence that offers the names nearest to `given`, or lists them all where there are few."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=count, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(name) for name in near)}?"
    if len(known) <= 12:
        return f"Known are {', '.join(repr(name) for name in known)}."
    return ""


NO_SPACE = ("ENOSPC", "EDQUOT", "EFBIG")
REFUSALS = ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "EEXIST")


def no_space(path: object = None) -> UserError:
    """The error for a disk that takes no more, with what was to be written where that is known."""
    what = "" if path is None else f" for '{path}'"
    return UserError(f"There is no space left{what}: free some, or write elsewhere.")


def refused_path(error: BaseException) -> str:
    """A sentence for an error in which the system refuses a file's or folder's name or access to it, or has no space.

    Empty for any other error.
    """
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in NO_SPACE:
        return str(no_space(error.filename))
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in REFUSALS and error.filename is not None:
        return f"'{error.filename}' can't be used ({error.strerror}): name another file or folder."
    return ""


@contextmanager
def while_read() -> Iterator[None]:
    """End without a word, with status 1, where the reader of what is printed (`... | head`) has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # was it this pipe that broke?
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            sys.exit(1)
        raise
