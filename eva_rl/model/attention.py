"""Causal attention, and how it stays quick in bfloat16 on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from eva_rl.settings import ModelConfig

VECTOR = 32
"""bfloat16 numbers in a vector register of 512 bits."""


class CausalSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(d_head), causal) V."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.o = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, read: slice = slice(None)) -> Tensor:
        """(B, N, d) -> (B, n, d), of the n tokens that `read` picks."""
        read_from = x if read == slice(None) else x[:, read]  # the very tensor that k and v read, where it is all of it
        q, k, v = self.q(read_from), self.k(x), self.v(x)
        q, k, v = (rearrange(y, "b n (h e) -> b h n e", h=self.heads) for y in (q, k, v))
        start, _, stride = read.indices(x.shape[1])
        return self.o(rearrange(attend(q, k, v, start, stride), "b h n e -> b n (h e)"))


def attend(q: Tensor, k: Tensor, v: Tensor, start: int = 0, stride: int = 1) -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(e)) v: query i sees the keys 0 ... start + i stride.

    Args:
        q: (..., n, e).
        k, v: (..., m, e), m > start + (n - 1) stride.
    """
    shape, n, m = q.shape[:-2], q.shape[-2], k.shape[-2]
    if q.device.type != "cpu" or (q.dtype == torch.float32 and n == m):
        seen = None if n == m else torch.arange(m, device=q.device) <= last_seen(n, start, stride, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    # In bfloat16 on CPUs the fused kernel is two to three times slower than its formula, at these lengths.
    with torch.autocast("cpu", enabled=False):  # whose softmax would go to float32 and back
        if spare := padded(m, q.dtype) - m:
            k, v, m = F.pad(k, (0, 0, 0, spare)), F.pad(v, (0, 0, 0, spare)), m + spare
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q * q.shape[-1] ** -0.5, k, v))
        mask = unseen(n, m, start, stride, q.dtype)
        scores = torch.baddbmm(mask.expand(len(q), n, m), q, k.transpose(-1, -2))  # (B, n, m)
        return (scores.softmax(-1) @ v).view(*shape, n, -1)


def unseen(n: int, m: int, start: int, stride: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """(n, m), to be added to scores: zero at the keys 0 ... start + i stride, which query i sees, else minus infinity."""
    hidden = torch.arange(m, device=device) > last_seen(n, start, stride, device)
    return torch.zeros(n, m, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def padded(keys: int, dtype: torch.dtype) -> int:
    """`keys` rounded up to whole vector registers where that adds few: the softmax of bfloat16 is slow on a remainder."""
    spare = -keys % VECTOR
    return keys + spare if dtype == torch.bfloat16 and spare < VECTOR / 2 else keys


def last_seen(n: int, start: int, stride: int, device: torch.device | None = None) -> Tensor:
    """The last key that each query sees, (n, 1)."""
    return start + stride * torch.arange(n, device=device)[:, None]
