"""A library of adapters and a new task's demonstrations -> the start that is the nearest adapter, if that is a better one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from eva_rl.adapter import attach, starts
from eva_rl.adapter.attach import WEIGHTS
from eva_rl.adapter.combine import start_from
from eva_rl.adapter.factors import PREFIX, plain_lora
from eva_rl.errors import UserError, in_one_line
from eva_rl.files import from_json, make_folder, read_json, write_json
from eva_rl.library.index import INDEX, Library
from eva_rl.model.nearest import task_vector

if TYPE_CHECKING:
    from eva_rl.batch import Batch
    from eva_rl.data import Trajectories
    from eva_rl.model.action_model import ActionModel
    from eva_rl.settings import FinetuneConfig

BATCHES = 4
"""Batches of the demonstrations that the two starts are compared on."""


CHOICE = "start.json"
"""The file of a run's folder that says which adapter it began as: a run that is resumed began as it did."""


def check_library(config: FinetuneConfig) -> None:
    """Raise a `UserError` if `start_from` names no library, or the method can't begin as an adapter of one."""
    if config.start_from is None:
        return
    method, settings = config.adapter, config.adapter.config or {}
    if not method.is_lora or settings.get("use_dora") or settings.get("init_lora_weights") == "mica":
        raise UserError(
            f"start_from={config.start_from} needs LoRA's two factors, both trained, and nothing beside them, and adapter={method.name} is "
            "otherwise: take adapter=lora, eva or another one of that form."
        )
    if config.allocator.name != "none":
        raise UserError(
            f"start_from={config.start_from} begins with an adapter's ranks, and allocator={config.allocator.name} decides them itself: leave "
            "one of them out."
        )
    if not (Path(config.start_from) / INDEX).is_file():
        raise UserError(
            f"start_from={config.start_from} must be a library, and there is no {INDEX} in it: `python -m eva_rl.library add` makes one."
        )


def known_start(
    library: Library,
    run: Path,
    model: ActionModel,
    trajectories: Trajectories,
    batches: Sequence[Batch],
    peft_config: Any,
    otherwise: starts.Start | None,
    resume: bool = False,
) -> starts.Start | None:
    """The start that is the nearest adapter of the library, or `otherwise`: that of the lower loss on these batches.

    Where it is the adapter's, the model's task vector becomes the adapter's too. What is chosen stands in the run's folder.

    Args:
        resume: take what stands there, if it is of this library.

    Raises:
        UserError: if no adapter of the library has a sketch, they belong to another base or interface, or the one chosen is gone.
    """
    interface, file = batches[0].interface, run / CHOICE
    choice = _choice_in(file) if resume and file.is_file() else None
    if choice is None or choice.library != str(library.folder):
        name = _nearest(library, model, interface, trajectories, batches, peft_config)
        choice = Choice(str(library.folder), name)
        write_json(make_folder(run) / CHOICE, asdict(choice))
    name = choice.adapter
    if name is None:
        return otherwise
    _take_vector(model, interface, library.path(name))
    return start_from([library.path(name)], [1.0])


@dataclass(frozen=True)
class Choice:
    """What a run began as."""

    library: str
    adapter: str | None
    """None: as without a library."""


def _choice_in(file: Path) -> Choice:
    try:
        return from_json(Choice, read_json(file))
    except TypeError as error:
        raise UserError(f"'{file}' is damaged ({in_one_line(error)}): remove the run's folder.") from error


def _nearest(
    library: Library,
    model: ActionModel,
    interface: str,
    trajectories: Trajectories,
    batches: Sequence[Batch],
    peft_config: Any,
) -> str | None:
    """The nearest adapter's name, if its loss is lower than the base's."""
    matches = library.which(trajectories, interface=interface).matches
    name = next((own.name for own in matches if plain_lora(library.path(own.name))), None)
    if name is None:
        print("the library holds no plain LoRA: the adapter begins as it does without a library")
        return None
    trial, device = copy.deepcopy(model).eval(), next(model.parameters()).device
    before = _loss(trial, batches)
    _take_vector(trial, interface, library.path(name))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what begins without it begins as ever
        attach(trial, peft_config, start=start_from([library.path(name)], [1.0]))
    after = _loss(trial.eval(), batches)
    told = f"the library's nearest adapter is {name}: loss {after:.4f}, the base's {before:.4f}"
    print(f"{told}, so that the new adapter begins as {'that one' if after < before else 'it does without a library'}")
    return name if after < before else None


@torch.no_grad()
def _take_vector(model: ActionModel, interface: str, folder: Path) -> None:
    """Put the adapter's task vector in force, if it has one."""
    for module in task_vector(model, interface):
        vector = load_file(folder / WEIGHTS).get(f"{PREFIX}{module}.weight")
        if vector is not None:
            model.get_parameter(f"{module}.weight").copy_(vector)


@torch.no_grad()
def _loss(model: ActionModel, batches: Sequence[Batch]) -> float:
    return sum(model.loss(batch).item() for batch in batches) / len(batches)
