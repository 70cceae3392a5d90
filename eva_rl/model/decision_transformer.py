"""The Decision Transformer (Chen et al. 2021, arXiv 2106.01345): return, state, action tokens -> causal trunk -> actions.

One trunk serves several observation and action spaces: each `Interface` has an embedder and a head of its own.
Linear layers of the trunk are named q, k, v, o (attention) and up, down (feed-forward), for adapters to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from eva_rl.batch import Batch, Mixture
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model.action_model import ActionModel
from eva_rl.model.attention import CausalSelfAttention
from eva_rl.model.embedder import Embedder
from eva_rl.settings import ModelConfig

TRUNK_LAYERS = ("q", "k", "v", "o", "up", "down")


class FeedForward(nn.Module):
    """W_down GELU(W_up x), four times as wide inside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block, as in GPT-2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, read: slice = slice(None)) -> Tensor:
        """(B, N, d) -> (B, n, d), of the n tokens that `read` picks: of the others, keys and values alone are computed."""
        x = x[:, read] + self.dropout(self.attention(self.attention_norm(x), read))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Trunk(nn.Module):
    """GPT-2's transformer without its vocabulary: tokens (B, N, d) -> features (B, n, d) of the n tokens that `read` picks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.positions = nn.Embedding(config.context * len(config.tokens), config.width)
        self.kinds = config.tokens
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def places(self, tokens: Sequence[str]) -> Tensor:
        """The position embeddings (context * kinds, d) of windows that have these of the model's tokens in each step."""
        if tuple(tokens) == self.kinds:
            return self.positions.weight
        kept = [self.kinds.index(kind) for kind in tokens]
        return rearrange(self.positions.weight, "(t k) d -> t k d", k=len(self.kinds))[:, kept].flatten(0, 1)

    def forward(self, x: Tensor, read: slice = slice(None), tokens: Sequence[str] | None = None) -> Tensor:
        *blocks, last = self.blocks
        places = self.places(self.kinds if tokens is None else tokens)
        x = self.dropout(x + places[: x.shape[1]])  # (B, N, d)
        for block in blocks:
            x = block(x)
        return self.norm(last(x, read))


