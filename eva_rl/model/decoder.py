"""Acting step by step: the keys and values of past tokens are kept, so that a step costs its own tokens and no more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva_rl.batch import Batch
from eva_rl.interface import Interface
from eva_rl.model.attention import padded, unseen
from eva_rl.model.decision_transformer import Block, DecisionTransformer

LEAST = 16
"""Episodes computed at a time at least: for fewer rows, libraries take other kernels, which round differently."""


def _nothing_yet(rows: int, name: str, interface: Interface, device: torch.device) -> Batch:
    """One step of so many episodes, of which nothing is known."""
    return Batch(
        observations=torch.zeros(rows, 1, interface.observation_size, device=device),
        actions=torch.zeros(rows, 1, *interface.action_shape, device=device),
        returns_to_go=torch.zeros(rows, 1, device=device),
        rewards=torch.zeros(rows, 1, device=device),
        mask=torch.ones(rows, 1, dtype=torch.bool, device=device),
        interface=name,
    )


class Decoder:
    """Greedy actions for n episodes that step together.

    `act` and `record` take turns.

    A token's position is that of its step in the window, so a window that slid would change every key. It grows instead:
    when it holds `context` steps, it starts anew with the later half of them, whose keys and values are computed again.
    So an action sees between context / 2 and context steps (fewer only at the start of an episode), for the price of one
    pass over half a window every context / 2 steps. Training predicts the action of every step of a window, so that the
    model knows windows of every length.

    The model's weights are read once, here: under autocast they are cast once, and not at every step. Its adapter must be
    merged into them.

    An episode's actions do not depend on those beside it, bit for bit on CPUs, unless `alone`.

    Args:
        alone: acts in a control loop, where each step's own time counts. No rows are computed beside the episodes'. The
            window that starts anew is computed ahead, each step's tokens together with those of the window that goes
            on. The actions are the same but for rounding.
        tasks: the row of each episode's task vector (see `Batch.tasks`). None: the one in force.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: DecisionTransformer,
        interface: str,
        episodes: int,
        alone: bool = False,
        tasks: Sequence[int] | None = None,
    ):
        config = model.config
        self.model, self.episodes, self.alone = model, episodes, alone
        self.embedder, self.head = model.embedder_of(interface), model.heads[interface]
        self.kinds, self.state = len(self.embedder.tokens), self.embedder.tokens.index("state")
        self.places = model.trunk.places(self.embedder.tokens)
        spec, device = self.embedder.interface, model.trunk.positions.weight.device
        self.dtype = model.trunk.positions.weight.dtype
        if torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.blocks = [BlockWeights.of(cast("Block", block), self.dtype) for block in model.trunk.blocks]
        self.least = 1 if alone else LEAST
        rows = max(episodes, self.least)
        self.now = _nothing_yet(rows, interface, spec, device)
        if tasks is not None:
            self.now = replace(self.now, tasks=torch.tensor([*tasks, *[tasks[0]] * (rows - episodes)], device=device))
        """The newest step."""
        self.tokens = torch.zeros(rows, config.context * self.kinds, config.width, device=device)
        """The window, embedded: (n, N, d)."""
        self.length = 0
        """Steps in the window."""
        self.half = max(1, config.context // 2) if config.context > 1 else 0
        """Steps that a window starts anew with."""
        self.heads = config.heads
        # All the cache is looked at, not [:end] of it: a contiguous tensor is multiplied faster, and the rest is masked.
        places = padded(config.context * self.kinds, self.dtype)
        shape = (config.layers, 2, rows, self.heads, places, config.width // self.heads)
        self.caches = [torch.zeros(shape, device=device, dtype=self.dtype) for _ in range(1 + alone)]
        """Keys and values of the window, and of the one that comes next: (layers, 2, n, h, N, e) each."""
        self.kept = [0] * len(self.caches)
        """Tokens whose keys and values are there."""
        self.unseen = unseen(places, places, 0, 1, self.dtype, device)

    @torch.inference_mode()
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
        pieces = [(0, self.tokens[:, self.kept[0] : end])]
        before = self.model.config.context - self.half
        if self.alone and self.length > before:  # this step will be in the next window
            pieces.append((1, self.tokens[:, before * self.kinds + self.kept[1] : end]))
        features = self._extend(*pieces)
        predicted = self.head(self.model.trunk.norm(features))[: self.episodes].float()  # (n, act)
        return self.embedder.greedy(predicted)

    @torch.inference_mode()
    def record(self, actions: Tensor, rewards: Tensor) -> None:
        """What was done (n, *action_shape), and what it earned (n,)."""
        self._show(actions=actions, rewards=rewards)
        self._embed(self.state + 1, self.kinds)

    def keep(self, episodes: Tensor) -> None:
        """Go on with these episodes (m,) only, in this order."""
        self.episodes = len(episodes)
        rows = torch.cat([episodes, episodes[:1].expand(max(self.least - len(episodes), 0))])
        self.now = self.now.of(rows)
        self.tokens = self.tokens[rows]
        self.caches = [cache[:, :, rows] for cache in self.caches]

    def _show(self, **known: Tensor) -> None:
        """Put what is known of the newest step, a row an episode, into `now`."""
        spare = len(self.now.mask) - self.episodes
        if spare:
            known = {name: torch.cat([v, v[:1].expand(spare, *v.shape[1:])]) for name, v in known.items()}
        self.now = replace(self.now, **{name: value[:, None] for name, value in known.items()})

    def _embed(self, first: int, last: int) -> None:
        """Embed the newest step's tokens of the kinds from number `first` to `last` (excluded)."""
        for number in range(first, last):
            place = (self.length - 1) * self.kinds + number
            self.tokens[:, place] = self.embedder.embed(self.embedder.tokens[number], self.now)[:, 0]

    def _start_anew(self) -> None:
        first = (self.length - self.half) * self.kinds
        self.tokens[:, : self.half * self.kinds] = self.tokens[:, first : self.length * self.kinds].clone()
        self.length = self.half
        self.caches.reverse()
        self.kept = [*self.kept[1:], 0]

    def _extend(self, *pieces: tuple[int, Tensor]) -> Tensor:
        """Run the trunk on the next tokens (n, m, d) of windows, by their numbers, and keep their keys and values.

        A step of one episode is over in a millisecond. Calls that compute nothing would take most of it: hence there
        are few of them. The weights are read once for all pieces, as reading them takes longer than the products
        themselves.

        Returns:
            The features of the first piece's last token, (n, d).
        """
        spans = [(self.caches[window], self.kept[window], tokens.shape[1]) for window, tokens in pieces]
        placed = [
            tokens + self.places[start : start + m] for (_, tokens), (_, start, m) in zip(pieces, spans, strict=True)
        ]
        x = placed[0] if len(placed) == 1 else torch.cat(placed, 1)
        n, m, d = x.shape
        *blocks, last = self.blocks
        autocast = torch.is_autocast_enabled(x.device.type)  # all is cast where it should be
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            x = x.view(n * m, d)
            for layer, block in enumerate(blocks):
                qkv = block.queries_keys_values(block.attention_norm(x))  # (n m, 3 d)
                qkv = qkv.view(n, m, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, n, h, m, e)
                self._keep(layer, qkv[1:], spans)
                x = block.write(x, self._attended(layer, qkv[0], spans))
            normed = last.attention_norm(x)  # the outputs of all tokens but one would go nowhere
            kv = last.keys_values(normed)  # (n m, 2 d)
            self._keep(-1, kv.view(n, m, 2, self.heads, -1).permute(2, 0, 3, 1, 4), spans)
            cache, start, own = spans[0]
            x, normed = (y.view(n, m, d)[:, own - 1].contiguous() for y in (x, normed))  # (n, d)
            q = last.queries(normed).view(n, self.heads, 1, -1)
            x = last.write(x, self._attend(q, cache[-1], start + own - 1).view(n, d))
        for (window, _), (_, start, own) in zip(pieces, spans, strict=True):
            self.kept[window] = start + own
        return x

    def _keep(self, layer: int, kv: Tensor, spans: Sequence[Span]) -> None:
        """Put keys and values (2, n, h, m, e) into their windows' caches."""
        first = 0
        for cache, start, m in spans:
            cache[layer, ..., start : start + m, :] = kv[..., first : first + m, :]
            first += m

    def _attended(self, layer: int, q: Tensor, spans: Sequence[Span]) -> Tensor:
        """What queries (n, h, m, e) see, each piece's in its own window: (n m, d)."""
        first, seen = 0, []
        for cache, start, m in spans:
            seen.append(self._attend(q[:, :, first : first + m], cache[layer], start))
            first += m
        return (seen[0] if len(seen) == 1 else torch.cat(seen, 1)).flatten(0, 1)

    def _attend(self, q: Tensor, cache: Tensor, start: int) -> Tensor:
        """What the tokens from number `start` on, of queries (n, h, m, e), see in the cache: (n, m, d)."""
        n, h, m, e = q.shape
        k, v = cache.view(2, n * h, -1, e)
        q, mask = q.reshape(n * h, m, e), self.unseen[start : start + m]
        if q.device.type == "cpu":  # the fused kernel is slower for few queries
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=e**-0.5)  # (n h, m, N)
            y = torch.bmm(scores.softmax(-1), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.view(n, h, m, e).transpose(1, 2).reshape(n, m, h * e)


Span = tuple[Tensor, int, int]
"""A window's cache, the place of the first of some tokens in it, and how many they are."""


@dataclass(frozen=True)
class BlockWeights:
    """A block's weights as the decoder multiplies by them: queries, keys and values in one product."""

    attention_norm: _Norm
    qkv: Tensor  #: (d, 3 d)
    qkv_bias: Tensor
    o: Tensor
    o_bias: Tensor
    feed_forward_norm: _Norm
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> BlockWeights:
        attention, feed_forward = block.attention, block.feed_forward
        layers = {"o": attention.o, "up": feed_forward.up, "down": feed_forward.down}
        inputs = [attention.q, attention.k, attention.v]
        if any(type(layer) is not nn.Linear for layer in (*inputs, *layers.values())):
            raise TypeError("A decoder reads plain linear layers: merge the adapter into them first.")
        qkv, qkv_bias = (torch.cat([getattr(x, part) for x in inputs]).to(dtype) for part in ("weight", "bias"))
        plain = {name: layer.weight.to(dtype).t() for name, layer in layers.items()}
        biases = {f"{name}_bias": layer.bias.to(dtype) for name, layer in layers.items()}
        before, between = _Norm.of(block.attention_norm, dtype), _Norm.of(block.feed_forward_norm, dtype)
        return cls(attention_norm=before, feed_forward_norm=between, qkv=qkv.t(), qkv_bias=qkv_bias, **plain, **biases)

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """(r, d) -> (r, 3 d)."""
        return torch.addmm(self.qkv_bias, x, self.qkv)

    def keys_values(self, x: Tensor) -> Tensor:
        """(r, d) -> (r, 2 d)."""
        d = x.shape[1]
        return torch.addmm(self.qkv_bias[d:], x, self.qkv[:, d:])

    def queries(self, x: Tensor) -> Tensor:
        """(r, d) -> (r, d)."""
        d = x.shape[1]
        return torch.addmm(self.qkv_bias[:d], x, self.qkv[:, :d])

    def write(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream (r, d) behind the block."""
        x = x + torch.addmm(self.o_bias, attended, self.o)
        hidden = F.gelu(torch.addmm(self.up_bias, self.feed_forward_norm(x), self.up))
        return x + torch.addmm(self.down_bias, hidden, self.down)


@dataclass(frozen=True)
class _Norm:
    """A LayerNorm whose result is cast."""

    shape: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.LayerNorm, dtype: torch.dtype) -> _Norm:
        return cls(layer.normalized_shape, layer.weight, layer.bias, layer.eps, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return y if y.dtype == self.dtype else y.to(self.dtype)
