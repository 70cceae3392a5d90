"""LISA: a few blocks of the trunk train at a time, drawn anew now and then (Pan et al. 2024, arXiv 2403.17919)."""

from __future__ import annotations

import torch
from torch import nn

from eva_rl.adapter.allocators.build import Allocator, ByStep
from eva_rl.errors import UserError


def lisa(active: int, every: int, seed: int) -> Allocator:
    """An allocator that draws `active` blocks every `every` steps.

    What is in no block, such as the embedder and the head, always trains.

    Raises:
        UserError: if a number makes no sense.
    """
    if active < 1 or every < 1:
        raise UserError(f"active and every in allocator.config must be at least 1, got {active} and {every}.")
    return Allocator(
        put_on=lambda model: Blocks(blocks_of(model), active, every, seed),
        on_all=lambda model: Blocks(blocks_of(model), active, every, seed),
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The trunk's blocks: the members of the list of modules that holds the most weights.

    Raises:
        UserError: if there is no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError("allocator=lisa draws blocks of a trunk, and this model has no list of modules.")
    return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters())))


class Blocks(ByStep):
    """Draws the blocks of each period."""

    def __init__(self, blocks: list[nn.Module], active: int, every: int, seed: int):
        super().__init__(seed)
        self.blocks, self.active, self.every = blocks, min(active, len(blocks)), every
        self.trained: list[list[nn.Parameter]] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Draw for the first steps: the optimiser knows all weights by now, and passes over those without a gradient.

        What is frozen by now, by an optimiser too, stays so.
        """
        self.trained = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self.draw()

    def draw(self) -> None:
        """The blocks of the period that the step is in."""
        generator = self.generator(self.step // self.every)
        drawn = torch.randperm(len(self.trained), generator=generator)[: self.active].tolist()
        for number, parameters in enumerate(self.trained):
            for parameter in parameters:
                parameter.requires_grad_(number in drawn)

    def after_step(self, step: int) -> None:
        """Draw anew where a period ends."""
        self.step = step
        if step % self.every == 0:
            self.draw()
