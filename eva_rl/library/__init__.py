"""Adapters of one base in one folder: add, find the right one, serve many at once.

Nothing is imported before it is asked for, so that the command answers `--help` at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eva_rl.library.index import Library

__all__ = ["Library"]


def __getattr__(name: str) -> Any:
    if name == "Library":
        from eva_rl.library.index import Library

        return Library
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
