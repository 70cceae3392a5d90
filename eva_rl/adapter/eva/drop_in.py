"""peft's two functions for EVA, with their arguments and results, on this engine.

    from eva_rl.adapter.eva import get_eva_state_dict, initialize_lora_eva_weights   # instead of: from peft import ...

Other than peft's, they end: after `max_batches`, with a warning that names the layers. Rows missing from a short batch are
made up for by the next. Activations are never gathered from other processes, only what stands for them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva.engine import LayerResult, eva_init
from eva_rl.adapter.eva.observe import Rows
from eva_rl.adapter.eva.settings import EvaSettings
from eva_rl.errors import UserError

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig

PrepareLayer = Callable[..., Tensor] | dict[str, Callable[..., Tensor]] | None
MAX_BATCHES = 256


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """`model(**inputs)`."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> Tensor:
    """Which tokens of a language model's batch count, by its attention mask and labels: peft's function of this name."""
    from peft.tuners.lora import eva as pefts

    return pefts.prepare_model_inputs_fn_language_modeling(model_input, peft_config)


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Those tokens' rows of a layer's input: peft's function of this name."""
    from peft.tuners.lora import eva as pefts

    return pefts.prepare_layer_inputs_fn_language_modeling(layer_input, model_input, layer_name)


def _pefts_rows() -> Callable[..., Tensor]:
    """peft's own default, which a script may name."""
    from peft.tuners.lora import eva as pefts

    return pefts.prepare_layer_inputs_fn_language_modeling


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    settings: EvaSettings | None = None,
) -> dict[str, Tensor]:
    """A's rows (rank, d) for each layer that LoRA adapts: what `peft.get_eva_state_dict` computes.

    Args:
        model: a `PeftModel`, or any model if `peft_config` is given.
        dataloader: batches; gone through again and again until all layers have converged.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: turns (batch, config) into what `prepare_layer_inputs_fn` gets; None: the batch itself.
        prepare_layer_inputs_fn: turns (a layer's arguments, those, its name) into rows (n, d); a function for all layers or
            one for each; None: all rows.
        gather_distributed_inputs: False: do not merge with the other processes of `torch.distributed`.
        settings: this engine's own settings. None: rho and tau of the config's `eva_config`, with peft's rule of convergence
            (`convergence="components"`); `EvaSettings()` stops as soon as the subspaces are good enough.

    Raises:
        ValueError: if the dataloader is empty, or there is no config.
        UserError: as `eva_init`.
    """
    from peft.utils.other import get_pattern_key

    if hasattr(dataloader, "__len__") and len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    wrapped = hasattr(model, "peft_config")
    config = peft_config or (model.peft_config[adapter_name] if wrapped else None)
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    own = settings or EvaSettings(
        rho=config.eva_config.rho,
        tau=max(config.eva_config.tau, 1e-9),
        convergence="components",
        max_batches=MAX_BATCHES,
    )
    names = _targets(model, config, wrapped)
    each = isinstance(prepare_layer_inputs_fn, Mapping)
    # Another function than peft's may choose by the layer's name: then layers that read the same tensor have rows of their own.
    by_name = prepare_layer_inputs_fn not in (None, prepare_layer_inputs_fn_language_modeling, _pefts_rows())
    if each and not prepare_layer_inputs_fn.keys() <= set(names):
        unknown = sorted(prepare_layer_inputs_fn.keys() - set(names))
        raise ValueError(f"prepare_layer_inputs_fn names modules that are no targets of the adapter: {unknown}")
    ranks = {n: config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), n), config.r) for n in names}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)

    def rows(batch: Any) -> Rows:
        prepared = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)

        def of_layer(arguments: tuple[Any, ...], name: str) -> Tensor:
            function = prepare_layer_inputs_fn.get(name) if each else prepare_layer_inputs_fn
            if function is None:
                return arguments[0].reshape(-1, arguments[0].shape[-1]).clone()
            return function(arguments, prepared, name).clone()

        return of_layer

    with model.disable_adapter() if wrapped else nullcontext():
        found = eva_init(
            model,
            _cycled(dataloader, device),
            ranks,
            own,
            forward=forward_fn,
            rows=rows,
            share=not by_name,
            together=gather_distributed_inputs,
            progress=show_progress_bar,
        )
    whiten = settings is None and config.eva_config.whiten
    return {name: _whitened(layer) if whiten else layer.components for name, layer in found.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    settings: EvaSettings | None = None,
) -> None:
    """Give a `PeftModel`'s LoRA layers the A and the ranks of EVA: what `peft.initialize_lora_eva_weights` does.

    Takes the state dict of `get_eva_state_dict`, or its arguments.

    Raises:
        ValueError: if the model is no `PeftModel`, has several active adapters, or one that is not made for EVA; if there is
            neither a dataloader nor a state dict.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    _check_adapter(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
            settings=settings,
        )
    peft.initialize_lora_eva_weights(model, eva_state_dict=dict(eva_state_dict), adapter_name=adapter_name)
    # peft abbreviates many targets to their common suffixes, which would give rank-0 layers an adapter again on loading.
    left = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    model.peft_config[adapter_name].target_modules = {name.removeprefix("base_model.model.") for name in left}


def _check_adapter(model: nn.Module, adapter_name: str) -> None:
    """Raise what peft raises, before the long computation rather than after."""
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError(
            f"`initialize_lora_eva_weights` works with a single active adapter, but {model.active_adapters} are active"
        )
    if model.peft_config[adapter_name].init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")


def _targets(model: nn.Module, config: LoraConfig, wrapped: bool) -> list[str]:
    """The names of the linear layers that the adapter is for; a warning names those of other kinds."""
    from peft.tuners.lora.eva import UNSUPPORTED_LORA_MODULES
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if not wrapped:
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and (config.target_modules is None or check_target_module_exists(config, name))
        ]
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    other = [name for name, module in adapted.items() if isinstance(module, UNSUPPORTED_LORA_MODULES)]
    if other:
        warnings.warn(f"EVA adapts linear layers and leaves out {', '.join(other)}.", stacklevel=3)
    return [name for name in adapted if name not in other]


def _cycled(dataloader: Iterable[Any], device: torch.device | None) -> Iterator[Any]:
    while True:
        empty = True
        for batch in dataloader:
            empty = False
            yield _moved(batch, device)
        if empty:
            return


def _moved(batch: Any, device: torch.device | None) -> Any:
    if hasattr(batch, "to"):
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        moved = copy.copy(batch) if isinstance(batch, MutableMapping) else {}  # which keeps a default dict's default
        for key, value in batch.items():
            moved[key] = _moved(value, device)
        return moved
    if isinstance(batch, tuple | list):
        parts = [_moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, Iterator):
        raise UserError(
            f"A batch holds a {type(batch).__name__}, which can be gone through once only: make it a list or a tensor."
        )
    return batch


def _whitened(layer: LayerResult) -> Tensor:
    """The rows over the roots of their singular values: peft's formula, whose scale depends on the number of rows."""
    singular = layer.squared_singular_values[: len(layer.components)].sqrt().to(layer.components)
    return layer.components / singular.sqrt()[:, None]
