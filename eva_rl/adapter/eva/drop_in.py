"""peft's two functions for EVA, with their arguments and results, on this engine.

    from eva_rl.adapter.eva import get_eva_state_dict, initialize_lora_eva_weights   # instead of: from peft import ...

Unlike peft's, they end: after `max_batches`, with a warning that names the layers. Rows missing from a short batch are
made up for by the next. Activations are never gathered from other processes, only what stands for them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva.engine import LayerResult, Reading, eva_init
from eva_rl.adapter.eva.kinds import reader
from eva_rl.adapter.eva.load import PREFIX, by_pattern, config_of, load_components, lora_layers
from eva_rl.adapter.eva.observe import Room, Rows
from eva_rl.adapter.eva.settings import EvaSettings
from eva_rl.adapter.eva.tokens import TokenRows, call
from eva_rl.errors import UserError, did_you_mean

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import EvaConfig, LoraConfig, PeftModel

    from eva_rl.adapter.eva.typed import AdapterConfig

PrepareLayer = Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None
MAX_BATCHES = 256


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)`, or what `call` makes of a batch that is no mapping."""
    return model(**inputs) if isinstance(inputs, Mapping) else call(model, inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> Tensor:
    """Which tokens of a language model's batch count, by its attention mask and labels: peft's function of this name."""
    from peft.tuners.lora import eva as pefts

    return pefts.prepare_model_inputs_fn_language_modeling(model_input, peft_config)


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Those tokens' rows of a layer's input: peft's function of this name."""
    from peft.tuners.lora import eva as pefts

    return pefts.prepare_layer_inputs_fn_language_modeling(layer_input, model_input, layer_name)


def _are_defaults(model_inputs: Any, layer_inputs: Any) -> bool:
    """Whether these are the functions for language models, by peft's name or ours: then rows are chosen as they do where they
    can, and also where they can't."""
    from peft.tuners.lora import eva as pefts

    return model_inputs in (
        prepare_model_inputs_fn_language_modeling,
        pefts.prepare_model_inputs_fn_language_modeling,
    ) and layer_inputs in (
        prepare_layer_inputs_fn_language_modeling,
        pefts.prepare_layer_inputs_fn_language_modeling,
    )


def _function_for(prepare: PrepareLayer, layer: str) -> Callable[..., Tensor] | None:
    """The function that chooses this layer's rows, or None for all of them."""
    return prepare.get(layer) if isinstance(prepare, Mapping) else prepare


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
    strict: bool = False,
) -> dict[str, Tensor]:
    """A's rows (rank, d) for each layer that LoRA adapts: what `peft.get_eva_state_dict` computes.

    Args:
        model: a `PeftModel`, or any model if `peft_config` is given.
        dataloader: batches, gone through again and again until all layers have converged.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: turns (batch, config) into what `prepare_layer_inputs_fn` gets. None: the batch itself.
            With both functions left as they are, batches may be of any model: see `TokenRows`.
        prepare_layer_inputs_fn: turns (a layer's arguments, what `prepare_model_inputs_fn` made, the layer's name)
            into rows (n, d). One function for all layers, or one for each. None: all rows.
        gather_distributed_inputs: False: do not merge with the other processes of `torch.distributed`.
        settings: this engine's own settings. None: rho and tau of the config's `eva_config`, or peft's defaults where
            it has none, with peft's rule of convergence (`convergence="components"`). `EvaSettings()` stops as soon as
            the subspaces are good enough.
        strict: raise an error rather than warn if a layer can have no directions.

    Raises:
        ValueError: if the dataloader is empty, or there is no config.
        UserError: as in `eva_init`, and if the config's `target_modules` match no layer.
    """
    from peft import EvaConfig

    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    wrapped = hasattr(model, "peft_config")
    config = peft_config or (config_of(model, adapter_name) if wrapped else None)
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    asked = config.eva_config or EvaConfig()
    names = _adapted(model, adapter_name) if wrapped else _targets(model, config)
    if isinstance(prepare_layer_inputs_fn, Mapping) and (
        unknown := sorted(prepare_layer_inputs_fn.keys() - set(names))
    ):
        raise ValueError(f"prepare_layer_inputs_fn names modules that are no targets of the adapter: {unknown}")
    ranks = {name: by_pattern(config.rank_pattern, name, config.r) for name in names}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    defaults = _are_defaults(prepare_model_inputs_fn, prepare_layer_inputs_fn)
    ignored = asked.label_mask_value if asked.use_label_mask else None
    tokens = TokenRows(model, ignored) if defaults else None
    rows = tokens or _rows_by(prepare_model_inputs_fn, prepare_layer_inputs_fn, config)
    without = cast("PeftModel", model).disable_adapter() if wrapped else nullcontext()
    with without, tokens.watching() if tokens else nullcontext():
        found = eva_init(
            model,
            _cycled(dataloader, device),
            ranks,
            settings or _as_asked(asked),
            # Another function than the default may choose by the layer's name: then layers that read one tensor have rows of their own.
            Reading(forward_fn, rows=rows, share=defaults or prepare_layer_inputs_fn is None),
            together=gather_distributed_inputs,
            progress=show_progress_bar,
            strict=strict,
        )
    whiten = settings is None and asked.whiten
    rows_of = {name: _whitened(layer) if whiten else layer.components for name, layer in found.items()}
    return {name: reader(model, name).shaped(components) for name, components in rows_of.items()}


