"""A pretrained model as a folder: `model.safetensors`, `config.json`, and a model card for people."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eva_rl.errors import UserError, did_you_mean, in_one_line
from eva_rl.files import check_run_folder, from_json, not_finite, read_json, replacing, write_json
from eva_rl.interface import Interface, TaskStatistics
from eva_rl.model.action_model import ActionModel
from eva_rl.model.cloning import CloningConfig, CloningMLP
from eva_rl.model.decision_transformer import DecisionTransformer, ModelConfig

FORMAT = "eva_rl.decision_transformer.1"
FORMATS = {DecisionTransformer: FORMAT, CloningMLP: "eva_rl.cloning.1"}
FILES = frozenset({"config.json", "model.safetensors", "README.md"})
"""What a model's folder may hold."""
LARGEST = 10**6
"""The largest size that weights are made for, such as the numbers of a vector. Of pixels there may be a hundred times
as many."""
CHECKPOINTS = Path(str(resources.files("eva_rl.checkpoints"))).resolve()


@dataclass(frozen=True)
class Base:
    """A pretrained model, where it came from, and what it was trained on."""

    model: ActionModel
    tasks: dict[str, TaskStatistics]
    path: Path
    sha256: str
    """That of its weights' file, by which an adapter knows its base again."""
    task: str | None = None
    """The task it was fine-tuned on. None for a base of many."""

    @property
    def transformer(self) -> DecisionTransformer:
        """The model, where it is known to be one, as every base of adapters is."""
        assert isinstance(self.model, DecisionTransformer)
        return self.model


def save_base(folder: Path, model: ActionModel, tasks: Mapping[str, TaskStatistics], task: str | None = None) -> None:
    """Write `model` and the statistics it needs to `folder`, atomically, keeping a model card already there.

    task: the one of them that it was fine-tuned on.
    """
    config = {
        "format": FORMATS[type(model)],
        "architecture": asdict(model.config),
        "interfaces": [asdict(interface) for interface in model.interfaces.values()],
        "tasks": {name: asdict(statistics) for name, statistics in tasks.items()},
        **({} if task is None else {"task": task}),
    }
    with replacing(folder) as temporary:
        temporary.mkdir()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", config)
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", temporary / "README.md")


def check_output(folder: Path) -> None:
    """Look, without making it, whether a model can be written as this folder, over an earlier model at most.

    Raises:
        UserError: if something else is there, or files can't be written beside it.
    """
    check_run_folder(folder.absolute().parent, resume=True)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise UserError(f"'{folder}' is there and is no folder: name another one for the model.")
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - FILES)):
        raise UserError(f"'{folder}' holds '{others[0]}', which is no part of a model: name another folder for it.")


def find_base(name: str) -> Path:
    """The folder of a base: of that path, of that name in `checkpoints/`, or on the Hugging Face Hub.

    An installed package brings the default base alone, a checkout all of `checkpoints/`.

    Raises:
        UserError: if there is none of that name, or the Hub can't be reached.
    """
    for folder in (Path(name), CHECKPOINTS / name):
        if folder.is_dir():
            return folder
    shipped = [config.parent.name for config in CHECKPOINTS.glob("*/config.json")]
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"There is no base '{name}': name a folder, a model of {CHECKPOINTS}, or a Hugging Face repository "
            f"(owner/name). {did_you_mean(name, shipped) if shipped else ''}".rstrip()
        )
    return _from_hub(name, "base", did_you_mean(name, shipped) if shipped else "")


def _from_hub(name: str, what: str, hint: str = "") -> Path:
    """The folder into which a Hugging Face repository is downloaded."""
    from huggingface_hub import snapshot_download  # 0.5 s to import

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise UserError(
            f"The {what} '{name}' is neither a folder nor to be had from the Hugging Face Hub ({type(error).__name__}): "
            f"check the name, or connect to the internet. {hint}".rstrip()
        ) from error


