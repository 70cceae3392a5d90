"""LoRA as it was trained -> plain LoRA, in peft's format, for the weights as they were before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from eva_rl.adapter.eva.load import PREFIX, config_of, lora_layers

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel

    from eva_rl.adapter.eva.typed import AdapterConfig, Factor

T = TypeVar("T")


def restored(
    peft_model: PeftModel, initial: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of a peft adapter that does on the original base what `peft_model` does on its own.

    Where the base kept W - s B0 A0, the model computes `W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]`. This is LoRA of
    twice the rank and the same scale s. Factors that are made of other numbers are multiplied out, and ranks that are
    off are dropped.

    Args:
        initial: A0 (r, in) and B0 (out, r) of each layer that lost their product.
    """
    tensors = tensors_of(peft_model)
    ranks, scales = {}, {}
    for name, layer in lora_layers(peft_model.get_base_model()):
        a, b = (_computed(tensors, f"{PREFIX}{name}.{part}", getattr(layer, part)["default"]) for part in PARTS)
        a, b = _without_idle_ranks(a, b, layer.lora_B["default"])
        if name in initial:
            a, b = torch.cat([a, initial[name][0]]), torch.cat([b, -initial[name][1]], 1)
        tensors |= {f"{PREFIX}{name}.{part}.weight": factor for part, factor in zip(PARTS, (a, b), strict=True)}
        ranks[name], scales[name] = len(a), layer.scaling["default"]
    config = _sized(config_of(peft_model), ranks, scales)
    return config, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def tensors_of(peft_model: PeftModel) -> dict[str, Tensor]:
    """What peft would save of the adapter, without its warning of factors that are no matrices: some are gates or biases."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape")
        return get_peft_model_state_dict(peft_model, save_embedding_layers=False)


PARTS = ("lora_A", "lora_B")


def _computed(tensors: dict[str, Tensor], prefix: str, factor: Factor) -> Tensor:
    """The factor's weight, in the place of which `tensors` lose what it is made of."""
    for name in [name for name in tensors if name.startswith(f"{prefix}.")]:
        del tensors[name]
    bias = getattr(factor, "bias", None)
    if bias is not None:
        tensors[f"{prefix}.bias"] = bias
    return factor.weight.detach()


def _without_idle_ranks(a: Tensor, b: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """A (r', in) and B (out, r') of the ranks that are on. One stays in any case, as peft has no LoRA of none."""
    kept = getattr(factor, "kept", None)
    if kept is None or kept.all():
        return a, b
    kept = kept if kept.any() else torch.arange(len(a), device=a.device) == 0
    return a[kept], b[:, kept]


def _commonest(values: Iterable[T]) -> T:
    """The first of those that come most often."""
    listed = list(values)
    return max(listed, key=listed.count)


def _sized(config: LoraConfig, ranks: Mapping[str, int], scales: Mapping[str, float]) -> LoraConfig:
    """peft's config of LoRA with these ranks and scales of its layers: the commonest of each, and patterns for the others."""
    from peft import LoraConfig

    plain = LoraConfig(**{f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init})
    made = cast("AdapterConfig", plain)
    alphas = {name: scales[name] * (rank**0.5 if config.use_rslora else rank) for name, rank in ranks.items()}
    made.r, made.lora_alpha = _commonest(ranks.values()), _commonest(alphas.values())
    made.rank_pattern = {name: rank for name, rank in ranks.items() if rank != made.r}
    made.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != made.lora_alpha}
    made.init_lora_weights, made.corda_config, made.lora_ga_config, made.eva_config = True, None, None, None
    return made
