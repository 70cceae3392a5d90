"""The state of a training run as safetensors: written whole or not at all, resumed from the newest."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_rl.errors import UserError
from eva_rl.files import replacing

KEPT = 2
"""Checkpoints kept: the newest, and one before it should the newest be damaged."""


@dataclass(frozen=True)
class TrainingState:
    """The live objects of a training run that a checkpoint writes from and reads into."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]


def check_run(steps: int, folder: Path, resume: bool) -> None:
    """Raise a `UserError` for negative steps, or a folder whose checkpoints a run without `resume` would overwrite.

    Entry points call it before they write or compute anything; `train` calls it again.
    """
    if steps < 0:
        raise UserError(f"steps={steps} was given where at least 0 was expected.")
    if not resume and any(folder.glob("step-*")):
        raise UserError(f"'{folder}' holds the checkpoints of an earlier run: set resume=true, or another run_dir.")


def save(folder: Path, state: TrainingState, losses: Tensor) -> Path:
    """Write `folder/step-N.safetensors`, N being the number of losses; drop all but the newest checkpoints."""
    tensors = {f"parameter.{name}": p.detach() for name, p in state.parameters.items()}
    for name, p in state.parameters.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.optimizer.state[p].items()}
    tensors |= {"losses": losses, "rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    path = folder / f"step-{len(losses):08d}.safetensors"
    with replacing(path) as temporary:
        save_file(
            {name: value.cpu().contiguous() for name, value in tensors.items()},
            temporary,
            metadata={"settings": json.dumps(state.settings)},
        )
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def load_newest(folder: Path, state: TrainingState) -> Tensor:
    """Read the newest whole checkpoint into `state`, and return the losses so far (steps,); empty where there is none.

    Raises:
        UserError: if the checkpoint was written by a run with other settings or another model.
    """
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
                settings = json.loads(file.metadata()["settings"])
                losses = tensors["losses"]
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            warnings.warn(f"The checkpoint '{path}' is damaged ({error}) and passed over.", stacklevel=2)
            continue
        changed = [k for k in state.settings if settings.get(k) != state.settings[k]]
        if changed:
            was = ", ".join(f"{k}={settings.get(k)}" for k in changed)
            raise UserError(
                f"'{folder}' was trained with {was}: resume with the same settings, or set another run_dir."
            )
        restore(tensors, state, path)
        return losses
    return torch.zeros(0)


def restore(tensors: Mapping[str, Tensor], state: TrainingState, path: Path) -> None:
    """Copy weights, optimiser state and random states from a checkpoint's tensors."""
    saved = {name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")}
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in state.parameters.items()}:
        raise UserError(f"The checkpoint '{path}' holds the weights of another model: set another run_dir.")
    with torch.no_grad():
        for name, p in state.parameters.items():
            p.copy_(saved[name])
            prefix = f"optimizer.{name}."
            state.optimizer.state[p] = {
                key.removeprefix(prefix): value.to(p.device) for key, value in tensors.items() if key.startswith(prefix)
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
