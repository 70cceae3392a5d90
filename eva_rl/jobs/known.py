"""A library of adapters and a new task's demonstrations -> the start that is the nearest adapter, if that is a better one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from eva_rl.adapter import attach, starts
from eva_rl.adapter.attach import WEIGHTS
from eva_rl.adapter.combine import start_from
from eva_rl.adapter.factors import PREFIX
from eva_rl.errors import UserError
from eva_rl.library.index import INDEX, Library

if TYPE_CHECKING:
    from eva_rl.batch import Batch
    from eva_rl.data import Trajectories
    from eva_rl.model.action_model import ActionModel
    from eva_rl.settings import FinetuneConfig

BATCHES = 4
"""Batches of the demonstrations that the two starts are compared on."""


def check_library(config: FinetuneConfig) -> None:
    """Raise a `UserError` if `start_from` names no library, or the method can't begin as an adapter of one."""
    if config.start_from is None:
        return
    method = config.adapter
    if not method.is_lora or (method.config or {}).get("use_dora"):
        raise UserError(
            f"start_from={config.start_from} needs LoRA's two factors and nothing beside them, and adapter={method.name} has others: "
            "take adapter=lora, eva or another one of that form."
        )
    if not (Path(config.start_from) / INDEX).is_file():
        raise UserError(
            f"start_from={config.start_from} must be a library, and there is no {INDEX} in it: `python -m eva_rl.library add` makes one."
        )


@torch.no_grad()
def known_start(
    library: Library,
    model: ActionModel,
    interface: str,
    trajectories: Trajectories,
    batches: Sequence[Batch],
    peft_config: Any,
    otherwise: starts.Start | None,
) -> starts.Start | None:
    """The start that is the nearest adapter of the library, or `otherwise`: that of the lower loss on these batches.

    Where it is the adapter's, the model's task vector becomes the adapter's too. Other starts leave the base's function as it is, so
    that the base's own loss is theirs.

    Raises:
        UserError: if no adapter of the library has a sketch, or they belong to another base or interface.
    """
    nearest = library.which(trajectories).matches[0]
    folder = library.path(nearest.name)
    start = start_from([folder], [1.0])
    trial = copy.deepcopy(model).eval()
    vector = load_file(folder / WEIGHTS).get(f"{PREFIX}embedders.{interface}.task.weight")
    before = _loss(trial, batches)
    if vector is not None:
        trial.embedder_of(interface).task.weight.copy_(vector)
    attach(trial, peft_config, start=start)
    after = _loss(trial, batches)
    told = f"the library's nearest adapter is {nearest.name}: loss {after:.4f}, the base's {before:.4f}"
    if not after < before:
        print(f"{told}, so that the adapter begins as it does without a library")
        return otherwise
    if vector is not None:
        model.embedder_of(interface).task.weight.copy_(vector)
    print(f"{told}, so that the new adapter begins as that one")
    return start


def _loss(model: ActionModel, batches: Sequence[Batch]) -> float:
    return sum(model.loss(batch).item() for batch in batches) / len(batches)
