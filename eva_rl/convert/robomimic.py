"""HDF5 of robomimic and robosuite: a group `data`, with a group for each demonstration.

`data/demo_0/` holds `actions` (T, A). Where they were extracted, it also holds `rewards` and `dones` (T,), and
`obs/<name>` and `next_obs/<name>` (T, ...). Raw recordings of robosuite hold `states` alone. (robomimic's
documentation, "Dataset Structure")
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import h5py

from eva_rl.convert.episodes import DAMAGED, Columns, Episode, Format, Unread, matching, unread
from eva_rl.convert.hdf5 import BROKEN, arrays, is_hdf5, opened, read
from eva_rl.errors import UserError


def _recognises(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return isinstance(file.get("data"), h5py.Group)


def _read(path: Path, columns: Columns) -> Iterator[Episode | Unread]:
    with opened(path) as file:
        data, demos = file.get("data"), 0
        members = data if isinstance(data, h5py.Group) else {}
        for demo in sorted(map(str, members), key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [0]):
            try:
                if not isinstance(group := members[demo], h5py.Group):
                    continue
                episode = _episode(path, demo, group, columns)
            except (*DAMAGED, *BROKEN) as error:
                episode = unread(f"'{path}', episode {demo}", error)
            demos += 1
            yield episode
        if not demos:
            raise UserError(f"'{path}' holds no group data/demo_0: name a file of robomimic's layout.")


def _episode(path: Path, demo: str, group: h5py.Group, columns: Columns) -> Episode:
    found = arrays(group)
    wanted = {name for names in columns for name in matching(names or (), found)}
    after = {f"next_{name}" for name in wanted} & found.keys()
    values = {name: read(found[name], path, f"data/{demo}/{name}") for name in sorted(wanted)}
    final = {name.removeprefix("next_"): read(found[name], path, name, slice(-1, None)) for name in after}
    return Episode(str(path), demo, values, {name: rows[0] for name, rows in final.items() if len(rows)})


def _left_out(path: Path, columns: Columns) -> list[tuple[str, str]]:
    with opened(path) as file:
        data = file["data"]
        assert isinstance(data, h5py.Group), path  # or it would not have been read
        found = {}
        for name in data:
            with suppress(*DAMAGED, *BROKEN):  # that one was left out
                if isinstance(group := data[name], h5py.Group) and (found := arrays(group)):
                    break
    if "states" not in found or "states" in matching(columns.observations or (), found):
        return []
    return [("states", "the simulator's own state; columns.observations=[states] takes it")]


FORMAT = Format(
    "robomimic",
    _recognises,
    _read,
    Columns(
        observations=("obs/*|states",),
        actions=("actions",),
        rewards=("rewards",),
        terminations=("dones",),
        success=("success",),
    ),
    left_out=_left_out,
    ends_inside=True,
)
