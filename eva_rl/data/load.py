"""A task's name -> its trajectories: from Minari's local root, from its servers, or from the task's expert."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from minari.storage.datasets_root_dir import get_dataset_path

from eva_rl.data.collection import EXPERT_ACTION, datasets_root
from eva_rl.data.on_disk import pack_on_disk
from eva_rl.data.trajectories import Trajectories, pack
from eva_rl.errors import UserError, did_you_mean, in_one_line
from eva_rl.spaces import action_choices, dtype_of, parts_of

UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError)
"""What h5py and Minari raise for damaged files."""
IN_MEMORY = 256 * 2**20
"""Bytes of a task's observations that are read into memory."""


def load_dataset(
    dataset_id: str, task: str, demonstrations: int | None = None, expert_labels: bool = False
) -> Trajectories:
    """The episodes of the Minari dataset `dataset_id`, packed; downloaded first if it is not in the local root.

    Only the first `demonstrations` of them, where that is given. Those whose observations take more than `IN_MEMORY` bytes
    are packed on disk, once, and mapped into memory.

    expert_labels: what is to be predicted is what the expert would have done without the noise, where the dataset says.

    Raises:
        UserError: if it is neither here nor to be had, is damaged, or has spaces that no model here can take.
    """
    dataset = _open(dataset_id)
    spaces = dataset.observation_space, dataset.action_space
    count = dataset.total_episodes if demonstrations is None else demonstrations
    if not 1 <= count <= dataset.total_episodes:
        raise UserError(
            f"demonstrations={count} was given, but the dataset '{dataset_id}' holds {dataset.total_episodes} episodes."
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
    stamp = {"episodes": count, **{f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(data.iterdir())}}
    return pack_on_disk(datasets_root() / ".packed" / f"{dataset_id}-{count}{kind}", stamp, task, episodes, *spaces)


def _episodes(
    dataset: minari.MinariDataset, dataset_id: str, count: int, expert_labels: bool
) -> Iterator[dict[str, Any]]:
    """The first episodes, one after the other, as `pack` takes them."""
    try:
        for episode in dataset.iterate_episodes(range(count)):
            yield {
                "observations": episode.observations,
                "actions": episode.actions,
                "rewards": episode.rewards,
                "success": (episode.infos or {}).get("success"),
                "labels": _labels(episode) if expert_labels else None,
            }
    except UNREADABLE as error:
        raise _damaged(dataset_id, error) from error


def _labels(episode: minari.EpisodeData) -> np.ndarray | None:
    """What the expert would have done in each step (T, ...); None where the episode does not say."""
    intended = (episode.infos or {}).get(EXPERT_ACTION)
    return None if intended is None else np.asarray(intended)[: len(episode.rewards)]


def environment_of(dataset_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment that the dataset says it is to be evaluated in.

    Raises:
        UserError: if the dataset names none, or it can't be made here.
    """
    dataset = _open(dataset_id)
    specs = [dataset.storage.metadata.get(kind) for kind in ("eval_env_spec", "env_spec")]
    if not any(specs):
        raise UserError(
            f"The dataset '{dataset_id}' names no environment: set episodes=0 to fine-tune without rollouts."
        )
    try:
        return dataset.recover_environment(eval_env=True, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.Error, ImportError) as error:
        needed = dataset.storage.metadata.get("requirements") or ["what its page names"]
        raise UserError(
            f"The environment '{json.loads(specs[0] or specs[1])['id']}' of the dataset '{dataset_id}' can't be made ({error}): install "
            f"{', '.join(needed)}, or set episodes=0 to fine-tune without rollouts."
        ) from error


def score_scale_of(dataset_id: str) -> tuple[float, float] | None:
    """Minari's reference returns (random, expert) of the dataset's environment, if the dataset states them.

    None, and a warning, where nothing can be measured by them: they are equal, or no finite numbers.
    """
    metadata = _open(dataset_id).storage.metadata
    scale = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in scale:
        return None
    try:
        low, high = map(float, scale)
    except (TypeError, ValueError):
        low = high = math.nan
    if math.isfinite(low) and math.isfinite(high) and low != high:
        return low, high
    warnings.warn(
        f"The dataset '{dataset_id}' states the reference scores {scale[0]} (random) and {scale[1]} (expert), where two different "
        "numbers were expected: there are no normalized scores.",
        stacklevel=2,
    )
    return None


def _open(dataset_id: str) -> minari.MinariDataset:
    path = datasets_root() / dataset_id
    if not (path / "data").is_dir():
        _download(dataset_id)
    try:
        return minari.load_dataset(dataset_id)
    except UNREADABLE as error:
        raise _damaged(dataset_id, error) from error


def _damaged(dataset_id: str, error: Exception) -> UserError:
    path = get_dataset_path(dataset_id)
    return UserError(
        f"The dataset '{dataset_id}' in {path} can't be read ({in_one_line(error)}): delete that folder, and "
        "it will be collected or downloaded again."
    )


def _download(dataset_id: str) -> None:
    local = _local_datasets()
    hint = did_you_mean(dataset_id, local) if local else "There are no local datasets."
    path = get_dataset_path(dataset_id)
    try:
        minari.download_dataset(dataset_id)
    except KeyboardInterrupt:  # Minari writes into the datasets' root, and takes half a dataset for a whole one
        shutil.rmtree(path, ignore_errors=True)
        raise
    except (ValueError, TypeError) as error:  # Minari's servers answered
        raise UserError(
            f"The dataset '{dataset_id}' is not local, and Minari can't download it ({in_one_line(error)}). {hint}".rstrip()
        ) from error
    except Exception as error:
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"The dataset '{dataset_id}' is not in {get_dataset_path()}, and Minari's servers can't be reached "
            f"({type(error).__name__}): connect to the internet, or name a local dataset. {hint}".rstrip()
        ) from error


def _local_datasets() -> Sequence[str]:
    try:
        return list(minari.list_local_datasets())
    except (ValueError, TypeError):  # a folder of another kind among the datasets
        return []
