"""Adapt a pretrained Decision Transformer to a new task from a handful of trajectories.

In a checkout `envs/`, `configs/` and `checkpoints/` stand beside this package. In a wheel they are inside it. They are
imported as `eva_rl.envs`, `eva_rl.configs` and `eva_rl.checkpoints`.

The names in `__all__` are the Python API. Each is imported when it is first asked for: torch takes seconds.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eva_rl.adapter import attach
    from eva_rl.errors import UserError
    from eva_rl.jobs.comparing import Compared, compare
    from eva_rl.jobs.execute import Run, execute
    from eva_rl.library import Library
    from eva_rl.policy import load_policy
    from eva_rl.settings import EvaluateConfig as Evaluate
    from eva_rl.settings import EvaSettings
    from eva_rl.settings import FinetuneConfig as Finetune
    from eva_rl.settings import PretrainConfig as Pretrain

__version__ = "0.1.0"

__all__ = [
    "Compared",
    "EvaSettings",
    "Evaluate",
    "Finetune",
    "Library",
    "Pretrain",
    "Run",
    "UserError",
    "attach",
    "compare",
    "execute",
    "load_policy",
]

_PLACES = {
    "Compared": ("eva_rl.jobs.comparing", "Compared"),
    "EvaSettings": ("eva_rl.settings", "EvaSettings"),
    "Evaluate": ("eva_rl.settings", "EvaluateConfig"),
    "Finetune": ("eva_rl.settings", "FinetuneConfig"),
    "Library": ("eva_rl.library", "Library"),
    "Pretrain": ("eva_rl.settings", "PretrainConfig"),
    "Run": ("eva_rl.jobs.execute", "Run"),
    "UserError": ("eva_rl.errors", "UserError"),
    "attach": ("eva_rl.adapter", "attach"),
    "compare": ("eva_rl.jobs.comparing", "compare"),
    "execute": ("eva_rl.jobs.execute", "execute"),
    "load_policy": ("eva_rl.policy", "load_policy"),
}
"""Where each is, and what it is called there."""

_CHECKOUT = Path(__file__).resolve().parent.parent
_BESIDE = ("checkpoints", "configs", "envs")


class _Beside(MetaPathFinder):
    """Finds the packages that stand beside this one in a checkout, and nothing else there.

    The checkout's root on `__path__` would make `eva_rl.tests` importable, too. Links in this folder would be plain files in a checkout on
    Windows. What an editable install maps is not there for a checkout that is only on the path, and may be another one's. Type
    checkers look for folders and see neither of these, so that pyright reports the imports of `eva_rl.envs` as unresolved.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name not in _BESIDE:
            return None
        folder = _CHECKOUT / name
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


if (_CHECKOUT / "pyproject.toml").is_file():
    sys.meta_path.insert(0, _Beside())  # before an editable install's, which may be of another checkout


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module, own = _PLACES[name]
    return getattr(import_module(module), own)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
