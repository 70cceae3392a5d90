"""KaSA's part in training: the penalties that peft has for it and leaves to the loop (Wang et al. 2024, arXiv 2412.06071)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from eva_rl.adapter.allocators import Idle

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraModel, PeftModel


class Kasa(Idle):
    """See `eva_rl.training.Companion`."""

    def __init__(self, peft_model: PeftModel):
        self.tuner = cast("LoraModel", peft_model.base_model)

    def penalty(self) -> Tensor:
        """beta sum g^2 + gamma (||B^T B - I||_F + ||A A^T - I||_F), summed over layers, g being the trained singular values (eq. 9-11)."""
        return torch.as_tensor(self.tuner._get_kasa_loss())
