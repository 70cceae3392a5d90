"""Ranks that are decided for LoRA from outside: before it starts, or while it trains. Each way is a file of its name."""

from eva_rl.adapter.allocators.build import Allocator, Idle, lora_pairs_at_zero

__all__ = ["Allocator", "Idle", "lora_pairs_at_zero"]
