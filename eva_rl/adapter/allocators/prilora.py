"""PRILoRA's ranks: more for deeper layers (Benedek & Wolf 2024, arXiv 2401.11316). Without its pruning, which no source confirms."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from torch import nn

from eva_rl.adapter.allocators.build import Allocator
from eva_rl.adapter.eva.load import by_pattern
from eva_rl.errors import UserError

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig


def prilora(spread: float = 0.5) -> Allocator:
    """An allocator whose ranks rise linearly with depth, from (1 - spread) r in the first block to (1 + spread) r in the last.

    Blocks alike have r on average, and so as many weights as before. Alpha grows with the rank, so that the scale is everyone's.

    Raises:
        UserError: if the spread is no share.
    """
    if not 0 <= spread < 1:
        raise UserError(
            f"allocator.config.spread must be at least 0 and less than 1, got {spread}: the first block's ranks are "
            "(1 - spread) r."
        )

    def ranks(model: nn.Module, config: LoraConfig) -> LoraConfig:
        from eva_rl.adapter.attach import targets

        config, names = copy.deepcopy(config), list(targets(model, config))
        depths = depths_of(names)
        blocks = max(depths) or 1
        given, alphas = config.rank_pattern, config.alpha_pattern
        config.rank_pattern, config.alpha_pattern = {}, {}  # where two patterns fit a layer, peft takes the first
        for name, depth in zip(names, depths, strict=True):
            rank = by_pattern(given, name, config.r)
            alpha = by_pattern(alphas, name, config.lora_alpha)
            share = 1 + spread * (2 * depth / blocks - 1) if max(depths) else 1
            config.rank_pattern[name] = max(1, round(rank * share))
            growth = config.rank_pattern[name] / rank
            config.alpha_pattern[name] = alpha * (growth**0.5 if config.use_rslora else growth)
        return config

    return Allocator(ranks=ranks)


def depths_of(names: list[str]) -> list[int]:
    """The number of the block, counted from 0, that each layer of this name is in: the first number in its name tells."""
    numbers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", f".{name}.")) else -1 for name in names]
    order = sorted(set(numbers))
    return [order.index(number) for number in numbers]
