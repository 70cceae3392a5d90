"""LoRA trained on weights that its initialisation changed -> LoRA for the weights as they were."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel


def restored(
    peft_model: PeftModel, initial: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of an adapter that does on the original base what `peft_model` does on the changed one.

    The base kept W - s B0 A0, so the model computes W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]: LoRA of twice the rank
    and the same scale s.

    Args:
        initial: A0 (r, in) and B0 (out, r) of each layer.
    """
    from peft import get_peft_model_state_dict

    config = deepcopy(peft_model.peft_config["default"])
    growth = 2**0.5 if config.use_rslora else 2  # s = alpha / sqrt(r) or alpha / r
    config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: growth * alpha for name, alpha in config.alpha_pattern.items()}
    config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for name, (a, b) in initial.items():
        key_a, key_b = (f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B"))
        tensors[key_a] = torch.cat([tensors[key_a], a])
        tensors[key_b] = torch.cat([tensors[key_b], -b], 1)
    return config, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
