"""Episodes -> a Minari dataset that appears whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gymnasium as gym
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path

from eva_rl.data.collection import datasets_root, write_whole
from eva_rl.data.metadata import datasets_below
from eva_rl.errors import UserError


def check_new_id(dataset_id: str, overwrite: bool = False) -> None:
    """Check that a dataset can be written under this id.

    Raises:
        UserError: if it is no id of Minari's, if a dataset of that id is there and is not to be overwritten, or if its
            folder holds anything but one dataset.
    """
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id):
        raise UserError(
            f"dataset must be an id such as mine/name-v0, got {dataset_id}: letters, digits, - and _, and a version."
        )
    if re.fullmatch(r"[\w-]/[^/]+", dataset_id):
        raise UserError(
            f"dataset must be an id such as mine/name-v0, got {dataset_id}: Minari wants two letters or more before the slash."
        )
    path = datasets_root() / dataset_id
    if below := datasets_below(dataset_id):
        raise UserError(
            f"dataset={dataset_id} was given, but {path} holds other datasets, such as {below[0]}: name another, such as "
            f"{dataset_id.rpartition('/')[0] or 'mine'}/name-v0."
        )
    if path.exists() and not (path / "data").is_dir():
        raise UserError(f"dataset={dataset_id} was given, but {path} is there and is no dataset: name another.")
    if path.exists() and not overwrite:
        raise UserError(
            f"The dataset '{dataset_id}' is there, in {get_dataset_path(dataset_id)}: set overwrite=true, or name another."
        )


def write_dataset(
    dataset_id: str,
    episodes: Iterable[Mapping[str, Any]],
    observation_space: gym.Space,
    action_space: gym.Space,
    description: str,
    environment: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write episodes one at a time, each given as the fields of Minari's `EpisodeBuffer`.

    Pictures are kept as they are, not as JPEG.

    Raises:
        UserError: as in `check_new_id`, or if there is no space left.
    """
    check_new_id(dataset_id, overwrite)
    write_whole(
        dataset_id,
        _buffers(episodes),
        {},
        env=environment,
        eval_env=environment,
        observation_space=observation_space,
        action_space=action_space,
        algorithm_name="converted",
        description=description,
        jpeg_encoding=False,
    )


def _buffers(episodes: Iterable[Mapping[str, Any]]) -> Iterator[EpisodeBuffer]:
    for number, fields in enumerate(episodes):
        yield EpisodeBuffer(id=number, **fields)
