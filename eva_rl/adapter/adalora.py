"""AdaLoRA's part in training: ranks pruned by importance, singular vectors kept orthonormal (arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from eva_rl.adapter.allocators import Idle

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import AdaLoraConfig, AdaLoraModel, PeftModel

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Pruning(Idle):
    """peft's rank allocator, its penalty and its state, see `eva_rl.training.Companion`."""

    def __init__(self, peft_model: PeftModel):
        self.tuner = cast("AdaLoraModel", peft_model.base_model)
        self.config = cast("AdaLoraConfig", peft_model.peft_config["default"])

    def penalty(self) -> Tensor:
        """gamma times the mean over the matrices of ||A A^T - I||_F and ||B^T B - I||_F (eq. 4), as peft adds it."""
        norms = []
        for name, p in self.tuner.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p  # (r, r)
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        """Prune after optimiser step number `step`, counted from 1, while the gradients are still there."""
        self.tuner.update_and_allocate(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Importances averaged so far, and the ranks that are left."""
        averages = {key: getattr(self.tuner.rankallocator, key) for key in AVERAGES}
        state = {f"{key}.{name}": value for key, values in averages.items() for name, value in values.items()}
        pattern = self.config.rank_pattern or {}
        return state | {f"rank_pattern.{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for key in AVERAGES:
            found = {n.removeprefix(key + "."): value.clone() for n, value in state.items() if n.startswith(key + ".")}
            setattr(self.tuner.rankallocator, key, found)
        prefix = "rank_pattern."
        pattern = {n.removeprefix(prefix): kept.tolist() for n, kept in state.items() if n.startswith(prefix)}
        self.config.rank_pattern = pattern or None
