"""HDF5 of D4RL: all steps end to end, an episode ending where `terminals` or `timeouts` says so. (arXiv 2004.07219)

A file holds `observations` (N, ...), `actions` (N, A), and `rewards`, `terminals` and mostly `timeouts` (N,). Some
files have `next_observations`. The steps after the last end belong to an episode that was cut off, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eva_rl.convert.episodes import DAMAGED, Columns, Episode, Format, Unread, matching, unread
from eva_rl.convert.hdf5 import BROKEN, arrays, is_hdf5, opened, read
from eva_rl.errors import UserError

NEXT = "next_observations"


def _recognises(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return "actions" in file and bool({"terminals", "timeouts"} & set(file))


def _ends(path: Path, columns: Columns) -> tuple[np.ndarray, int]:
    """The step after each episode's last one (E,), and the number of steps in all."""
    with opened(path) as file:
        found = arrays(file)
        names = [name for role in (columns.terminations, columns.truncations) for name in matching(role or (), found)]
        if not names:
            raise UserError(f"'{path}' has no column 'terminals' or 'timeouts' to tell where episodes end.")
        flags = [read(found[name], path, name).reshape(-1).astype(bool) for name in names]
        if len({len(flag) for flag in flags}) > 1:
            raise UserError(f"'{path}', columns {' and '.join(names)} differ in length: get it again.")
        return np.flatnonzero(np.any(flags, 0)) + 1, len(flags[0])


def _read(path: Path, columns: Columns) -> Iterator[Episode | Unread]:
    ends, steps = _ends(path, columns)
    if not len(ends):
        raise UserError(f"'{path}', columns 'terminals' and 'timeouts' never say that an episode ends.")
    with opened(path) as file:
        found = arrays(file)
        wanted = {name for names in columns for name in matching(names or (), found)}
        for name in sorted(wanted):
            if len(found[name]) != steps:
                raise UserError(
                    f"'{path}', column '{name}' has {len(found[name])} rows where {steps} were expected: get it again."
                )
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            try:
                values = {name: read(found[name], path, name, slice(start, end)) for name in sorted(wanted)}
                final = {}
                if NEXT in found and "observations" in wanted and len(found[NEXT]) == steps:
                    final = {"observations": read(found[NEXT], path, NEXT, slice(end - 1, end))[0]}
                episode = Episode(str(path), str(number), values, final)
            except (*DAMAGED, *BROKEN) as error:
                episode = unread(f"'{path}', episode {number}", error)
            yield episode


def _left_out(path: Path, columns: Columns) -> list[tuple[str, str]]:
    ends, steps = _ends(path, columns)
    rest = steps - (int(ends[-1]) if len(ends) else 0)
    return [(f"the last {rest} steps", "their episode has no end")] if rest else []


FORMAT = Format(
    "d4rl",
    _recognises,
    _read,
    Columns(
        observations=("observations",),
        actions=("actions",),
        rewards=("rewards",),
        terminations=("terminals",),
        truncations=("timeouts",),
        success=("infos/success|infos/goal_achieved",),
    ),
    left_out=_left_out,
)
