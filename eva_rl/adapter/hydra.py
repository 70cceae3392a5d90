"""Hydra: one low-rank branch beside the layer, and one behind it (Kim et al. 2023, arXiv 2309.06922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from eva_rl.adapter.eva.load import lora_layers
from eva_rl.errors import UserError

if TYPE_CHECKING:
    from eva_rl.adapter.eva.typed import Weighted


@dataclass
class HydraConfig(LoraConfig):
    """LoRA, and LoRA of the layer's outputs: y = W x + b gains s (B_p A_p x + B_s A_s y), r ranks each.

    All of this is LoRA of rank 2 r with A = `[A_p; A_s W]`, B = `[B_p, B_s]` and a bias s B_s A_s b. The authors' code
    also has biases between the factors, which do not occur in the paper's equations.
    """

    def put_on(self, peft_model: nn.Module) -> None:
        """Give every layer both branches.

        Raises:
            UserError: if some layers have a bias and some have none.
        """
        layers = [layer for _, layer in lora_layers(peft_model)]
        biases = {layer.get_base_layer().bias is not None for layer in layers}
        if len(biases) > 1:
            raise UserError("Hydra was asked for layers of which some have a bias and some have none: choose others.")
        self.lora_bias = biases == {True}
        for layer in layers:
            down = Down(
                layer.get_base_layer(), layer.r["default"], layer.lora_A["default"].weight, layer.fan_in_fan_out
            )
            layer.lora_A["default"] = down
            layer.lora_B["default"] = Up(down, layer.lora_B["default"].weight)
            layer.lora_bias["default"] = self.lora_bias


class Down(nn.Module):
    """In the place of A: its weight (2 r, in) is `[A_p; A_s W]`."""

    def __init__(self, base: Weighted, rank: int, like: Tensor, transposed: bool):
        super().__init__()
        self.base = (base,)  # a module of the model already, and so none of this one's
        self.transposed = transposed
        inputs = like.shape[1]
        outputs = base.weight.numel() // inputs
        self.parallel = nn.Parameter(nn.init.xavier_uniform_(like.new_empty(rank, inputs)))
        self.sequential = nn.Parameter(nn.init.xavier_uniform_(like.new_empty(rank, outputs)))

    @property
    def weight(self) -> Tensor:
        weight = self.base[0].weight
        return torch.cat([self.parallel, self.sequential @ (weight.T if self.transposed else weight)])

    def constant(self, bias: Tensor) -> Tensor:
        """`[0; A_s b]` (2 r,), what the base's bias b (out,) adds."""
        return torch.cat([torch.zeros_like(self.parallel[:, 0]), self.sequential @ bias])

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 r) of the layer's inputs (..., in)."""
        return F.linear(x, self.weight)


class Up(nn.Module):
    """In the place of B: (out, 2 r), zero at first, and the bias that follows."""

    def __init__(self, down: Down, like: Tensor):
        super().__init__()
        self.down = (down,)
        self.weight = nn.Parameter(like.new_zeros(len(like), 2 * like.shape[1]))

    @property
    def bias(self) -> Tensor | None:
        bias = self.down[0].base[0].bias
        return None if bias is None else self.weight @ self.down[0].constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (..., out)."""
        return F.linear(x, self.weight, self.bias)
