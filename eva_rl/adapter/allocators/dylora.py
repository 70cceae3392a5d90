"""DyLoRA: LoRA whose first ranks are usable without the later ones (Valipour et al. 2022, arXiv 2210.07558)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_rl.adapter.allocators.build import Allocator, ByStep
from eva_rl.adapter.eva.load import lora_layers
from eva_rl.errors import UserError
from eva_rl.files import read_json, replacing, write_json


def dylora(seed: int) -> Allocator:
    """An allocator that draws a share of the ranks for every step and trains the first ones alone.

    Of r ranks b take part, with the scale that LoRA of rank b has: alpha / b where that of all is alpha / r.
    """

    def put_on(peft_model: nn.Module) -> Draws:
        factors = []
        for _, layer in lora_layers(peft_model):
            factor = Nested(layer.lora_B["default"].weight, layer.use_rslora["default"])
            layer.lora_B["default"] = factor
            factors.append(factor)
        return Draws(factors, seed)

    return Allocator(put_on=put_on)


class Nested(nn.Module):
    """B (out, r), of which training takes the first `taken` columns. Its parameter has the name that LoRA's has."""

    def __init__(self, weight: Tensor, root: bool):
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.taken = weight.shape[1]
        self.root = root
        """Whether LoRA's scale is alpha / sqrt(r)."""

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (..., out) of A x (..., r)."""
        if not self.training or self.taken == self.weight.shape[1]:
            return F.linear(x, self.weight)
        more = self.weight.shape[1] / self.taken
        return (more**0.5 if self.root else more) * F.linear(x[..., : self.taken], self.weight[:, : self.taken])


class Draws(ByStep):
    """Draws the ranks of each step."""

    def __init__(self, factors: list[Nested], seed: int):
        super().__init__(seed)
        self.factors = factors
        self.draw()

    def draw(self) -> None:
        """The same share of each layer's ranks."""
        share = float(torch.rand((), generator=self.generator(self.step)))
        for factor in self.factors:
            factor.taken = 1 + min(int(share * factor.weight.shape[1]), factor.weight.shape[1] - 1)

    def after_step(self, step: int) -> None:
        """Draw for the next one."""
        self.step = step
        self.draw()


def truncate(folder: Path, rank: int, output: Path) -> Path:
    """Cut the adapter of `folder` to its first ranks, write it to `output` in peft's format and return `output`.

    Alpha stays the same. The scale is then alpha / rank, at which DyLoRA trained that many ranks.

    Raises:
        UserError: if the folder holds no LoRA of one rank for all layers, or one of fewer ranks.
    """
    from eva_rl.adapter.attach import WEIGHTS

    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA" or settings.get("rank_pattern") or not 1 <= rank <= settings["r"]:
        raise UserError(
            f"What is cut to rank {rank} must be LoRA of one rank for all layers, at least {rank}, got '{folder}' of rank "
            f"{settings.get('r')}."
        )
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = tensor[:rank].contiguous()
        elif ".lora_B." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :rank].contiguous()
    with replacing(output) as temporary:
        temporary.mkdir(exist_ok=True)
        for other in folder.iterdir():
            if other.suffix == ".json":
                write_json(temporary / other.name, read_json(other))
        write_json(temporary / "adapter_config.json", settings | {"r": rank})
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    return output