def _as_asked(config: EvaConfig) -> EvaSettings:
    """This engine's settings for what peft's config asks for."""
    return EvaSettings(rho=config.rho, tau=max(config.tau, 1e-9), convergence="components", max_batches=MAX_BATCHES)


def _rows_by(
    prepare_model: Callable[[Any, LoraConfig], Any] | None, prepare_layer: PrepareLayer, config: LoraConfig
) -> Callable[[Any, Room], Rows]:
    """What chooses a batch's rows by a user's two functions."""

    def rows(batch: Any, room: Room) -> Rows:
        prepared = batch if prepare_model is None else prepare_model(batch, config)

        def of_layer(arguments: tuple[Any, ...], name: str) -> Tensor:
            function = _function_for(prepare_layer, name)
            if function is None:
                return arguments[0].reshape(-1, arguments[0].shape[-1]).clone()
            return function(arguments, prepared, name).clone()

        return of_layer

    return rows


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
    strict: bool = False,
) -> None:
    """Give a `PeftModel`'s LoRA layers the A and the ranks of EVA: what `peft.initialize_lora_eva_weights` does.

    The function takes the state dict that `get_eva_state_dict` made for this model or its base, or that function's
    arguments. Only layers of the adapter `adapter_name` are touched. Of these, layers without rows stay as they are.

    Raises:
        ValueError: if the model is no `PeftModel`, if it has several active adapters or one that is not made for EVA,
            or if there is neither a dataloader nor a state dict.
        UserError: as in `get_eva_state_dict`, and if the state dict names no layer of the adapter.
    """
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
            strict=strict,
        )
    components = {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()}
    _check_names(model, adapter_name, components, complete=dataloader is None)
    load_components(model, components, adapter_name)


def _check_names(model: nn.Module, adapter_name: str, components: Mapping[str, Tensor], complete: bool) -> None:
    """Raise a `UserError` if no layer of the adapter has rows, and warn of any without if rows should be `complete`."""
    layers = [name.removeprefix(PREFIX) for name, _ in lora_layers(model, adapter_name)]
    if not components.keys() & set(layers):
        raise UserError(
            f"The state dict names no layer of the adapter '{adapter_name}': it has {_some(components)}, the adapter {_some(layers)}."
        )
    missing = [name for name in layers if name not in components]
    if missing and complete:
        warnings.warn(f"The state dict has no rows for {_some(missing)}: they stay as they are.", stacklevel=3)


def _some(names: Iterable[str], most: int = 3) -> str:
    names = [f"'{name}'" for name in names]
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
    )


def _check_adapter(model: nn.Module, adapter_name: str) -> None:
    """Raise what peft raises, before the long computation rather than after."""
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    peft_model = cast("PeftModel", model)
    active, known = peft_model.active_adapters, peft_model.peft_config
    if len(active) > 1:
        raise ValueError(f"`initialize_lora_eva_weights` works with a single active adapter, but {active} are active")
    if adapter_name not in known:
        raise ValueError(f"the model has no adapter '{adapter_name}'. {did_you_mean(adapter_name, known)}")
    if config_of(model, adapter_name).init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")


def _adapted(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of the layers that have this adapter.

    Raises:
        UserError: if there are none.
    """
    names = [name for name, _ in lora_layers(model, adapter_name)]
    if not names:
        raise UserError(f"The model has no layer with the adapter '{adapter_name}': give the name of one that it has.")
    return names


def _targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the layers that an adapter would be for, with a warning of targets that match none.

    Raises:
        UserError: if there are no such layers.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    given, listed = config.target_modules, _maybe_include_all_linear_layers(copy.copy(config), model)
    if given is None:
        return [name for name in layers if not isinstance(model.get_submodule(name), nn.modules.conv._ConvNd)]
    names = [name for name in layers if check_target_module_exists(listed, name)]
    lone, every = cast("AdapterConfig", copy.copy(listed)), [name for name, _ in model.named_modules()]

    def idle(target: str | set[str]) -> bool:
        lone.target_modules = target
        return not any(check_target_module_exists(lone, name) for name in every)

    single = [given] if isinstance(given, str) else sorted(given)
    unmatched = [] if isinstance(given, str) else [target for target in single if idle({target})]
    if unmatched or not names:
        known = {name.rpartition(".")[2] for name in layers}
        missed = unmatched or single
        sentence = f"The target_modules {_some(missed)} match no layer. {did_you_mean(missed[0], known)}"
        if not names:
            raise UserError(sentence)
        warnings.warn(sentence, stacklevel=3)
    return names


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
