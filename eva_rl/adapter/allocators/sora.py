"""SoRA: a gate on every rank, which a proximal step draws to zero (Ding et al. 2023, arXiv 2311.11696). CoDyRA's variant, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eva_rl.adapter.allocators.build import Allocator, Idle, lora_pairs_at_zero
from eva_rl.errors import UserError


def sora(threshold: float, steps: int, penalty: float = 0.0, dense: float = 0.0, ramp: bool = False) -> Allocator:
    """An allocator that makes the update s B diag(g) A, with g <- sign(g) max(|g| - threshold, 0) after each step.

    Args:
        steps: the number of training steps.
        penalty: the factor with which the gates' mean |g| is added to the loss, too.
        dense: the share of the steps before the first proximal one.
        ramp: whether the threshold grows from 0 over the other steps, as CoDyRA's does (arXiv 2412.01004).

    Raises:
        UserError: if a setting makes no sense.
    """
    if threshold < 0 or penalty < 0 or not 0 <= dense < 1:
        raise UserError(
            "allocator.config must have threshold and penalty of at least 0 and dense in [0, 1), got "
            f"threshold={threshold}, penalty={penalty}, dense={dense}."
        )

    def put_on(peft_model: nn.Module) -> Gates:
        from eva_rl.adapter.sandwich import Sandwich

        found: list[Tensor] = []
        for _, layer in lora_pairs_at_zero(peft_model, "sora"):
            b = layer.lora_B["default"].weight  # (out, r)
            factor = Sandwich(b, torch.randn(b.shape[1]).to(b), trained=("left", "middle"))  # gates of N(0, 1)
            layer.lora_B["default"] = factor
            found.append(factor.middle)
        return Gates(found, threshold, penalty, round(dense * steps), steps if ramp else None)

    return Allocator(put_on=put_on)


class Gates(Idle):
    """The gates, one vector (r,) a layer, while they train.

    Args:
        last: the step at which the threshold has grown to its full size. None: it has that size from the start.
    """

    def __init__(self, gates: list[Tensor], threshold: float, penalty: float, first: int, last: int | None):
        self.gates, self.threshold, self.strength, self.first, self.last = gates, threshold, penalty, first, last

    def penalty(self) -> Tensor:
        """The mean |g|, times its strength."""
        return self.strength * torch.cat(self.gates).abs().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The proximal step of the L1 norm."""
        if step <= self.first:
            return
        share = 1.0 if self.last is None else min(1.0, (step - self.first) / max(1, self.last - self.first))
        for gate in self.gates:
            gate.copy_(gate.sign() * (gate.abs() - share * self.threshold).clamp(min=0.0))
