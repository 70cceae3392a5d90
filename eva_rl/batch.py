"""Windows of consecutive steps, as tensors that a model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Windows of T consecutive steps, each starting at position 0 and padded with zeros at its end.

    Under a causal mask no real token attends to padding on its right, so models ignore `mask`. Losses do not.
    """

    #: (B, T, obs) flat: float32, uint8 where bytes hold all of it, or float64 where float32 doesn't
    observations: Tensor
    actions: Tensor  #: (B, T, act) float32, or int64 choices: (B, T) of one, (B, T, components) of several
    returns_to_go: Tensor  #: (B, T) float32: undiscounted sum of the rewards from this step to the episode's end
    rewards: Tensor  #: (B, T) float32
    mask: Tensor  #: (B, T) bool: True where the step is real
    interface: str
    tasks: Tensor | None = (
        None  #: (B,) int64: rows of the interface's task vectors, -1 for none; None: the one in force
    )
    labels: Tensor | None = None  #: as actions: what is to be predicted, where that is not the action that was taken

    @property
    def parts(self) -> tuple[Batch, ...]:
        """The batches of one interface each that it consists of: itself."""
        return (self,)

    @property
    def steps(self) -> Tensor:
        """How many steps are real."""
        return self.mask.sum()

    def to(self, device: torch.device | str) -> Batch:
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def of(self, rows: Tensor) -> Batch:
        """These of its windows, in this order."""
        return self._mapped(lambda value: value[rows])

    def share(self, index: int, count: int) -> Batch:
        """Its windows `index`, `index + count` and so on: `count` shares make up the whole."""
        return self._mapped(lambda value: value[index::count])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Mixture:
    """Windows of several interfaces that make up one batch."""

    parts: tuple[Batch, ...]

    @property
    def steps(self) -> Tensor:
        return torch.stack([part.steps for part in self.parts]).sum()

    def to(self, device: torch.device | str) -> Mixture:
        return Mixture(tuple(part.to(device) for part in self.parts))

    def share(self, index: int, count: int) -> Mixture:
        """As `Batch.share`, with the parts' remainders dealt out in turn, so that shares are of equal size."""
        shares, first = [], index
        for part in self.parts:
            shares.append(part.share(first % count, count))
            first -= len(part.mask)
        return Mixture(tuple(part for part in shares if len(part.mask)))
