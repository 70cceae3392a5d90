"""The Decision Transformer (Chen et al. 2021, arXiv 2106.01345): return, state, action tokens -> causal trunk -> actions.

One trunk serves several observation and action spaces: each `Interface` has an embedder and a head of its own.
Linear layers of the trunk are named q, k, v, o (attention) and up, down (feed-forward), for adapters to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from eva_rl.errors import UserError
from eva_rl.interface import OBSERVATION_CLIP, Batch, Interface, Mixture
from eva_rl.model.observations import make_encoder

TOKENS = ("return", "state", "action", "reward")
TRUNK_LAYERS = ("q", "k", "v", "o", "up", "down")
VECTOR = 32
"""bfloat16 numbers in a vector register of 512 bits."""


@dataclass(frozen=True)
class ModelConfig:
    """The trunk's size. `context` is in environment steps; each has one token of every kind in `tokens`, in order."""

    layers: int = 4
    heads: int = 4
    width: int = 256
    context: int = 20
    dropout: float = 0.1
    tokens: tuple[str, ...] = ("return", "state", "action")

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.width, self.context) < 1 or self.width % self.heads:
            raise UserError(
                f"A trunk of layers={self.layers}, heads={self.heads}, width={self.width}, context={self.context} was "
                "asked for; all must be positive and the width a multiple of the heads."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} was given where a number in [0, 1) was expected.")
        unknown = set(self.tokens) - set(TOKENS)
        if unknown or "state" not in self.tokens or len(set(self.tokens)) < len(self.tokens):
            raise UserError(
                f"tokens={list(self.tokens)} was given: name each of {list(TOKENS)} once at most, and 'state'."
            )
        after = [
            t for t in ("action", "reward") if t in self.tokens and self.tokens.index(t) < self.tokens.index("state")
        ]
        if after:
            raise UserError(
                f"tokens={list(self.tokens)} shows the {after[0]} before the state: the head that predicts the action "
                "would see it. Put 'state' first."
            )

    def check_token(self, kind: str) -> str:
        """`kind` itself, `all` or one of the model's tokens.

        Raises:
            UserError: if the model has no such token.
        """
        if kind not in ("all", *self.tokens):
            raise UserError(f"tokens={kind} was given where one of {['all', *self.tokens]} was expected.")
        return kind


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
        unseen = torch.zeros(n, m, dtype=q.dtype).masked_fill_(
            torch.arange(m) > last_seen(n, start, stride), -torch.inf
        )
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q * q.shape[-1] ** -0.5, k, v))
        scores = torch.baddbmm(unseen.expand(len(q), n, m), q, k.transpose(-1, -2))  # (B, n, m)
        return (scores.softmax(-1) @ v).view(*shape, n, -1)


def padded(keys: int, dtype: torch.dtype) -> int:
    """`keys` rounded up to whole vector registers where that adds few: the softmax of bfloat16 is slow on a remainder."""
    spare = -keys % VECTOR
    return keys + spare if dtype == torch.bfloat16 and spare < VECTOR / 2 else keys


def last_seen(n: int, start: int, stride: int, device: torch.device | None = None) -> Tensor:
    """The last key that each query sees, (n, 1)."""
    return start + stride * torch.arange(n, device=device)[:, None]


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
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, read: slice = slice(None)) -> Tensor:
        *blocks, last = self.blocks
        x = self.dropout(x + self.positions.weight[: x.shape[1]])  # (B, N, d)
        for block in blocks:
            x = block(x)
        return self.norm(last(x, read))


