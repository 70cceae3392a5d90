"""LoRA-FA: A stays as it started, B learns from the gradient that comes nearest to W's (arXiv 2308.03303)."""

from __future__ import annotations

from typing import Any

import torch

from eva_rl.training.optimizers.build import LoraPair, damped_inverse, on_gradients


def lora_fa(
    groups: list[dict[str, Any]], lr: float, pairs: list[LoraPair], damping: float = 1e-8, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW on g_B <- g_B (A A^T)^-1 / scale^2, as in peft's `create_lorafa_optimizer`.

    Of all changes of B, this one moves scale B A nearest to W's gradient. A must be frozen.
    """

    def precondition(_: torch.optim.Optimizer) -> None:
        for pair in pairs:
            if pair.b.grad is not None:
                gram = damped_inverse(pair.a @ pair.a.T, damping).to(pair.b.dtype)  # (r, r)
                pair.b.grad.copy_(pair.b.grad @ gram / pair.scale**2)

    return on_gradients(torch.optim.AdamW(groups, lr=lr, **adamw), precondition)
