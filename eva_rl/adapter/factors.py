"""An adapter's folder -> the two factors of each layer, without making a model of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eva_rl.adapter.attach import WEIGHTS
from eva_rl.adapter.eva.load import by_pattern
from eva_rl.adapter.safe import check_adapter_config
from eva_rl.errors import UserError, in_one_line
from eva_rl.files import not_finite

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """What an adapter adds to a model."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """A (r, in) and s B (out, r) of each layer, s being LoRA's scale: the layer's weight with the adapter is W + s B A."""
    vector: Tensor | None
    """(d,) its task's vector, where it has one."""


def plain_lora(folder: Path) -> LoraConfig | None:
    """The config of a folder's adapter, or None where it is made of more than LoRA's two factors or of other things."""
    from peft import LoraConfig, PeftConfig

    check_adapter_config(folder)
    config = PeftConfig.from_pretrained(str(folder))
    beside = ("use_dora", "fan_in_fan_out", "lora_bias", "kasa_config")
    if type(config) is not LoraConfig:  # AdaLoRA's is one of its kind
        return None
    return None if any(getattr(config, setting, None) for setting in beside) else config


def lora_factors(folder: Path, shapes: Mapping[str, tuple[int, int]], vector: str | None = None) -> LoraFactors:
    """Read the factors of a folder's adapter.

    Args:
        shapes: of the weights (out, in) of the layers that may have an adapter, by the layers' names.
        vector: the name of the parameter (d,) that may be the vector of the adapter's task. None: the base has no such
            vectors.

    Raises:
        UserError: if the adapter is no LoRA, or does more than add products to these layers' weights and bring that vector.
    """
    refusal = f"The adapter in '{folder}' can't be served beside others"
    config = plain_lora(folder)
    if config is None:
        raise UserError(f"{refusal}: it is not LoRA alone, which has two factors; `python -m eva_rl.merge` merges it.")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{folder / WEIGHTS}' is missing or damaged ({in_one_line(error)[:200]}).") from error
    if broken := not_finite(tensors):
        raise UserError(f"'{folder / WEIGHTS}' holds NaN or infinite numbers in '{broken}': train it again.")
    own, factors = tensors.pop(f"{PREFIX}{vector}", None), {}
    for name, (out, width) in shapes.items():
        key_a, key_b = (f"{PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B"))
        if key_a not in tensors or key_b not in tensors:
            continue
        a, b = tensors.pop(key_a).float(), tensors.pop(key_b).float()
        if a.shape[1:] != (width,) or b.shape != (out, len(a)):
            raise UserError(f"{refusal}: the factors of '{name}' are not those of a weight of {out} x {width}.")
        alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
        factors[name] = (a, b * (alpha / (len(a) ** 0.5 if config.use_rslora else len(a))))
    if tensors:
        raise UserError(f"{refusal}: it also has '{min(tensors)}', which is no factor of a layer of the trunk.")
    return LoraFactors(factors, own)
