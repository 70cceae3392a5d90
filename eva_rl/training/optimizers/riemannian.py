"""Riemannian preconditioning of LoRA's gradients (Zhang & Pilanci 2024, arXiv 2402.02347)."""

from __future__ import annotations

from typing import Any

import torch

from eva_rl.training.optimizers.build import LoraPair, damped_inverse, on_gradients


def riemannian(
    groups: list[dict[str, Any]], lr: float, pairs: list[LoraPair], damping: float = 1e-2, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW on g_A <- (B^T B + damping I)^-1 g_A and g_B <- g_B (A A^T + damping I)^-1 (eq. 3).

    peft's `create_riemannian_optimizer` does the same with all parameters at one learning rate and weight decay.
    """

    def precondition(_: torch.optim.Optimizer) -> None:
        for pair in pairs:
            gram_a = damped_inverse(pair.a @ pair.a.T, damping)  # (r, r)
            gram_b = damped_inverse(pair.b.T @ pair.b, damping)  # (r, r)
            if pair.a.grad is not None:
                pair.a.grad.copy_(gram_b.to(pair.a.dtype) @ pair.a.grad)
            if pair.b.grad is not None:
                pair.b.grad.copy_(pair.b.grad @ gram_a.to(pair.b.dtype))

    return on_gradients(torch.optim.AdamW(groups, lr=lr, **adamw), precondition)