def base_name(name: str) -> str:
    """The name by which a base is found from any working folder."""
    if not Path(name).is_dir():
        return name
    folder = Path(name).resolve()
    return folder.name if folder.parent == CHECKPOINTS else str(folder)


def load_base(name: str, device: torch.device | str = "cpu") -> Base:
    """Load a base by name (see `find_base`), in evaluation mode.

    Raises:
        UserError: if it is missing, truncated, or not one of this project's models.
    """
    folder = find_base(name)
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        raise UserError(f"'{folder}' is a run: name its model, '{folder / 'model'}'.")
    if not (folder / "config.json").is_file() and (folder / "adapter").is_dir():
        raise UserError(
            f"'{folder}' is a run with an adapter: `python -m eva_rl.merge run={folder}` makes a model of it."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") not in FORMATS.values():
        raise UserError(
            f"'{folder / 'config.json'}' does not describe a model of format '{FORMAT}': name another base."
        )
    try:
        model, tasks = _described(config, folder)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"'{folder / 'config.json'}' is incomplete or of another version ({in_one_line(error)})."
        ) from error
    _load_weights(model, folder)
    with (folder / "model.safetensors").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Base(model.eval().to(device), tasks, folder, sha256, config.get("task"))


def _described(
    config: Mapping[str, Any], folder: Path
) -> tuple[DecisionTransformer | CloningMLP, dict[str, TaskStatistics]]:
    """The model that a config.json describes, with fresh weights, and the tasks it says that it knows."""
    interfaces = [interface_from_json(i) for i in config["interfaces"]]
    if config["format"] == FORMAT:
        architecture = from_json(ModelConfig, config["architecture"], "architecture.")
        _check_size(folder, 12 * architecture.layers * architecture.width**2)
        model = DecisionTransformer(architecture, interfaces)
    else:
        architecture = from_json(CloningConfig, config["architecture"], "architecture.")
        _check_size(folder, (architecture.layers - 1) * architecture.width**2)
        model = CloningMLP(architecture, *interfaces)
    return model, from_json(dict[str, TaskStatistics], config["tasks"], "tasks.")


def _load_weights(model: ActionModel, folder: Path) -> None:
    """Read the weights of the folder into the model.

    Raises:
        UserError: if they are missing, damaged, or of another architecture.
    """
    try:
        weights = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{folder / 'model.safetensors'}' is missing or damaged ({error}): get it again.") from error
    expected = model.state_dict()
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in expected.items()}:
        differing = sorted(
            {n for n in weights.keys() ^ expected.keys()}
            or {n for n in weights if weights[n].shape != expected[n].shape}
        )
        raise UserError(
            f"'{folder / 'model.safetensors'}' holds weights of another architecture than its config.json describes "
            f"(first difference: {differing[0]}): get both from the same place."
        )
    if broken := not_finite(weights):
        raise UserError(f"'{folder / 'model.safetensors'}' holds NaN or infinite numbers in '{broken}': get it again.")
    model.load_state_dict(weights)


def load_base_of(
    folder: Path, notes: AdapterNotes, setting: str, given: str | None, device: torch.device | str = "cpu"
) -> Base:
    """Load the base that the adapter in `folder` was trained on.

    Args:
        given: where the base is now, as the command's `setting` says. None: where it was.

    Raises:
        UserError: if it can't be loaded, or its weights are not those the adapter was trained on.
    """
    try:
        base = load_base(given or notes.base, device)
    except UserError as error:
        hint = (
            "" if given else f" It is the base of the adapter in '{folder}'; if it was moved, {setting}=... names it."
        )
        raise UserError(f"{error}{hint}") from error
    if base.sha256 != notes.base_sha256:
        raise UserError(
            f"The adapter in '{folder}' was trained on the base '{notes.base}', and '{base.path}' holds other weights: name "
            f"the base it belongs to with {setting}=..."
        )
    return base


@dataclass(frozen=True)
class AdapterNotes:
    """What an adapter folder must say, beyond peft's files, for its model to act in its task again."""

    base: str
    base_sha256: str
    task: str
    interface: Interface
    statistics: TaskStatistics


