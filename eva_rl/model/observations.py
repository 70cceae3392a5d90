"""From a flat observation to one token: a small network for each kind of part, and one that joins them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from eva_rl.spaces import Part

CELL = 32
"""Numbers that describe a cell of a grid, or a token."""


def make_encoder(parts: Sequence[Part], width: int) -> nn.Module:
    """A module (..., obs) -> (..., width) for observations of these parts, whose vectors are normalised.

    Vectors alone go through one linear layer, as in Chen et al. 2021.
    """
    if all(part.kind == "vector" for part in parts):
        return nn.Linear(sum(part.size for part in parts), width)
    return Encoder(parts, width)


class Encoder(nn.Module):
    """Every part through a network of its own, and several parts then through two layers that let them meet."""

    def __init__(self, parts: Sequence[Part], width: int):
        super().__init__()
        self.sizes = [part.size for part in parts]
        self.networks = nn.ModuleList(NETWORKS[part.kind](part, width) for part in parts)
        self.joint = (
            nn.Sequential(nn.GELU(), nn.Linear(len(parts) * width, width), nn.GELU(), nn.Linear(width, width))
            if len(parts) > 1
            else nn.Identity()
        )

    def forward(self, observations: Tensor) -> Tensor:
        flat = observations.reshape(-1, observations.shape[-1])  # (n, obs)
        seen = [network(part) for network, part in zip(self.networks, flat.split(self.sizes, -1), strict=True)]
        return self.joint(torch.cat(seen, -1)).view(*observations.shape[:-1], -1)


class Image(nn.Module):
    """Three convolutions, as Mnih et al. 2015 with fewer channels: (n, c h w) bytes -> (n, width)."""

    def __init__(self, part: Part, width: int):
        super().__init__()
        self.part = part
        self.layers = nn.Sequential(
            nn.Conv2d(part.shape[0], 16, 8, stride=4),
            nn.GELU(),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(7) if max(part.shape[1:]) > 96 else nn.Identity(),
            nn.Flatten(),
            nn.LazyLinear(width),
        )
        self.layers(torch.zeros(1, *part.shape))  # now the last layer knows its width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(pictures(x, self.part) / 255)


class Grid(nn.Module):
    """Two convolutions over cells, each the sum of its channels' embeddings: (n, c h w) whole numbers -> (n, width)."""

    offsets: Tensor

    def __init__(self, part: Part, width: int):
        super().__init__()
        self.part, (channels, height, columns) = part, part.shape
        self.cells = nn.Embedding(channels * part.values, CELL)
        self.register_buffer("offsets", torch.arange(channels) * part.values, persistent=False)
        self.layers = nn.Sequential(
            nn.Conv2d(CELL, CELL, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(CELL, CELL, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(CELL * height * columns, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        numbers = rearrange(pictures(x, self.part), "n c h w -> n h w c").long() + self.offsets
        cells = self.cells(numbers).sum(-2)  # (n, h, w, CELL)
        return self.layers(rearrange(cells, "n h w e -> n e h w"))


class Tokens(nn.Module):
    """A short text: the embeddings of its words side by side, through a linear layer: (n, length) -> (n, width)."""

    def __init__(self, part: Part, width: int):
        super().__init__()
        self.words = nn.Embedding(part.values, CELL)
        self.layer = nn.Linear(part.size * CELL, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.words(x.long()).flatten(1))


class Choice(nn.Module):
    """An embedding of each choice: (n, 1) -> (n, width)."""

    def __init__(self, part: Part, width: int):
        super().__init__()
        self.choices = nn.Embedding(part.values, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.choices(x[:, 0].long())


class Vector(nn.Linear):
    """A linear layer: (n, size) -> (n, width)."""

    def __init__(self, part: Part, width: int):
        super().__init__(part.size, width)


NETWORKS = {"vector": Vector, "image": Image, "grid": Grid, "tokens": Tokens, "choice": Choice}


def pictures(x: Tensor, part: Part) -> Tensor:
    """Rows (n, c h w) as images (n, c, h, w)."""
    channels, height, width = part.shape
    if part.channels_last:
        return rearrange(x, "n (h w c) -> n c h w", h=height, w=width, c=channels)
    return x.view(-1, channels, height, width)
