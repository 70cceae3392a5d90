"""A frozen model and a peft config -> a peft model, its adapter initialised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from eva_rl.adapter.eva import EvaSettings, LayerResult, eva_init, initialize_lora_eva_weights
from eva_rl.adapter.eva.observe import input_width
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

    with_eva = getattr(config, "init_lora_weights", None) == "eva"
    if with_eva:
        _check_targets(model, config)
    config.modules_to_save = [*(config.modules_to_save or []), *fresh_modules] or None
    with _undone_on_failure(model):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")  # for models near the memory's limit
                peft_model = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise UserError(f"The adapter does not fit the model: {in_one_line(error)}") from error
        if not with_eva:
            return peft_model, {}
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        ranks = {name: layer.r["default"] for name, layer in layers.items()}
        eva = eva or EvaSettings(rho=config.eva_config.rho, tau=config.eva_config.tau)
        with peft_model.disable_adapter():
            found = eva_init(model, batches, ranks, eva, token_mask, loss=loss, progress=progress)
    components = {f"base_model.model.{name}": layer.components for name, layer in found.items()}
    initialize_lora_eva_weights(peft_model, eva_state_dict=components)
    return peft_model, found


def _check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise a `UserError` that names the first target which is no linear layer; peft's sentence would not."""
    from peft.tuners.tuners_utils import check_target_module_exists

    for name, module in model.named_modules():
        if config.target_modules and check_target_module_exists(config, name):
            input_width(module, name)


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, the model's submodules and what was trainable are again what they were."""
    children = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, name, child in children:
            setattr(module, name, child)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise


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