NOTES = "eva_rl.json"
"""The file in an adapter's folder that holds its `AdapterNotes`."""


def find_adapter(folder: Path) -> Path:
    """The adapter's folder in a run's folder, or the one named itself, or a Hugging Face repository (owner/name).

    Raises:
        UserError: if the run trained a whole model instead, there is no adapter, or the Hub can't be reached.
    """
    name = str(folder)
    if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = _from_hub(name, "adapter")
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    if (folder / "model").is_dir():
        raise UserError(
            f"'{folder}' holds a whole model, not an adapter: name '{folder / 'model'}' as a checkpoint instead."
        )
    if not (folder / NOTES).is_file():
        raise UserError(
            f"'{folder}' holds no adapter of this project (no {NOTES}): name the folder of a run that trained one."
        )
    return folder


def load_notes(folder: Path) -> AdapterNotes:
    """The notes of an adapter's folder.

    Raises:
        UserError: if there are none, or they are damaged.
    """
    fields = read_json(folder / NOTES)
    try:
        notes = from_json(AdapterNotes, fields)
        _check_interface(notes.interface)
    except TypeError as error:
        raise UserError(f"'{folder / NOTES}' is incomplete ({in_one_line(error)}): make the adapter again.") from error
    return notes


def interface_from_json(fields: Any) -> Interface:
    """The inverse of `dataclasses.asdict` for an `Interface` that went through JSON.

    Raises:
        TypeError: if a field is not of its type, or its statistics are not those of its sizes.
    """
    interface = from_json(Interface, fields, "interface.")
    _check_interface(interface)
    return interface


def _check_interface(interface: Interface) -> None:
    """Raise a TypeError if the statistics, which broadcasting would fit to any size, are not those of its sizes."""
    sizes = [part.size for part in interface.parts]
    vectors = sum(part.size for part in interface.parts if part.kind == "vector")
    actions = interface.action_shape[0] if interface.action_kind in ("continuous", "parts") else 0
    outputs = sum(part.outputs for part in interface.action_parts) or sum(interface.choices)
    expected = {
        "observation_size": (sum(sizes), interface.observation_size),
        "action_size": (outputs or interface.action_size, interface.action_size),
        "observation_mean": (vectors, len(interface.observation_mean)),
        "observation_std": (vectors, len(interface.observation_std)),
        "action_mean": (actions, len(interface.action_mean)),
        "action_scale": (actions, len(interface.action_scale)),
    }
    for name, (wanted, found) in expected.items():
        if wanted != found:
            raise TypeError(f"{name} of the interface '{interface.name}' is of size {found} instead of {wanted}")
    embedded = (vectors, interface.action_size, *(part.values for part in interface.parts))
    if min(sizes) < 1 or interface.action_size < 1 or max(embedded) > LARGEST or sum(sizes) > 100 * LARGEST:
        raise TypeError(f"a size of the interface '{interface.name}' is not between 1 and {LARGEST}")
    counts = [n for part in interface.action_parts for n in (part.size, *part.choices)]
    if bool(counts) != (interface.action_kind == "parts") or min(counts, default=1) < 1:
        raise TypeError(f"the parts of the actions of the interface '{interface.name}' are not those of its kind")
    if not interface.name or "." in interface.name:
        raise TypeError(f"'{interface.name}' is no name of an interface")
    scales = (*interface.observation_std, *interface.action_scale, interface.return_scale, interface.reward_scale)
    if not min(scales) > 0:
        raise TypeError(f"a scale of the interface '{interface.name}' is {min(scales)} instead of more than 0")


def _check_size(folder: Path, weights: int) -> None:
    """Raise a TypeError before a trunk of so many weights is made in memory whose file can't hold them."""
    path = folder / "model.safetensors"
    if path.is_file() and weights * 2 > path.stat().st_size:  # the narrowest of floats has two bytes
        raise TypeError(f"its architecture has {weights:,} weights, of which '{path.name}' can't hold so many")
