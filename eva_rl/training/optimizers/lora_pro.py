"""LoRA-Pro: LoRA's factors move so that their product moves as W would (Wang et al. 2024, arXiv 2407.18242)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_rl.training.optimizers.build import LoraPair, damped_inverse, on_gradients
from eva_rl.training.optimizers.moments import adam_direction, move


def lora_pro(
    groups: list[dict[str, Any]], lr: float, pairs: list[LoraPair], damping: float = 1e-8, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW whose moments, for LoRA's factors, are those of the gradient of W that they stand for.

    The factors' gradients are adjusted, Adam's direction is taken of the equivalent gradient of W (out, in), and the
    factors' changes are those that come nearest to it. The authors' code has the scale of rank 8 and alpha 16 written into
    it. Here the scale is the layer's own. Other parameters are AdamW's.
    """

    def step(optimizer: torch.optim.Optimizer) -> None:
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for pair in pairs:
            if pair.a.grad is None or pair.b.grad is None:
                continue
            group = group_of[id(pair.b)]
            full = equivalent(pair, *adjusted(pair, pair.a.grad, pair.b.grad, damping))
            direction = adam_direction(optimizer.state[pair.b], full, group["betas"], group["eps"])
            s = pair.scale
            change_a, change_b = adjusted(pair, s * pair.b.T @ direction, s * direction @ pair.a.T, damping)
            move(pair.a, group_of[id(pair.a)], change_a)
            move(pair.b, group, change_b)

    return on_gradients(torch.optim.AdamW(groups, lr=lr, **adamw), step)


def equivalent(pair: LoraPair, change_a: Tensor, change_b: Tensor) -> Tensor:
    """The gradient of W (out, in) that these changes of the factors stand for: s (B change_a + change_b A)."""
    return pair.scale * (pair.b @ change_a + change_b @ pair.a)


def adjusted(pair: LoraPair, gradient_a: Tensor, gradient_b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The changes of A (r, in) and B (out, r) whose equivalent gradient is nearest to that of W (theorems 2.1 and 2.3).

    They are (B^T B)^-1 g_A / s^2 + X A  and  (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X. X does not change the
    equivalent gradient, and makes the changes nearest to the gradients: B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2.
    """
    a, b, g_a, g_b = (t.double() for t in (pair.a, pair.b, gradient_a, gradient_b))
    g_a, g_b = g_a / pair.scale**2, g_b / pair.scale**2
    inverse_a, inverse_b = damped_inverse(a @ a.T, damping), damped_inverse(b.T @ b, damping)  # (r, r)
    from_a = inverse_b @ g_a
    x = sylvester(b.T @ b, a @ a.T, -from_a @ a.T, damping)
    from_b = g_b @ inverse_a
    change_b = from_b - b @ (inverse_b @ (b.T @ from_b)) - b @ x
    return (from_a + x @ a).to(pair.a.dtype), change_b.to(pair.b.dtype)


def sylvester(left: Tensor, right: Tensor, value: Tensor, damping: float) -> Tensor:
    """X of left X + X right = value, all (r, r), the first two symmetric and positive semi-definite."""
    p, u = torch.linalg.eigh(left)
    q, v = torch.linalg.eigh(right)
    return u @ ((u.T @ value @ v) / (p[:, None] + q + damping)) @ v.T
