"""One run in several processes, as `torchrun` and `accelerate launch` start them: each trains on its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is."""

    index: int = 0
    count: int = 1
    state: PartialState | None = None

    @property
    def first(self) -> bool:
        """Whether this one writes files and draws progress bars."""
        return self.index == 0

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before the others do: it makes the files that they find."""
        with nullcontext() if self.state is None else self.state.main_process_first():
            yield

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients and the loss over all processes, and return the sum of the losses.

        A parameter that has no gradient in any process keeps none, as in a single one.
        """
        if self.count == 1:
            return loss
        there = torch.tensor([p.grad is not None for p in parameters], dtype=loss.dtype, device=loss.device)
        flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        summed = torch.cat([*flat, there, loss.view(1)])
        torch.distributed.all_reduce(summed)
        *gradients, there, loss = summed.split([*(p.numel() for p in parameters), len(parameters), 1])
        for p, gradient, somewhere in zip(parameters, gradients, there.tolist(), strict=True):
            p.grad = gradient.view_as(p) if somewhere else None
        return loss.squeeze(0)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes of this run: those that a launcher started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    from accelerate import PartialState  # it takes seconds to import

    # The others wait while the first process collects.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(hours=12))
    try:
        yield Processes(state.process_index, state.num_processes, state)
    finally:
        state.destroy_process_group()
