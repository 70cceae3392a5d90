"""Several processes, each with data of its own: what they tell each other. Never activations."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from eva_rl.errors import UserError

T = TypeVar("T")


class Peers:
    """The processes of `torch.distributed`, where it is initialised (accelerate and torchrun do), else this one alone.

    Every process calls the same methods in the same order.
    """

    def __init__(self, device: torch.device, together: bool = True):
        self.device = device
        self.count = dist.get_world_size() if together and dist.is_available() and dist.is_initialized() else 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's values."""
        if self.count > 1:
            values = values.to(self.device, copy=True).contiguous()
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean of every process's values."""
        return self.sum(values) / self.count

    def gather(self, values: Tensor) -> Tensor:
        """(P, ...) every process's values."""
        parts = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def how_many(self, true: bool) -> int:
        """In how many processes it is true."""
        return int(self.sum(torch.tensor(int(true))))

    def attempt(self, function: Callable[[], T]) -> T:
        """Call it. If it raises in one process, raise in all: none waits for messages that will not come."""
        if self.count == 1:
            return function()
        failure = result = None
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 (raised once the others know of it)
            failure = error
        failures = self.how_many(failure is not None)
        if failure is not None:
            raise failure
        if failures:
            raise UserError(f"EVA was ended by an error in {failures} of {self.count} processes: see theirs.")
        return cast(T, result)  # as it did not fail

    def any(self, values: Tensor) -> Tensor:
        """Where it is true in at least one process."""
        return values if self.count == 1 else self.sum(values.int()).cpu() > 0

    def check_alike(self, what: str, value: object) -> None:
        """Raise a `UserError` in all processes unless their values print alike."""
        if self.count > 1:
            prints = self.gather(torch.tensor(zlib.crc32(repr(value).encode()), device=self.device))
            if (prints != prints[0]).any():
                raise UserError(f"EVA was given other {what} in one process than in another: give all the same.")
