"""Where the optimiser is made: the classes of torch and of other libraries, and our own, each in a file of its name."""

from eva_rl.training.optimizers.build import ADAMW, LoraPair, Recipe, lora_pairs, make_optimizer
from eva_rl.training.optimizers.state import pack, unpack

__all__ = ["ADAMW", "LoraPair", "Recipe", "lora_pairs", "make_optimizer", "pack", "unpack"]
