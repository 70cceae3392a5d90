"""ALLoRA: rows of B learn the faster the shorter they are (Huang & Balestriero 2024, arXiv 2410.09692)."""

from __future__ import annotations

from typing import Any

import torch

from eva_rl.errors import UserError
from eva_rl.training.optimizers.build import LoraPair


def allora(
    groups: list[dict[str, Any]], lr: float, pairs: list[LoraPair], eta: float = 2.0, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW whose learning rate for row i of B is divided by sqrt(||B_i|| + 1 / eta^2): eta times the rate at zero.

    Raises:
        UserError: if LoRA is scaled, which the method is to make superfluous.
    """
    if scaled := [pair.scale for pair in pairs if pair.scale != 1]:
        raise UserError(f"LoRA's scale must be 1 with optimizer=allora, got {scaled[0]:g}: set lora_alpha to the rank.")
    optimizer = torch.optim.AdamW(groups, lr=lr, **adamw)
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def remember(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        before[:] = [pair.b.clone() for pair in pairs]

    @torch.no_grad()
    def lengthen(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for pair, old in zip(pairs, before, strict=True):
            factor = (old.norm(dim=1, keepdim=True) + eta**-2).rsqrt()  # (out, 1)
            pair.b.copy_(old + factor * (pair.b - old))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(lengthen)
    return optimizer
