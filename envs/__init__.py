"""The tasks: one file a domain, found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from eva_rl.envs.domain import Domain
from eva_rl.errors import UserError, did_you_mean


@cache
def domains() -> dict[str, Domain]:
    """Every domain by name. A module of this package that has a `DOMAIN` is one."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.DOMAIN.name: module.DOMAIN for module in modules if hasattr(module, "DOMAIN")}


def find_task(task: str) -> tuple[Domain, str]:
    """The domain of `task` and the task's name within it, for an id such as `metaworld/hammer-v3`.

    Raises:
        UserError: if there is no such task. The sentence offers the nearest right names.
    """
    domain_name, _, name = task.partition("/")
    domain = domains().get(domain_name)
    if domain is not None and name in domain.tasks:
        return domain, name
    if domain is not None and name in domain.splits:
        raise UserError(
            f"'{task}' is a split of {len(domain.splits[name])} tasks where one task was expected: finetune takes one on its "
            "command line with -m, which runs each of them."
        )
    hint = _nearest(task) or f"The domains are {', '.join(sorted(domains()))}; minari/<id> is a dataset."
    raise UserError(f"There is no task '{task}'. {hint} `python -m eva_rl.tasks` lists all of them.")


def splits() -> dict[str, tuple[str, ...]]:
    """The ids of every split's tasks, by the split's name, such as `metaworld/mt40`."""
    return {
        f"{d.name}/{split}": tuple(f"{d.name}/{member}" for member in members)
        for d in domains().values()
        for split, members in d.splits.items()
    }


def expand_tasks(task: str) -> tuple[str, ...]:
    """The ids of all tasks that `task` stands for: itself, or the members of a split."""
    if task not in (known := splits()):
        find_task(task)
    return known.get(task, (task,))


def _nearest(task: str) -> str:
    known = [f"{d.name}/{name}" for d in domains().values() for name in d.tasks]
    return did_you_mean(task, [*known, *splits()])
