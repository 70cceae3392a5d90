"""Adapt a pretrained Decision Transformer to a new task from a handful of trajectories.

In a checkout `envs/` and `configs/` stand beside this package; in a wheel they are inside it. Both are imported as
`eva_rl.envs` and `eva_rl.configs`.
"""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first asked for: torch takes seconds."""
    if name == "load_policy":
        from eva_rl.policy import load_policy

        return load_policy
    if name == "Library":
        from eva_rl.library import Library

        return Library
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
