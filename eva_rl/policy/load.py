"""A run's folder, a checkpoint or a repository -> its model, its task, and a policy that acts there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import gymnasium as gym

from eva_rl.errors import UserError, did_you_mean
from eva_rl.interface import Interface, TaskStatistics, interface_name
from eva_rl.model import NOTES, find_base, load_base, load_base_of, load_notes
from eva_rl.model.action_model import ActionModel
from eva_rl.policy.acting import ActingPolicy
from eva_rl.prepared import prepared_as
from eva_rl.spaces import action_choices, action_parts, parts_of, spaces_from_text
from eva_rl.table import counted


@dataclass(frozen=True)
class Trained:
    """A model, and the task it is to act in."""

    model: ActionModel
    task: str
    interface: Interface
    statistics: TaskStatistics | None
    """None where the model was not trained on the task."""
    folder: Path


def load_policy(
    path: str | Path,
    task: str | None = None,
    *,
    base: str | None = None,
    device: str = "cpu",
    observation_space: gym.Space | None = None,
    action_space: gym.Space | None = None,
) -> ActingPolicy:
    """A policy that acts in your own loop, in float32.

    Args:
        path: a run's folder, an adapter's, a checkpoint such as `python -m eva_rl.merge` writes, the name of a shipped one, or
            a Hugging Face repository of an adapter or a checkpoint. Checkpoints need neither peft nor Hydra nor a simulator.
        task: such as `metaworld/push-v3`. By default, this is the one that the run or checkpoint was fine-tuned on.
        base: where an adapter's base is now, if it was moved.
        device: `cpu`, `cuda` or `auto`.
        observation_space, action_space: the environment's, where the checkpoint does not know them, as older ones do not.

    Raises:
        UserError: if there is nothing to load, it knows nothing of the task, or the spaces are unknown or others.
    """
    from eva_rl.training import choose_device

    trained, where = find_trained(path, task, base), choose_device(device)
    spaces = _spaces(trained, observation_space, action_space)
    model = trained.model.to(where).requires_grad_(False)
    return ActingPolicy(model, trained.interface, trained.task, spaces, trained.statistics, where)


def find_trained(path: str | Path, task: str | None = None, base: str | None = None) -> Trained:
    """What `load_policy` acts with (see there).

    Raises:
        UserError: see there.
    """
    folder = find_folder(path)
    if (folder / NOTES).is_file():
        from eva_rl.adapter import load_adapter

        notes = load_notes(folder)
        found = load_base_of(folder, notes, "base", base)
        found.transformer.connect(notes.interface, f"The adapter in '{folder}'")
        model = cast("ActionModel", load_adapter(found.transformer, folder))
        own, own_name = notes.task, notes.interface.name
        known = found.tasks | {own: notes.statistics}
    else:
        found = load_base(str(folder))
        model, own, known, own_name = found.model, found.task, found.tasks, None
    task = task or own or (next(iter(known)) if len(known) == 1 else None)
    if task is None:
        such = f", such as task='{min(known)}'" if known else ""
        raise UserError(f"'{path}' knows {counted(len(known), 'task')}: say in which of them to act{such}.")
    name = own_name if task == own else None
    name = name or _interface_of(task, model, task in known or task == own)
    if name not in model.interfaces:
        hint = did_you_mean(task, known)
        raise UserError(f"'{path}' can't act in '{task}', of whose observations it knows nothing. {hint}".rstrip())
    number = model.interfaces[name].number_of(task)
    if task != own and number >= 0:  # a fine-tuned model has its task's vector in force
        model.embedder_of(name).begin_task(number)
    return Trained(model.eval(), task, model.interfaces[name], known.get(task), folder)


def find_folder(path: str | Path) -> Path:
    """The folder that this path, name or repository stands for, or that of the adapter or model within a run's folder.

    Raises:
        UserError: if there is none.
    """
    try:
        folder = find_base(str(path))
    except UserError as error:  # a base is not all that this may name
        raise UserError(str(error).replace("There is no base ", "There is no run, checkpoint or base ", 1)) from error
    if (folder / "adapter" / NOTES).is_file():
        return folder / "adapter"
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return folder / "model"
    return folder


def _interface_of(task: str, model: ActionModel, known: bool) -> str:
    """The name of the task's interface.

    A model with a single interface has no other for the tasks that it knows.

    Raises:
        UserError: if there is no such task.
    """
    if len(model.interfaces) == 1 and known:
        return next(iter(model.interfaces))
    if task.startswith("minari/"):
        return interface_name(task.removeprefix("minari/"))
    from eva_rl.envs import find_task

    domain, name = find_task(task)
    return domain.interface(name)


def _spaces(
    trained: Trained, observation_space: gym.Space | None, action_space: gym.Space | None
) -> tuple[gym.Space, gym.Space]:
    """The environment's spaces: those given, or else those that the checkpoint knows."""
    text, name = trained.interface.spaces, trained.interface.name
    if text:
        try:
            known, known_actions = spaces_from_text(text)
        except ValueError as error:
            raise UserError(f"'{trained.folder}' is damaged: its interface '{name}' has {error}.") from error
        observation_space = known if observation_space is None else prepared_as(observation_space, known)
        action_space = known_actions if action_space is None else action_space
    if observation_space is None or action_space is None:
        raise UserError(
            f"'{trained.folder}' is older than the spaces in checkpoints, and does not know those of its interface '{name}': give "
            "observation_space=env.observation_space and action_space=env.action_space."
        )
    found = parts_of(observation_space), action_choices(action_space), action_parts(action_space)
    if found != (trained.interface.parts, trained.interface.choices, trained.interface.action_parts):
        raise UserError(
            f"The spaces {observation_space} and {action_space} are not those of the interface '{name}', which has "
            f"{trained.interface.in_words}."
        )
    return observation_space, action_space
