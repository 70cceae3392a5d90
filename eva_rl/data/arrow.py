"""Episodes of Minari's Arrow and Parquet storage, whole.

Minari 0.5.4 takes each batch of rows that pyarrow hands out to be an episode, but such a batch has 32,768 rows at most.
Minari also can't read infos of one number a step. Here a folder is an episode, whatever its batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import minari
import numpy as np

from eva_rl.data.collection import EXPERT_ACTION
from eva_rl.spaces import SUCCESS


def arrow_episodes(dataset: minari.MinariDataset, count: int) -> Iterator[minari.EpisodeData]:
    """The first episodes, one after the other, with only those infos that are used here."""
    import pyarrow.dataset
    from minari.dataset._storages.arrow_storage import _decode_space

    storage = dataset.storage
    for number in range(count):
        folder = f"{storage.data_path}/{number}"
        files = pyarrow.dataset.dataset(folder, format=storage.FORMAT, ignore_prefixes=["_", ".", "metadata.json"])
        table = files.to_table().combine_chunks()
        columns = {name: table.column(name).chunk(0) for name in table.column_names if table.num_rows}
        decoded = {
            name: _decode_space(space, columns[name][:end], jpeg_encoding=storage.jpeg_encoding)
            for name, space, end in (
                ("observations", dataset.observation_space, None),
                ("actions", dataset.action_space, -1),  # a row for the last observation too
            )
        }
        flags = {name: np.asarray(columns[name])[:-1] for name in ("rewards", "terminations", "truncations")}
        yield minari.EpisodeData(id=number, infos=_infos(columns.get("infos")), **decoded, **flags)


def _infos(column: Any) -> dict[str, np.ndarray]:
    if column is None:
        return {}
    found = {}
    for name in {field.name for field in column.type} & {*SUCCESS, EXPERT_ACTION}:
        values = column.field(name).to_numpy(zero_copy_only=False)
        found[name] = np.stack(values) if values.dtype == object and isinstance(values[0], np.ndarray) else values
        if name in SUCCESS and found[name].ndim == 2 and found[name].shape[1] == 1:
            found[name] = found[name][:, 0]
    return found
