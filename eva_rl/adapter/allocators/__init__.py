"""What is decided from outside: LoRA's ranks, before it starts or while it trains, and which blocks train. A file each."""

from eva_rl.adapter.allocators.build import Allocator, Idle, lora_pairs_at_zero

__all__ = ["Allocator", "Idle", "lora_pairs_at_zero"]
