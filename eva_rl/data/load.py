"""A task's name -> its trajectories: from Minari's local root, from its servers, or from the task's expert."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import minari
import numpy as np

from eva_rl.data.arrow import arrow_episodes
from eva_rl.data.collection import EXPERT_ACTION, datasets_root
from eva_rl.data.metadata import UNREADABLE, metadata_of, open_dataset, unreadable
from eva_rl.data.on_disk import pack_on_disk
from eva_rl.data.trajectories import Trajectories, pack
from eva_rl.errors import UserError
from eva_rl.prepared import Exact, members_of, prepared
from eva_rl.spaces import action_choices, dtype_of, parts_of, spaces_to_text, successes_in

IN_MEMORY = 256 * 2**20
"""Bytes of a task's observations that are read into memory."""


def load_dataset(
    dataset_id: str, task: str, demonstrations: int | None = None, expert_labels: bool = False
) -> Trajectories:
    """The episodes of the Minari dataset `dataset_id`, packed.

    The dataset is downloaded first if it is not in the local root. If `demonstrations` is given, only the first
    `demonstrations` episodes are taken. If their observations take more than `IN_MEMORY` bytes, the episodes are packed
    on disk, once, and mapped into memory. The words of texts are numbered as these episodes have them, and large
    pictures are reduced (see `eva_rl.prepared`).

    expert_labels: predict what the expert would have done without the noise, where the dataset says.

    Raises:
        UserError: if it is neither here nor to be had, is damaged, or has spaces that no model here can take.
    """
    dataset = open_dataset(dataset_id)
    spaces = dataset.observation_space, dataset.action_space
    if not dataset.total_episodes:
        raise UserError(f"The dataset '{dataset_id}' holds no episodes.")
    count = dataset.total_episodes if demonstrations is None else demonstrations
    if not 1 <= count <= dataset.total_episodes:
        raise UserError(
            f"demonstrations={count} was given, but the dataset '{dataset_id}' holds {dataset.total_episodes} episodes."
        )
    shown = partial(_episodes, dataset, dataset_id, count, False)
    spaces = prepared(spaces[0], lambda: (episode["observations"] for episode in shown())), spaces[1]
    if any(isinstance(member, Exact) for member in members_of(spaces[0])):
        warnings.warn(
            f"The observations of '{task}' hold numbers such as seconds since 1970. A policy meets later ones than it learned from: subtract "
            "their first value, or leave them out.",
            stacklevel=2,
        )
    try:
        parts = parts_of(spaces[0])
        action_choices(spaces[1])
    except UserError as error:
        raise UserError(f"The dataset '{dataset_id}' can't be used: {error}") from error
    row = sum(part.size for part in parts) * np.dtype(dtype_of(parts)).itemsize
    episodes = _episodes(dataset, dataset_id, count, expert_labels)
    if row * dataset.total_steps * count / dataset.total_episodes <= IN_MEMORY:
        return pack(task, episodes, *spaces)
    data = datasets_root() / dataset_id / "data"
    kind = "-expert" if expert_labels else ""
    stamp = {
        "episodes": count,
        "spaces": spaces_to_text(*spaces),
        **{f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(data.iterdir())},
    }
    return pack_on_disk(datasets_root() / ".packed" / f"{dataset_id}-{count}{kind}", stamp, task, episodes, *spaces)


def _episodes(
    dataset: minari.MinariDataset, dataset_id: str, count: int, expert_labels: bool
) -> Iterator[dict[str, Any]]:
    """The first episodes, one after the other, as `pack` takes them."""
    try:
        stated = [about.get("total_steps") for about in dataset.storage.get_episode_metadata(range(count))]
        found = steps = 0
        arrow = dataset.storage.FORMAT in ("arrow", "parquet")
        episodes = arrow_episodes(dataset, count) if arrow else dataset.iterate_episodes(range(count))
        for number, episode in enumerate(episodes):
            found, steps = found + 1, steps + len(episode.rewards)
            _check_length(dataset_id, dataset, number, len(episode.rewards), stated[number])
            yield {
                "observations": episode.observations,
                "actions": episode.actions,
                "rewards": episode.rewards,
                "success": successes_in(episode.infos),
                "labels": _labels(episode) if expert_labels else None,
            }
        if found != count:
            raise ValueError(f"{found} episodes were read where {count} were expected")
        if steps > dataset.total_steps or (count == dataset.total_episodes and steps != dataset.total_steps):
            raise ValueError(f"its episodes have {steps} steps, but its metadata.json states {dataset.total_steps}")
    except UNREADABLE as error:
        raise unreadable(dataset_id, error) from error


def _check_length(dataset_id: str, dataset: minari.MinariDataset, number: int, length: int, stated: int | None) -> None:
    """Raise a `UserError` unless an episode is as long as the dataset states."""
    if stated is not None and length != stated:
        raise UserError(
            f"The dataset '{dataset_id}' states {stated} steps for episode {number}, but {length} were read from its "
            f"{dataset.storage.FORMAT} files: write it again with data_format='hdf5'."
        )


def _labels(episode: minari.EpisodeData) -> np.ndarray | None:
    """What the expert would have done in each step (T, ...), or None where the episode does not say."""
    intended = (episode.infos or {}).get(EXPERT_ACTION)
    return None if intended is None else np.asarray(intended)[: len(episode.rewards)]


def score_scale_of(dataset_id: str) -> tuple[float, float] | None:
    """Minari's reference returns (random, expert) of the dataset's environment, if the dataset states them.

    None, and a warning, where nothing can be measured by them: they are equal, or no finite numbers.
    """
    metadata = metadata_of(dataset_id)
    lowest, highest = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if lowest is None or highest is None:
        return None
    try:
        low, high = float(lowest), float(highest)
    except (TypeError, ValueError):
        low = high = math.nan
    if math.isfinite(low) and math.isfinite(high) and low != high:
        return low, high
    warnings.warn(
        f"The dataset '{dataset_id}' states the reference scores {lowest} (random) and {highest} (expert), where two different "
        "numbers were expected: there are no normalized scores.",
        stacklevel=2,
    )
    return None
