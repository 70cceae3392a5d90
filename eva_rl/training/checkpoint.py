"""The state of a training run as safetensors: written whole or not at all, resumed from the newest."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_rl.errors import UserError, in_one_line
from eva_rl.files import from_json, replacing
from eva_rl.training.optimizers.state import pack, unpack

BASE = "base_sha256"
"""Of a run's identity: the weights that it adapts, by their hash."""
SUM = "sha256"
"""Of a checkpoint's metadata: the checksum of all else that it holds."""
FORMAT = "eva_rl.training_state.2"
"""Of checkpoints that have a checksum."""
KEPT = 2
"""Checkpoints kept: the newest, and one before it should the newest be damaged."""


class Companion(Protocol):
    """What takes part in training besides the loss, such as a method that prunes ranks as it goes."""

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, with the optimiser that is to make the steps."""

    def penalty(self) -> Tensor:
        """A scalar added to every batch's loss."""
        ...

    def after_step(self, step: int) -> None:
        """Called after optimiser step number `step`, counted from 1, before gradients are dropped."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs of it."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


@dataclass(frozen=True)
class TrainingState:
    """The live objects of a training run that a checkpoint writes from and reads into."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    companion: Companion | None
    frozen: Mapping[str, Tensor]
    """What the run's start decided and training does not change."""
    identity: Mapping[str, Any]
    """What must be the same for one run to continue another, such as its steps, task and seed."""


def check_run(steps: int, folder: Path, resume: bool, identity: Mapping[str, Any] | None = None) -> None:
    """Refuse what could not be trained.

    Entry points call this before they write or compute anything.

    Raises:
        UserError: for negative steps, a folder whose checkpoints a run without `resume` would overwrite, or one whose
            checkpoints were written by a run of another `identity`.
    """
    if steps < 0:
        raise UserError(f"steps must be at least 0, got {steps}.")
    found = sorted(folder.glob("step-*.safetensors"))
    if found and not resume:
        raise UserError(f"'{folder}' holds the checkpoints of an earlier run: set resume=true, or another run_dir.")
    if identity is None:
        return
    now = json.loads(json.dumps({"steps": steps, **identity}, allow_nan=False))  # as it reads when it was written
    for path in found:
        try:
            with safe_open(path, "pt") as file:
                before = from_json(dict[str, Any], json.loads((file.metadata() or {}).get("identity", "null")) or now)
            if changed := list(_changes(before, now)):
                _read(path)  # or is it damage that changed them?
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            continue  # damaged: `load_newest` passes it over, with a warning
        if changed:
            raise UserError(
                f"'{folder}' was trained with {', '.join(changed[:4])}: resume with the same settings, or set another run_dir."
            )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """What differs between nested settings, by their names on the command line."""
    for key in sorted(before.keys() | now.keys()):
        was, is_ = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            yield from _changes(was, is_, f"{section}{key}.")
        elif was != is_ and not (key == BASE and None in (was, is_)):  # former versions' states don't say which weights
            yield f"{section}{key}={was} (now {is_})"


def save(folder: Path, state: TrainingState, losses: Tensor, seconds: float) -> Path:
    """Write `folder/step-N.safetensors`, where N is the number of losses, and drop all but the newest checkpoints."""
    tensors = {f"parameter.{name}": p.detach() for name, p in state.parameters.items()}
    own, rest = pack(state.optimizer, state.parameters)
    tensors |= {f"optimizer.{name}": value for name, value in own.items()}
    tensors |= {f"frozen.{name}": value for name, value in state.frozen.items()}
    if state.companion is not None:
        tensors |= {f"companion.{key}": value for key, value in state.companion.state_dict().items()}
    tensors |= {"losses": losses, "rng.cpu": torch.get_rng_state()}
    if (device := _cuda_device(state.parameters)) is not None:
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    path = folder / f"step-{len(losses):08d}.safetensors"
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = {
        "identity": json.dumps(state.identity, allow_nan=False),
        "optimizer": json.dumps(rest, allow_nan=False),
        "seconds": str(seconds),
        "format": FORMAT,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**about, SUM: _checksum(tensors, about)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors and metadata.

    Raises:
        ValueError: if they are not what its checksum was made of. Those of former versions have none.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        about = file.metadata() or {}
    checksum = about.pop(SUM, None)
    if checksum != (_checksum(tensors, about) if checksum or FORMAT in about.values() else None):
        raise ValueError("its content is not what its checksum was made of")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """The SHA-256 of a checkpoint's names, kinds, shapes, numbers and metadata."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_newest(folder: Path, state: TrainingState) -> tuple[Tensor, float]:
    """Read the newest whole checkpoint into `state`.

    Returns:
        The losses (steps,) and the seconds so far, or no losses and 0 where there is no such checkpoint.

    Raises:
        UserError: if the checkpoint holds the weights of another model.
    """
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            tensors, about = _read(path)
            losses, seconds = tensors["losses"], float(about["seconds"])
            rest = json.loads(about.get("optimizer", "null"))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"The checkpoint '{path}' is damaged ({error}) and passed over.", stacklevel=2)
            continue
        try:
            restore(tensors, rest, state, path)
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(
                f"The checkpoint '{path}' is of another version or damaged ({in_one_line(error)}): remove it, or set another run_dir."
            ) from error
        return losses, seconds
    return torch.zeros(0), 0.0


def restore(tensors: Mapping[str, Tensor], rest: Any, state: TrainingState, path: Path) -> None:
    """Copy weights, optimiser state and random states from a checkpoint's tensors.

    Args:
        rest: what else the optimiser's state holds (see `pack`). None: nothing, as in AdamW's state of former versions.
    """
    saved = {name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")}
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in state.parameters.items()}:
        raise UserError(f"The checkpoint '{path}' holds the weights of another model: set another run_dir.")
    if {n.removeprefix("frozen.") for n in tensors if n.startswith("frozen.")} != set(state.frozen):
        raise UserError(f"The checkpoint '{path}' is of a run that began otherwise: set another run_dir.")
    own = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    if rest is None:
        for name, p in state.parameters.items():
            prefix = f"{name}."
            state.optimizer.state[p] = {
                key.removeprefix(prefix): value.to(p.device) for key, value in own.items() if key.startswith(prefix)
            }
    else:
        unpack(state.optimizer, state.parameters, own, rest)
    with torch.no_grad():
        for name, p in state.parameters.items():
            p.copy_(saved[name])
    for name, value in state.frozen.items():
        value.copy_(tensors[f"frozen.{name}"])
    if state.companion is not None:
        device = next(iter(state.parameters.values())).device
        prefix = "companion."
        own = {n.removeprefix(prefix): value.to(device) for n, value in tensors.items() if n.startswith(prefix)}
        state.companion.load_state_dict(own)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and (cuda := _cuda_device(state.parameters)) is not None:
        torch.cuda.set_rng_state(tensors["rng.cuda"], cuda)


def _cuda_device(parameters: Mapping[str, nn.Parameter]) -> torch.device | None:
    """The CUDA device whose generator dropout draws from: the model's, which need not be the current one."""
    device = next(iter(parameters.values())).device
    return device if device.type == "cuda" else None