class Embedder(nn.Module):
    """One token of each kind a step; normalises with the interface's statistics: (B, T, ...) -> (B, T * kinds, d)."""

    def __init__(self, config: ModelConfig, interface: Interface):
        super().__init__()
        self.tokens, self.interface = config.tokens, interface
        width = config.width
        self.state = make_encoder(interface.parts, width)
        if "return" in self.tokens:
            self.return_to_go = nn.Linear(1, width)
        if "action" in self.tokens:
            discrete = interface.action_kind != "continuous"
            self.action = (
                nn.Embedding(interface.action_size, width) if discrete else nn.Linear(interface.action_size, width)
            )
        if "reward" in self.tokens:
            self.reward = nn.Linear(1, width)
        self.norm = nn.LayerNorm(width)
        first_choices = torch.tensor((0, *interface.choices[:-1])).cumsum(0)  # components have rows of their own
        for name, value in {
            "observation_mean": torch.tensor(interface.observation_mean),
            "observation_std": torch.tensor(interface.observation_std),
            "action_mean": torch.tensor(interface.action_mean),
            "action_scale": torch.tensor(interface.action_scale),
            "first_choices": first_choices,
        }.items():
            self.register_buffer(name, value, persistent=False)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Actions in the environment's units (..., act) -> the model's units; discrete actions as they are."""
        if self.interface.action_kind != "continuous":
            return actions
        return (actions - self.action_mean) / self.action_scale

    def greedy(self, predicted: Tensor) -> Tensor:
        """The head's output (..., act) -> actions in the environment's units (..., *action_shape)."""
        if self.interface.action_kind == "continuous":
            return predicted * self.action_scale + self.action_mean
        best = torch.stack([logits.argmax(-1) for logits in predicted.split(self.interface.choices, -1)], -1)
        return best if self.interface.action_kind == "multi_discrete" else best[..., 0]

    def normalize_observations(self, observations: Tensor) -> Tensor:
        """(..., obs) with its vectors normalised and clipped, all else as it is."""
        vectors = [part.kind == "vector" for part in self.interface.parts]
        if not any(vectors):
            return observations
        columns = list(observations.split([part.size for part in self.interface.parts], -1))
        seen = torch.cat([column for column, vector in zip(columns, vectors, strict=True) if vector], -1)
        seen = ((seen - self.observation_mean) / self.observation_std).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        if all(vectors):
            return seen
        sizes = [column.shape[-1] for column, vector in zip(columns, vectors, strict=True) if vector]
        normalised = iter(seen.split(sizes, -1))
        return torch.cat([next(normalised) if v else c for c, v in zip(columns, vectors, strict=True)], -1)

    def embed(self, kind: str, batch: Batch) -> Tensor:
        """The tokens of one kind, (B, T, d)."""
        if kind == "return":
            token = self.return_to_go(batch.returns_to_go[..., None] / self.interface.return_scale)
        elif kind == "state":
            token = self.state(self.normalize_observations(batch.observations))
        elif kind == "reward":
            token = self.reward(batch.rewards[..., None] / self.interface.reward_scale)
        elif self.interface.action_kind == "multi_discrete":
            token = self.action(batch.actions + self.first_choices).sum(-2)
        else:
            token = self.action(self.normalize_actions(batch.actions))
        return self.norm(token)

    def forward(self, batch: Batch) -> Tensor:
        return rearrange(torch.stack([self.embed(kind, batch) for kind in self.tokens]), "k b t d -> b (t k) d")


class DecisionTransformer(nn.Module):
    """Predicts each step's action from the returns-to-go, states and actions before it (and its own return and state).

    Continuous actions: the mean squared error to the dataset's action, in units of the interface's action scale.
    Discrete actions: cross-entropy. (Chen et al. 2021, section 3 and algorithm 1)
    """

    def __init__(self, config: ModelConfig, interfaces: Sequence[Interface] = ()):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.embedders = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for module in self.trunk.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.trunk.blocks:  # GPT-2: residual branches shrink with depth
            nn.init.normal_(block.attention.o.weight, std=0.02 / (2 * config.layers) ** 0.5)
            nn.init.normal_(block.feed_forward.down.weight, std=0.02 / (2 * config.layers) ** 0.5)
        for interface in interfaces:
            self.add_interface(interface)

    @property
    def interfaces(self) -> dict[str, Interface]:
        return {name: embedder.interface for name, embedder in self.embedders.items()}

    def add_interface(self, interface: Interface) -> None:
        """Give the model a fresh embedder and head for another observation and action space."""
        head = nn.Linear(self.config.width, interface.action_size)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        device = self.trunk.positions.weight.device
        self.embedders[interface.name] = Embedder(self.config, interface).to(device)
        self.heads[interface.name] = head.to(device)

    def connect(self, interface: Interface, what: str) -> tuple[str, ...]:
        """Make the model ready for `interface`; return the names of the modules it had to make for it.

        There are none where the model has an interface of that name: its own statistics stay in force.

        Raises:
            UserError: if that interface has other sizes; the sentence names `what`.
        """
        if interface.name in self.embedders:
            self.interfaces[interface.name].require(interface, what)
            return ()
        self.add_interface(interface)
        return self.modules_of(interface.name)

    def modules_of(self, interface: str) -> tuple[str, str]:
        """The names of the interface's embedder and head."""
        return f"embedders.{interface}", f"heads.{interface}"

    def forward(self, batch: Batch) -> Tensor:
        """(B, T, act) float32: actions in the model's units, or logits of discrete actions."""
        [predicted] = self.predict(batch)
        return predicted

    def predict(self, batch: Batch | Mixture) -> list[Tensor]:
        """For each part of the batch, what `forward` returns; they go through the trunk together."""
        parts, kinds = batch.parts, self.config.tokens
        tokens = [self.embedders[part.interface](part) for part in parts]  # (b, T * kinds, d) each
        tokens = torch.cat(tokens) if len(tokens) > 1 else tokens[0]  # (B, T * kinds, d)
        read = slice(kinds.index("state"), None, len(kinds))
        # Training asks for no more than the states; otherwise every layer shows every token to those who look (EVA).
        features = self.trunk(tokens, read) if self.training else self.trunk(tokens)[:, read]  # (B, T, d)
        states = features.split([len(part.mask) for part in parts])
        return [self.heads[part.interface](own).float() for part, own in zip(parts, states, strict=True)]

    def losses(self, batch: Batch | Mixture) -> dict[str, Tensor]:
        """By interface, the sum over the real steps of each step's loss, the mean over the action's components."""
        predictions = zip(batch.parts, self.predict(batch), strict=True)
        return {part.interface: (self._errors(part, found) * part.mask).sum() for part, found in predictions}

    def loss(self, batch: Batch | Mixture) -> Tensor:
        """Mean over the real steps (and action components); padding counts in neither sum nor divisor."""
        return torch.stack(list(self.losses(batch).values())).sum() / batch.steps

    def _errors(self, batch: Batch, predicted: Tensor) -> Tensor:
        """Each step's loss, (B, T)."""
        embedder = self.embedders[batch.interface]
        if embedder.interface.action_kind == "continuous":
            return (predicted - embedder.normalize_actions(batch.actions)).square().mean(-1)
        choices = batch.actions if embedder.interface.action_kind == "multi_discrete" else batch.actions[..., None]
        logits = predicted.split(embedder.interface.choices, -1)
        losses = [
            F.cross_entropy(own.transpose(1, 2), choices[..., i], reduction="none") for i, own in enumerate(logits)
        ]
        return torch.stack(losses).mean(0)

    def token_mask(self, batch: Batch, kind: str = "all") -> Tensor:
        """(B, T * kinds) bool: which tokens of the trunk's input are real and of this kind."""
        wanted = torch.tensor([kind in ("all", token) for token in self.config.tokens], device=batch.mask.device)
        return rearrange(batch.mask[..., None] & wanted, "b t k -> b (t k)")

    @torch.no_grad()
    def act(self, history: Batch, step: Tensor) -> Tensor:
        """The greedy action for step `step` (B,) of each history, in the environment's units: (B, *action_shape)."""
        predicted = self(history)[torch.arange(len(step), device=step.device), step]  # (B, act)
        return self.embedders[history.interface].greedy(predicted)
