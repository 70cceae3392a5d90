"""A frozen model and a peft config -> a peft model, its adapter initialised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from eva_rl.adapter.eva import EvaSettings, LayerResult, eva_init, initialize_lora_eva_weights
from eva_rl.errors import UserError, in_one_line
from eva_rl.files import replacing, write_json

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import PeftConfig, PeftModel


def attach(
    model: nn.Module,
    config: PeftConfig,
    batches: Iterable[Any],
    token_mask: Callable[[Any], Tensor] | None = None,
    fresh_modules: Sequence[str] = (),
    eva: EvaSettings | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """Wrap `model` in place with the adapter `config` describes; only the adapter is trainable afterwards.

    Args:
        batches: the new task's data, each an argument of `model`; read by initialisations that need it.
        token_mask: see `eva_init`.
        fresh_modules: names of modules the base never trained; they are trained in full and saved with the adapter.
        eva: settings of an EVA initialisation, for configs with `init_lora_weights="eva"`; None: rho and tau of the
            config's `eva_config`, and our defaults for the rest.
        loss, progress: see `eva_init`.

    Returns:
        The peft model, and for EVA what it found for each layer (else empty).

    Raises:
        UserError: if the config does not fit the model, or its activations EVA; the model is then as it was.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    trainable = [(p, p.requires_grad) for p in model.parameters()]
    config.modules_to_save = [*(config.modules_to_save or []), *fresh_modules] or None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")  # for models near the memory's limit
            peft_model = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"The adapter does not fit the model: {in_one_line(error)}") from error
    if getattr(config, "init_lora_weights", None) != "eva":
        return peft_model, {}
    layers = {name: module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)}
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    eva = eva or EvaSettings(rho=config.eva_config.rho, tau=config.eva_config.tau)
    try:
        with peft_model.disable_adapter():
            found = eva_init(peft_model, batches, ranks, eva, token_mask, loss=loss, progress=progress)
    except BaseException:
        peft_model.unload()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    initialize_lora_eva_weights(peft_model, eva_state_dict={name: layer.components for name, layer in found.items()})
    return peft_model, {_in_base(name): replace(layer, group=_in_base(layer.group)) for name, layer in found.items()}


def _in_base(name: str) -> str:
    return name.removeprefix("base_model.model.")


def save_adapter(peft_model: PeftModel, folder: Path, base: str, notes: Mapping[str, Any] | None = None) -> None:
    """Write the adapter in peft's own format, atomically; `base` says which model it belongs to.

    `notes`: JSON files by name, written beside peft's.
    """
    peft_model.peft_config["default"].base_model_name_or_path = base
    with replacing(folder) as temporary:
        # Else peft asks the Hugging Face Hub for the base's vocabulary.
        peft_model.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty template
        for name, content in (notes or {}).items():
            write_json(temporary / name, content)


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapter of `folder` merged into its weights: it runs as fast as the base.

    Raises:
        UserError: if the folder holds no whole adapter, or one of another model.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"'{folder}' holds no adapter (there is no adapter_config.json in it): name a run's adapter/ folder."
        )
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"The adapter in '{folder}' is damaged or belongs to another model ({in_one_line(error)[:200]})."
        ) from error


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser would move."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
