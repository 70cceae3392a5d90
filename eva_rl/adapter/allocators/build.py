"""What an allocator is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva.load import lora_layers
from eva_rl.errors import UserError

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel

    from eva_rl.adapter.eva.typed import LoraLayer


@dataclass(frozen=True)
class Allocator:
    """When and how ranks are decided."""

    ranks: Callable[[nn.Module, LoraConfig], LoraConfig] | None = None
    """Before the start: the model and its LoRA's config -> the config with other ranks."""
    put_on: Callable[[PeftModel], Any] | None = None
    """After the start: changes the LoRA that was made, and gives what takes part in training, see `eva_rl.training.Companion`."""
    on_all: Callable[[nn.Module], Any] | None = None
    """The same for a model whose weights are all trained, or None if the allocator is for LoRA alone."""


class Idle:
    """A companion of training that does nothing: each allocator says what it does instead."""

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser is left alone."""

    def penalty(self) -> Tensor:
        """None."""
        return torch.zeros(())

    def after_step(self, step: int) -> None:
        """Nothing is done after steps."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing was remembered."""


class ByStep(Idle):
    """A companion whose draws follow from the run's seed and the step's number alone, so that the number is all it remembers."""

    def __init__(self, seed: int):
        self.seed, self.step = seed, 0

    def draw(self) -> None:
        """Draw for the step that comes."""
        raise NotImplementedError

    def generator(self, number: int) -> torch.Generator:
        """That of the draw of this number."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def state_dict(self) -> dict[str, Tensor]:
        """How many steps were made."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.step = int(state["step"])
        self.draw()


def lora_pairs_at_zero(peft_model: nn.Module, what: str) -> list[tuple[str, LoraLayer]]:
    """The layers with LoRA by their names, if all of them start at B = 0.

    Raises:
        UserError: if one does not. `what` is the allocator's name.
    """
    layers = lora_layers(peft_model)
    for name, layer in layers:
        if layer.lora_B["default"].weight.any():
            raise UserError(
                f"allocator={what} changes the scale of every rank, so that LoRA has to start at zero; layer '{name}' does not: take "
                "adapter=lora, eva or another one whose B is zero at first."
            )
    return layers
