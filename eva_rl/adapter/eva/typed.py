"""peft's layers and configs, typed more closely than peft does: for type checkers alone, as importing peft takes seconds.

torch says of a module's attribute no more than that it is a tensor or a module, and so peft of what its layers hold.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Protocol

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn


class Factor(Protocol):
    """What stands for A or B: a linear layer, a convolution, or a module of ours that makes its weight of other numbers."""

    @property
    def weight(self) -> Tensor: ...


class Weighted(nn.Module):
    """What LoRA is put on."""

    weight: Tensor
    bias: Tensor | None


class LoraLayer(nn.Module, lora.LoraLayer):
    """What all of peft's layers with LoRA have, each for every adapter by its name."""

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_A: MutableMapping[str, Factor]
    lora_B: MutableMapping[str, Factor]
    fan_in_fan_out: bool
    """Whether the layer keeps its weight transposed."""
    get_base_layer: Callable[[], Weighted]
    get_delta_weight: Callable[[str], Tensor]
    """What this adapter adds to the weight, (out, in), or transposed."""
    update_layer: Callable[..., None]


class CordaTarget(nn.Module):
    """A layer with what peft's CorDA looks for."""

    rank: int
    corda_method: str
    covariance_matrix: Tensor


class AdapterConfig(LoraConfig):
    """What the configs of adapters have. What only some have is asked for with `hasattr` or `getattr` first."""

    target_modules: str | list[str] | set[str] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    lora_alpha: float
    total_step: int
    tfinal: int
