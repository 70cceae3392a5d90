"""How many weights a method trains, and the size at which it trains as many as another."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

from torch import nn

from eva_rl.adapter.attach import targets, trainable_parameters
from eva_rl.errors import UserError, in_one_line

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftConfig

    from eva_rl.adapter.eva.typed import AdapterConfig


def within_budget(
    model: nn.Module,
    make: Callable[[int | None], PeftConfig],
    budget: str | None,
    rank: int,
    tolerance: float,
    sizes: Sequence[int] | None = None,
) -> PeftConfig:
    """The config that `make` gives for the size whose adapter trains `budget` weights.

    Args:
        make: gives the config of a size, or for None the config as it stands.
        budget: a number, or `params` for as many as LoRA of this rank trains on the same layers. None: the config as it
            stands.
        tolerance, sizes: see `matched`.

    Raises:
        UserError: if no size meets the budget.
    """
    config = make(None)
    if budget is None:
        return config
    return matched(
        model, make, lora_weights(model, config, rank) if budget == "params" else int(budget), tolerance, sizes
    )


def lora_weights(model: nn.Module, config: PeftConfig, rank: int) -> int:
    """How many weights LoRA of this rank trains on the layers that `config` is for: the sum of rank * (in + out)."""
    return sum(rank * sum(weight.shape) for weight in targets(model, config).values())


def count(model: nn.Module, config: PeftConfig) -> int:
    """How many weights the adapter of this config trains, found on a copy of the model without memory.

    Raises:
        UserError: if the config does not fit the model.
    """
    from peft import get_peft_model

    config, skeleton = copy.deepcopy(config), copy.deepcopy(model).to("meta")
    if getattr(config, "init_lora_weights", "mica") != "mica":
        cast("LoraConfig", config).init_lora_weights = True  # no decomposition of weights that are not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the adapter is made
            try:
                made = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
            except NotImplementedError:  # SHiRA looks for the entries to train
                made = get_peft_model(copy.deepcopy(model).to_empty(device="cpu"), config)
    except (ValueError, TypeError) as error:
        raise UserError(f"The adapter does not fit the model: {in_one_line(error)}") from error
    put_on = getattr(config, "put_on", None)
    if put_on is not None:
        put_on(made)
    counters = sum(p.numel() for name, p in made.named_parameters() if "ranknum" in name and p.requires_grad)
    return trainable_parameters(made) - counters  # AdaLoRA's, which peft forgets to freeze where there is no memory


def matched(
    model: nn.Module,
    make: Callable[[int], PeftConfig],
    budget: int,
    tolerance: float,
    sizes: Sequence[int] | None = None,
) -> PeftConfig:
    """The config, of those that `make` gives for a size, whose adapter trains as near to `budget` weights as possible.

    Where the ranks of a LoRA are too coarse, some layers get one more than the others: all but those last in the model.

    Args:
        sizes: all that there are, in ascending order. None: 1, 2, 3 and so on. The number of weights must rise with
            them throughout, or fall throughout.
        tolerance: how far off the number may be, as a share of the budget.

    Raises:
        UserError: if no size is near enough.
    """

    skeleton = copy.deepcopy(model).to("meta")

    @cache
    def weights(size: int) -> int | None:
        try:
            return count(skeleton, make(size))
        except UserError:
            if size == 1 and sizes is None:
                raise  # it is not the size
            return None

    found = {size: weights(size) for size in sizes or _around(weights, budget)}
    found = {size: number for size, number in found.items() if number is not None}
    if found:
        best = min(found, key=lambda size: abs(found[size] - budget))
        if abs(found[best] - budget) <= tolerance * budget:
            return make(best)
        below = [size for size, number in found.items() if number < budget]
        most = max(below, key=lambda size: found[size], default=None)
        mixed = None if most is None else _with_some_ranks_more(skeleton, make, most, budget)
        if mixed is not None and abs(count(skeleton, mixed) - budget) <= tolerance * budget:
            return mixed
    near = sorted(set(found.values()), key=lambda number: abs(number - budget))[:2]
    raise UserError(
        f"A budget of {budget} trainable weights was asked for; the nearest this method comes on these layers is "
        f"{' or '.join(map(str, near)) or 'none at all'}: set adapter.budget to one of these, or a wider adapter.tolerance."
    )


def _around(weights: Callable[[int], int | None], budget: int) -> list[int]:
    """The two successive sizes between which a monotonous number of weights crosses the budget."""
    low, high = 1, 2
    falling = (weights(2) or 0) < (weights(1) or 0)

    def beyond(size: int) -> bool:
        number = weights(size)
        return number is None or (number <= budget if falling else number >= budget)

    one, two = weights(1), weights(2)
    if one is not None and two is not None and two > one:  # most methods' numbers lie on a line
        guess = max(2, math.ceil(1 + (budget - one) / (two - one)))
        if beyond(guess) and not beyond(guess - 1):
            return [guess - 1, guess]
    while not beyond(high):
        if falling and (weights(2 * high) or 0) >= (weights(high) or 0):
            break  # RandLora's falls until the rank is that of the layers, then rises
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return [low, high]


def _with_some_ranks_more(
    model: nn.Module, make: Callable[[int], PeftConfig], size: int, budget: int
) -> PeftConfig | None:
    """The LoRA config of this size with one rank more, at the same scale, for as many layers as the budget allows."""
    config, more = cast("AdapterConfig", make(size)), cast("AdapterConfig", make(size + 1))
    if not hasattr(config, "lora_alpha") or hasattr(config, "init_r"):
        return None
    left = budget - count(model, config)
    for name, weight in targets(model, config).items():
        cost = sum(weight.shape)
        if cost <= left:
            config.rank_pattern[name], config.alpha_pattern[name] = more.r, more.lora_alpha
            left -= cost
    return config
