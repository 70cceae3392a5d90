"""What a task's name stands for: a domain's task, or a Minari dataset of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np

from eva_rl.data.collection import Recipe, collect
from eva_rl.data.environments import DatasetEnvironment
from eva_rl.data.load import score_scale_of
from eva_rl.envs import expand_tasks, find_task
from eva_rl.errors import UserError
from eva_rl.interface import interface_name
from eva_rl.settings import NOISE

MINARI = "minari/"
DEMONSTRATIONS = 40


@dataclass(frozen=True)
class TaskSource:
    """Where a task's environment, trajectories and score scale come from."""

    task: str
    interface: str
    """The name of the interface its observations and actions go through."""
    dataset_id: str | None
    """The Minari dataset of its trajectories, or None where the task's expert collects one."""
    make_env: Callable[..., gym.Env]
    """Takes a `render_mode`."""
    score_scale: tuple[float, float] | None
    """Episode returns of a random policy and of the expert, the 0 and the 1 of normalised scores."""

    mirror: tuple[np.ndarray, np.ndarray] | None = None
    """The signs of observations and actions in the task's mirror image, where it has one."""

    def dataset(self, demonstrations: int | None, seed: int) -> str:
        """The Minari id of this task's trajectories.

        A domain's task collects them first if they are not there.
        """
        if self.dataset_id is not None:
            return self.dataset_id
        return collect([Recipe(self.task, DEMONSTRATIONS if demonstrations is None else demonstrations, seed=seed)])[0]


def datasets(
    sources: Sequence[TaskSource], demonstrations: int, seed: int, noise: tuple[float, ...] = NOISE
) -> list[str]:
    """The Minari ids of these tasks' trajectories.

    Those that are not there are collected together, with action noise of these scales in turn.
    """
    collected = [Recipe(s.task, demonstrations, noise, seed=seed) for s in sources if s.dataset_id is None]
    ids = iter(collect(collected))
    return [next(ids) if source.dataset_id is None else source.dataset_id for source in sources]


def find_source(task: str, dataset: str | None = None, trust_environment: bool = False) -> TaskSource:
    """The source of a task such as `metaworld/hammer-v3` or `minari/<any dataset id>`.

    `dataset` names the trajectories of a domain's task where they are not to be collected. With `trust_environment`,
    any environment that a dataset names is made.

    Raises:
        UserError: if there is no such task or dataset.
    """
    if task.startswith(MINARI):
        dataset_id = task.removeprefix(MINARI)
        if dataset not in (None, dataset_id):
            raise UserError(f"task={task} names its trajectories itself: leave out dataset={dataset}.")
        scale = score_scale_of(dataset_id)
        make_env = DatasetEnvironment(dataset_id, trust_environment)
        return TaskSource(task, interface_name(dataset_id), dataset_id, make_env, scale)
    domain, name = find_task(task)
    scores = domain.reference_scores(name)
    if dataset is not None:
        score_scale_of(dataset)  # met here, before anything is written, if it is not there
    return TaskSource(
        task=task,
        interface=domain.interface(name),
        dataset_id=dataset,
        make_env=partial(domain.make, name),
        score_scale=(scores.random, scores.expert) if scores else None,
        mirror=domain.mirror(name),
    )


def has_mirror_image(task: str) -> bool:
    """Whether the task's domain knows what it looks like in a mirror.

    Raises:
        UserError: if there is no such task.
    """
    if task.startswith(MINARI):
        return False
    domain, name = find_task(task)
    return domain.mirror(name) is not None


def find_sources(task: str, trust_environment: bool = False) -> list[TaskSource]:
    """The sources of all tasks that `task` stands for, which may be a split."""
    members = (task,) if task.startswith(MINARI) else expand_tasks(task)
    return [find_source(member, trust_environment=trust_environment) for member in members]
