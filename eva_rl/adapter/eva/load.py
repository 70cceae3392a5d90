"""Components -> the A of an adapter, with the rank that each layer was given."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from eva_rl.errors import UserError

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel

    from eva_rl.adapter.eva.typed import AdapterConfig, LoraLayer

T = TypeVar("T")

PREFIX = "base_model.model."
"""What peft puts before the names of the base's modules."""


def lora_layers(model: nn.Module, adapter: str | None = None) -> list[tuple[str, LoraLayer]]:
    """The layers with LoRA and their names, or only those of this adapter if one is named."""
    from peft.tuners import lora

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]
    layers = cast("list[tuple[str, LoraLayer]]", found)
    return [(name, layer) for name, layer in layers if adapter is None or adapter in layer.r]


def config_of(model: nn.Module, adapter: str = "default") -> AdapterConfig:
    """A peft model's config of this adapter."""
    return cast("AdapterConfig", cast("PeftModel", model).peft_config[adapter])


def by_pattern(pattern: Mapping[str, T] | None, name: str, usual: T) -> T:
    """What a config's `rank_pattern` or `alpha_pattern` says of the layer of this name, if anything."""
    from peft.utils.other import get_pattern_key

    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), usual)


@torch.no_grad()
def load_components(model: nn.Module, components: Mapping[str, Tensor], adapter: str) -> None:
    """Give this adapter's layers their A's rows, (r', ...) by the layers' names in the base, and the rank r'.

    Alpha grows with the rank, unless the config's `adjust_scaling_factors` is off. A layer of rank 0 loses this adapter
    and no other. A layer that is not among the components stays as it is, and so do all other adapters.

    Raises:
        UserError: if a layer of a sharded model would change its rank.
    """
    config = config_of(model, adapter)
    made, patterns = copy.copy(config), ({}, {})
    layers = [(name.removeprefix(PREFIX), name, layer) for name, layer in lora_layers(model, adapter)]
    for short, name, layer in layers:
        if short in components and len(components[short]) == 0:
            _take_off(model, name, layer, adapter)
            continue
        rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        if short in components:
            rows = components[short]
            if config.eva_config is None or config.eva_config.adjust_scaling_factors:
                alpha *= len(rows) / rank
            weight = layer.lora_A[adapter].weight
            if len(rows) != rank or weight.device.type == "meta":
                _resize(layer, adapter, len(rows), alpha, made, short)
                rank, weight = len(rows), layer.lora_A[adapter].weight
            _fill(weight, rows)
        for pattern, value, nominal in zip(patterns, (rank, alpha), (config.r, config.lora_alpha), strict=True):
            if value != nominal:
                pattern[short] = value
    # By their whole names: peft would abbreviate them to suffixes, which give rank-0 layers an adapter again on loading.
    config.target_modules = {
        name.removeprefix(PREFIX)
        for name, layer in lora_layers(model, adapter)
        if ".base_layer." not in name and not hasattr(layer, "parameter_name")
    }
    config.rank_pattern, config.alpha_pattern = patterns


def _take_off(model: nn.Module, name: str, layer: LoraLayer, adapter: str) -> None:
    """Take this adapter off a layer, and the layer's wrapper where it was the only one."""
    if list(layer.r) == [adapter]:
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, layer.get_base_layer())
        return
    active = layer.active_adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's word that it makes another one active here, which is undone
        layer.delete_adapter(adapter)
    layer.set_adapter(active)


def _resize(layer: LoraLayer, adapter: str, rank: int, alpha: float, config: LoraConfig, name: str) -> None:
    if hasattr(layer.lora_A[adapter].weight, "device_mesh"):
        raise UserError(
            f"EVA gives layer '{name}' rank {rank} in place of {layer.r[adapter]}, but the model is sharded already: take rho=1, or "
            "initialise before sharding."
        )
    config.init_lora_weights = "eva" if isinstance(layer.lora_A[adapter], nn.Linear) else True  # B is zero with both
    layer.update_layer(adapter_name=adapter, r=rank, lora_alpha=alpha, config=config)


def _fill(weight: Tensor, rows: Tensor) -> None:
    rows = rows.reshape(weight.shape).to(weight.device, weight.dtype)
    if hasattr(weight, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast("DTensor", weight)
        rows = distribute_tensor(rows, sharded.device_mesh, sharded.placements)
    weight.copy_(rows)
