"""RefLoRA: the factors' gradients as of the refactoring with the tightest bound (2025, arXiv 2505.18877)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_rl.training.optimizers.build import LoraPair, on_gradients


def reflora(
    groups: list[dict[str, Any]], lr: float, pairs: list[LoraPair], warmup: int = 100, **adamw: Any
) -> torch.optim.Optimizer:
    """AdamW on g_A <- S^-1 g_A and g_B <- g_B S once `warmup` steps are over, S solving S A A^T S = B^T B."""

    def precondition(optimizer: torch.optim.Optimizer) -> None:
        for pair in pairs:
            steps = optimizer.state.get(pair.b, {}).get("step", 0)
            if steps < warmup or pair.a.grad is None or pair.b.grad is None:
                continue
            s = refactoring(pair.a @ pair.a.T, pair.b.T @ pair.b)  # (r, r)
            pair.a.grad.copy_(torch.linalg.solve(s, pair.a.grad.double()))
            pair.b.grad.copy_(pair.b.grad.double() @ s)

    return on_gradients(torch.optim.AdamW(groups, lr=lr, **adamw), precondition)


def refactoring(gram_a: Tensor, gram_b: Tensor, damping: float = 1e-12) -> Tensor:
    """The positive definite S (r, r) of S gram_a S = gram_b, in double precision.

    S = P^-1 (P gram_b P)^(1/2) P^-1 with P = gram_a^(1/2), the geometric mean of gram_a^-1 and gram_b.
    """
    root, inverse_root = _powers(gram_a.double(), damping)
    middle, _ = _powers(root @ gram_b.double() @ root, damping)
    return inverse_root @ middle @ inverse_root


def _powers(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The square root of a positive semi-definite matrix and that root's inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=damping).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