class DecisionTransformer(ActionModel):
    """Predicts each step's action from the returns-to-go, states and actions before it, and its own return and state.

    See Chen et al. 2021, section 3 and algorithm 1.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, interfaces: Sequence[Interface] = ()):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        for module in self.trunk.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.trunk.blocks:  # GPT-2: residual branches shrink with depth
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.o.weight, std=0.02 / (2 * config.layers) ** 0.5)
            nn.init.normal_(block.feed_forward.down.weight, std=0.02 / (2 * config.layers) ** 0.5)
        for interface in interfaces:
            self.add_interface(interface)

    def add_interface(self, interface: Interface) -> None:
        """Give the model a fresh embedder and head for another observation and action space."""
        head = nn.Linear(self.config.width, interface.action_size)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        device = self.trunk.positions.weight.device
        self.embedders[interface.name] = Embedder(self.config.tokens_of(interface), self.config.width, interface).to(
            device
        )
        self.heads[interface.name] = head.to(device)

    def connect(self, interface: Interface, what: str) -> tuple[str, ...]:
        """Make the model ready for `interface`, and return the names of the modules that had to be made for it.

        A new interface that does not say which tokens it reads gets those of the model's interfaces of its kind of
        action.

        No modules are made where the model has an interface of that name. That interface's statistics stay in force,
        but its spaces, and what is kept of observations, become those of the newer one. Neither changes if the model's
        own interface keeps some observations in float64.

        Raises:
            UserError: if that interface has other sizes. The message names `what`.
        """
        if interface.name in self.embedders:
            own = self.interfaces[interface.name]
            own.require(interface, what)
            exact = own.observation_dtype == "float64" and bool(own.spaces)
            if not exact:  # newer data may need float64; what once did still does
                newer = replace(own, spaces=interface.spaces or own.spaces, parts=interface.parts)
                self.embedder_of(interface.name).interface = newer
            return ()
        if not interface.tokens:
            alike = [own.tokens for own in self.interfaces.values() if own.action_kind == interface.action_kind]
            interface = replace(interface, tokens=alike[0] if alike else ())
        self.add_interface(interface)
        return self.modules_of(interface.name)

    def check_token(self, kind: str, interface: str) -> str:
        """`kind` itself, `all` or one of the tokens that the interface reads.

        Raises:
            UserError: if it reads no such token.
        """
        known = ("all", *self.embedder_of(interface).tokens)
        if kind not in known:
            raise UserError(f"tokens must be one of {list(known)}, got {kind}.")
        return kind

    def predict(self, batch: Batch | Mixture, all_tokens: bool | None = None) -> list[Tensor]:
        """For each part of the batch, what `forward` returns.

        The parts go through the trunk together.

        Args:
            all_tokens: whether all tokens go through every layer. If False, layers whose other outputs nobody reads
                compute the states alone. None: False while training, else True.
        """
        all_tokens = not self.training if all_tokens is None else all_tokens
        layouts: dict[tuple[str, ...], list[Batch]] = {}
        for part in batch.parts:
            layouts.setdefault(self.embedder_of(part.interface).tokens, []).append(part)
        predicted = {
            part.interface: actions
            for kinds, parts in layouts.items()
            for part, actions in zip(parts, self._predict_alike(parts, kinds, all_tokens), strict=True)
        }
        return [predicted[part.interface] for part in batch.parts]

    def _predict_alike(self, parts: Sequence[Batch], kinds: tuple[str, ...], all_tokens: bool) -> list[Tensor]:
        """`predict` for parts whose steps have the same tokens."""
        tokens = [self.embedders[part.interface](part) for part in parts]  # (b, T * kinds, d) each
        tokens = torch.cat(tokens) if len(tokens) > 1 else tokens[0]  # (B, T * kinds, d)
        read = slice(kinds.index("state"), None, len(kinds)) if len(kinds) > 1 else slice(None)
        features = self.trunk(tokens, tokens=kinds)[:, read] if all_tokens else self.trunk(tokens, read, kinds)
        states = features.split([len(part.mask) for part in parts])  # (b, T, d) each
        return [self.heads[part.interface](own).float() for part, own in zip(parts, states, strict=True)]

    def as_trained(self, batch: Batch, kind: str = "all") -> Tensor:
        """What `forward` returns, with no more rows through any layer than training's forward pass sends through it.

        The last block's queries and all that follows them see states alone. Where tokens of another `kind` are wanted,
        all tokens go through.
        """
        [predicted] = self.predict(batch, all_tokens=kind not in ("all", "state"))
        return predicted

    def token_masks(self, batch: Batch, kind: str = "all") -> tuple[Tensor, ...]:
        """`token_mask`, and the same for layers that see states alone, (B, T): each is that of the inputs of its shape."""
        every = self.token_mask(batch, kind)
        return (every, batch.mask) if kind in ("all", "state") else (every,)

    def token_mask(self, batch: Batch, kind: str = "all") -> Tensor:
        """(B, T * kinds) bool: which tokens of the trunk's input are real and of this kind."""
        tokens = self.embedder_of(batch.interface).tokens
        wanted = torch.tensor([kind in ("all", token) for token in tokens], device=batch.mask.device)
        return rearrange(batch.mask[..., None] & wanted, "b t k -> b (t k)")

    @torch.no_grad()
    def act(self, history: Batch, step: Tensor) -> Tensor:
        """The greedy action for step `step` (B,) of each history, in the environment's units: (B, *action_shape)."""
        predicted = self(history)[torch.arange(len(step), device=step.device), step]  # (B, act)
        return self.embedder_of(history.interface).greedy(predicted)
