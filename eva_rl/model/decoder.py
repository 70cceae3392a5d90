"""Acting step by step: the keys and values of past tokens are kept, so that a step costs its own tokens and no more."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from eva_rl.interface import Batch
from eva_rl.model.decision_transformer import Block, DecisionTransformer, attend, padded

LEAST = 16
"""Episodes computed at a time at least: for fewer rows, libraries take other kernels, which round differently."""


class Decoder:
    """Greedy actions for n episodes that step together; `act` and `record` take turns.

    A token's position is that of its step in the window, so a window that slid would change every key. It grows instead:
    when it holds `context` steps, it starts anew with the later half of them, whose keys and values are computed again.
    So an action sees between context / 2 and context steps (fewer only at the start of an episode), for the price of one
    pass over half a window every context / 2 steps. Training predicts the action of every step of a window, so that the
    model knows windows of every length.

    The model's weights are read once, here: under autocast they are cast once, and not at every step. Its adapter must be
    merged into them.

    An episode's actions do not depend on those beside it, bit for bit on CPUs.
    """

    @torch.no_grad()
    def __init__(self, model: DecisionTransformer, interface: str, episodes: int):
        config = model.config
        self.model, self.episodes = model, episodes
        self.embedder, self.head = model.embedders[interface], model.heads[interface]
        self.kinds, self.state = len(self.embedder.tokens), self.embedder.tokens.index("state")
        self.places = model.trunk.places(self.embedder.tokens)
        spec, device = self.embedder.interface, model.trunk.positions.weight.device
        self.dtype = model.trunk.positions.weight.dtype
        if torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.blocks = [_Weights.of(block, self.dtype) for block in model.trunk.blocks]
        rows = max(episodes, LEAST)
        self.now = Batch(
            observations=torch.zeros(rows, 1, spec.observation_size, device=device),
            actions=torch.zeros(rows, 1, *spec.action_shape, device=device),
            returns_to_go=torch.zeros(rows, 1, device=device),
            rewards=torch.zeros(rows, 1, device=device),
            mask=torch.ones(rows, 1, dtype=torch.bool, device=device),
            interface=interface,
        )
        """The newest step."""
        self.tokens = torch.zeros(rows, config.context * self.kinds, config.width, device=device)
        """The window, embedded: (n, N, d)."""
        self.length = 0
        """Steps in the window."""
        self.heads = config.heads
        # (layers, keys and values, n, h, N, e)
        places = padded(config.context * self.kinds, self.dtype)
        kept = (config.layers, 2, rows, self.heads, places, config.width // self.heads)
        self.cache = torch.zeros(kept, device=device, dtype=self.dtype)
        self.kept = 0
        """Tokens whose keys and values are there."""

    @torch.no_grad()
    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """The next action of each episode, in the environment's units: (n, *action_shape), int64 where it is a choice.

        Args:
            observations: (n, obs).
            returns_to_go: (n,) what is asked for from here on.
        """
        if self.length == self.model.config.context:
            self._start_anew()
        self.length += 1
        self._show(observations=observations, returns_to_go=returns_to_go)
        self._embed(0, self.state + 1)
        end = (self.length - 1) * self.kinds + self.state + 1  # later tokens of this step are not known yet
        features = self._extend(self.tokens[:, self.kept : end] + self.places[self.kept : end])
        predicted = self.head(self.model.trunk.norm(features))[: self.episodes].float()  # (n, act)
        return self.embedder.greedy(predicted)

    @torch.no_grad()
    def record(self, actions: Tensor, rewards: Tensor) -> None:
        """What was done (n, *action_shape), and what it earned (n,)."""
        self._show(actions=actions, rewards=rewards)
        self._embed(self.state + 1, self.kinds)

    def keep(self, episodes: Tensor) -> None:
        """Go on with these episodes (m,) only, in this order."""
        self.episodes = len(episodes)
        rows = torch.cat([episodes, episodes[:1].expand(max(LEAST - len(episodes), 0))])
        tensors = {k: v[rows] for k, v in vars(self.now).items() if isinstance(v, Tensor)}
        self.now = replace(self.now, **tensors)
        self.tokens = self.tokens[rows]
        self.cache = self.cache[:, :, rows]

    def _show(self, **known: Tensor) -> None:
        """Put what is known of the newest step, a row an episode, into `now`."""
        for name, value in known.items():
            spare = value[:1].expand(len(self.now.mask) - len(value), *value.shape[1:])
            self.now = replace(self.now, **{name: torch.cat([value, spare])[:, None]})

    def _embed(self, first: int, last: int) -> None:
        """Embed the newest step's tokens of the kinds from number `first` to `last` (excluded)."""
        for number in range(first, last):
            place = (self.length - 1) * self.kinds + number
            self.tokens[:, place] = self.embedder.embed(self.embedder.tokens[number], self.now)[:, 0]

    def _start_anew(self) -> None:
        half = max(1, self.model.config.context // 2) if self.model.config.context > 1 else 0
        first = (self.length - half) * self.kinds
        self.tokens[:, : half * self.kinds] = self.tokens[:, first : self.length * self.kinds].clone()
        self.length, self.kept = half, 0

    def _extend(self, x: Tensor) -> Tensor:
        """Run the trunk on new tokens (n, m, d), keep their keys and values; return the last one's features (n, d)."""
        start, end, d = self.kept, self.kept + x.shape[1], x.shape[2]
        for (keys, values), block in zip(self.cache, self.blocks, strict=True):
            normed = block.attention_norm(x).to(self.dtype)
            last = block is self.blocks[-1]  # the others' outputs would go nowhere
            first = d if last else 0  # of qkv's outputs
            qkv = F.linear(normed, block.qkv[first:], block.qkv_bias[first:])  # (n, m, 3 d), or 2 d
            keys[..., start:end, :], values[..., start:end, :] = (self._split(y) for y in qkv.split(d, -1)[-2:])
            if last:
                # A product with a view in three dimensions would copy the weights for each episode.
                x, q = x[:, -1:], F.linear(normed[:, -1].contiguous(), block.qkv[:d], block.qkv_bias[:d])[:, None]
            else:
                q = qkv[..., :d]
            # All the cache, not [:end] of it: a contiguous tensor is multiplied faster, and the rest is masked.
            y = attend(self._split(q), keys, values, end - q.shape[1])  # (n, h, m, e)
            x = x + F.linear(rearrange(y, "n h m e -> n m (h e)"), block.o, block.o_bias)
            hidden = F.linear(block.feed_forward_norm(x).to(self.dtype), block.up, block.up_bias)
            x = x + F.linear(F.gelu(hidden), block.down, block.down_bias)
        self.kept = end
        return x[:, -1]

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "n m (h e) -> n h m e", h=self.heads)


@dataclass(frozen=True)
class _Weights:
    """A block's weights as the decoder multiplies by them: queries, keys and values in one product."""

    attention_norm: nn.LayerNorm
    qkv: Tensor  # (3 d, d)
    qkv_bias: Tensor
    o: Tensor
    o_bias: Tensor
    feed_forward_norm: nn.LayerNorm
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> _Weights:
        attention, feed_forward = block.attention, block.feed_forward
        layers = {"o": attention.o, "up": feed_forward.up, "down": feed_forward.down}
        inputs = [attention.q, attention.k, attention.v]
        if any(type(layer) is not nn.Linear for layer in (*inputs, *layers.values())):
            raise TypeError("A decoder reads plain linear layers: merge the adapter into them first.")
        qkv, qkv_bias = (torch.cat([getattr(x, part) for x in inputs]).to(dtype) for part in ("weight", "bias"))
        plain = {name: layer.weight.to(dtype) for name, layer in layers.items()}
        biases = {f"{name}_bias": layer.bias.to(dtype) for name, layer in layers.items()}
        return cls(block.attention_norm, qkv, qkv_bias, **plain, **biases, feed_forward_norm=block.feed_forward_norm)
