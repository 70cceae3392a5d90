"""Acting step by step: the keys and values of past tokens are kept, so that a step costs its own tokens and no more."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from eva_rl.interface import Batch
from eva_rl.model.decision_transformer import Block, DecisionTransformer, attend


class Decoder:
    """Greedy actions for n episodes that step together; `act` and `record` take turns.

    A token's position is that of its step in the window, so a window that slid would change every key. It grows instead:
    when it holds `context` steps, it starts anew with the later half of them, whose keys and values are computed again.
    So an action sees between context / 2 and context steps (fewer only at the start of an episode), for the price of one
    pass over half a window every context / 2 steps. Training predicts the action of every step of a window, so that the
    model knows windows of every length.
    """

    @torch.no_grad()
    def __init__(self, model: DecisionTransformer, interface: str, episodes: int):
        config = model.config
        self.model = model
        self.kinds, self.state = len(config.tokens), config.tokens.index("state")
        self.embedder, self.head = model.embedders[interface], model.heads[interface]
        spec, device = self.embedder.interface, model.trunk.positions.weight.device
        discrete = spec.action_kind == "discrete"
        shape = (episodes, config.context)
        self.window = Batch(
            observations=torch.zeros(*shape, spec.observation_size, device=device),
            actions=torch.zeros(*shape, dtype=torch.int64, device=device)
            if discrete
            else torch.zeros(*shape, spec.action_size, device=device),
            returns_to_go=torch.zeros(shape, device=device),
            rewards=torch.zeros(shape, device=device),
            mask=torch.ones(shape, dtype=torch.bool, device=device),
            interface=interface,
        )
        self.length = 0
        """Steps in the window."""
        tokens = (len(model.trunk.blocks), episodes, config.heads, config.context * self.kinds, -1)
        self.keys = torch.zeros(*tokens[:-1], config.width // config.heads, device=device)  # (L, n, h, N, e)
        self.values = torch.zeros_like(self.keys)
        self.kept = 0
        """Tokens whose keys and values are there."""

    @torch.no_grad()
    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """The next action of each episode, in the environment's units: (n, act), or (n,) int64 where they are discrete.

        Args:
            observations: (n, obs).
            returns_to_go: (n,) what is asked for from here on.
        """
        if self.length == self.model.config.context:
            self._start_anew()
        step = self.length
        self.window.observations[:, step] = observations
        self.window.returns_to_go[:, step] = returns_to_go
        self.length += 1
        features = self._extend(self._new_tokens())
        predicted = self.head(self.model.trunk.norm(features)).float()  # (n, act)
        if self.embedder.interface.action_kind == "discrete":
            return predicted.argmax(-1)
        return self.embedder.denormalize_actions(predicted)

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        """What was done (n, act) or (n,), and what it earned (n,)."""
        self.window.actions[:, self.length - 1] = actions
        self.window.rewards[:, self.length - 1] = rewards

    def keep(self, episodes: Tensor) -> None:
        """Go on with these episodes (m,) only, in this order."""
        tensors = {k: v for k, v in vars(self.window).items() if k != "interface"}
        self.window = replace(self.window, **{k: v[episodes] for k, v in tensors.items()})
        self.keys, self.values = self.keys[:, episodes], self.values[:, episodes]

    def _start_anew(self) -> None:
        half = max(1, self.model.config.context // 2) if self.model.config.context > 1 else 0
        first = self.length - half
        for name, column in vars(self.window).items():
            if name not in ("interface", "mask"):
                column[:, :half] = column[:, first : self.length].clone()
        self.length, self.kept = half, 0

    def _new_tokens(self) -> Tensor:
        """Embeddings (n, m, d) of the tokens up to the newest state's that are not kept yet, with their positions."""
        first = self.kept // self.kinds  # the step they begin in
        steps = {k: v if k == "interface" else v[:, first : self.length] for k, v in vars(self.window).items()}
        tokens = self.embedder(Batch(**steps))  # (n, steps * kinds, d)
        end = (self.length - 1) * self.kinds + self.state + 1
        tokens = tokens[:, self.kept - first * self.kinds : end - first * self.kinds]
        return tokens + self.model.trunk.positions.weight[self.kept : end]

    def _extend(self, x: Tensor) -> Tensor:
        """Run the trunk on new tokens (n, m, d), keep their keys and values; return the last one's features (n, d)."""
        start, end = self.kept, self.kept + x.shape[1]
        blocks: list[Block] = list(self.model.trunk.blocks)
        for number, block in enumerate(blocks):
            attention, normed = block.attention, block.attention_norm(x)
            for layer, kept in ((attention.k, self.keys), (attention.v, self.values)):
                kept[number, :, :, start:end] = rearrange(layer(normed), "n m (h e) -> n h m e", h=attention.heads)
            if number == len(blocks) - 1:  # the others' outputs would go nowhere
                x, normed = x[:, -1:], normed[:, -1:]
            q = rearrange(attention.q(normed), "n m (h e) -> n h m e", h=attention.heads)
            y = attend(q.to(self.keys.dtype), self.keys[number, :, :, :end], self.values[number, :, :, :end])
            x = x + attention.o(rearrange(y, "n h m e -> n m (h e)"))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        self.kept = end
        return x[:, -1]
