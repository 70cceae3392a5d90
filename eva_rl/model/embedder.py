"""Observations, actions, returns and rewards of one interface -> tokens, and predicted actions back to the environment's units."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from eva_rl.batch import Batch
from eva_rl.interface import OBSERVATION_CLIP, Interface
from eva_rl.model.observations import make_encoder
from eva_rl.spaces import ActionPart


class ActionParts(nn.Module):
    """The sum of what the parts of an action say: rows (..., act) in the model's units -> (..., d)."""

    first: Tensor

    def __init__(self, parts: Sequence[ActionPart], outputs: int, width: int):
        super().__init__()
        self.parts = tuple(parts)
        real = sum(part.size for part in parts if not part.choices)
        if real:
            self.numbers = nn.Linear(real, width)
        if outputs > real:
            choices = [n for part in parts for n in part.choices]
            self.choices = nn.Embedding(outputs - real, width)
            self.register_buffer("first", torch.tensor((0, *choices[:-1])).cumsum(0), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        cut = list(zip(self.parts, rows.split([part.size for part in self.parts], -1), strict=True))
        real, chosen = ([own for part, own in cut if bool(part.choices) == which] for which in (False, True))
        tokens = []
        if real:
            tokens.append(self.numbers(torch.cat(real, -1)))
        if chosen:
            tokens.append(self.choices(torch.cat(chosen, -1).long() + self.first).sum(-2))
        return tokens[0] if len(tokens) == 1 else tokens[0] + tokens[1]


def _best(logits: Tensor, choices: Sequence[int]) -> Tensor:
    """The likeliest choice of each component, (..., components)."""
    return torch.stack([own.argmax(-1) for own in logits.split(choices, -1)], -1)


class TaskVector(nn.Module):
    """The vector in force for tokens (..., d) that name no task: that of the task which is adapted to or acted in."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class Embedder(nn.Module):
    """One token of each kind a step, from numbers normalised with the interface's statistics.

    (B, T, ...) -> (B, T * kinds, d).
    """

    observation_mean: Tensor
    observation_std: Tensor
    exact_observation_mean: Tensor
    action_mean: Tensor
    action_scale: Tensor
    first_choices: Tensor

    def __init__(self, tokens: Sequence[str], width: int, interface: Interface):
        super().__init__()
        self.tokens, self.interface = tuple(tokens), interface
        self.state = make_encoder(interface.parts, width)
        if "return" in self.tokens:
            self.return_to_go = nn.Linear(1, width)
        if "action" in self.tokens:
            make = {"continuous": nn.Linear, "parts": partial(ActionParts, interface.action_parts)}
            self.action = make.get(interface.action_kind, nn.Embedding)(interface.action_size, width)
        if "reward" in self.tokens:
            self.reward = nn.Linear(1, width)
        if interface.tasks:
            self.tasks, self.task = nn.Embedding(len(interface.tasks), width), TaskVector(width)
            nn.init.normal_(self.tasks.weight, std=0.02)
        self.norm: nn.Module = nn.LayerNorm(width)
        first_choices = torch.tensor((0, *interface.choices[:-1])).cumsum(0)  # components have rows of their own
        for name, value in {
            "observation_mean": torch.tensor(interface.observation_mean),
            "observation_std": torch.tensor(interface.observation_std),
            "action_mean": torch.tensor(interface.action_mean),
            "action_scale": torch.tensor(interface.action_scale),
            "first_choices": first_choices,
        }.items():
            self.register_buffer(name, value, persistent=False)
        exact_mean = torch.tensor(interface.observation_mean, dtype=torch.float64)
        self.register_buffer("exact_observation_mean", exact_mean, persistent=False)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Actions in the environment's units (..., act) -> the model's units, with choices as they are."""
        if not self.interface.action_mean:
            return actions
        return (actions - self.action_mean) / self.action_scale

    def greedy(self, predicted: Tensor) -> Tensor:
        """The head's output (..., act) -> actions in the environment's units (..., *action_shape)."""
        if self.interface.action_kind == "continuous":
            return predicted * self.action_scale + self.action_mean
        if self.interface.action_kind == "parts":
            cut = predicted.split([part.outputs for part in self.interface.action_parts], -1)
            pairs = zip(self.interface.action_parts, cut, strict=True)
            rows = [_best(own, part.choices).to(own.dtype) if part.choices else own for part, own in pairs]
            return torch.cat(rows, -1) * self.action_scale + self.action_mean
        best = _best(predicted, self.interface.choices)
        return best if self.interface.action_kind == "multi_discrete" else best[..., 0]

    def normalize_observations(self, observations: Tensor) -> Tensor:
        """(..., obs) with its vectors normalised and clipped, all else as it is."""
        vectors = [part.kind == "vector" for part in self.interface.parts]
        if all(vectors):
            return self._normalised(observations)
        if not any(vectors):
            return observations
        columns = list(observations.split([part.size for part in self.interface.parts], -1))
        seen = torch.cat([column for column, vector in zip(columns, vectors, strict=True) if vector], -1)
        seen = self._normalised(seen)
        sizes = [column.shape[-1] for column, vector in zip(columns, vectors, strict=True) if vector]
        normalised = iter(seen.split(sizes, -1))
        return torch.cat(
            [next(normalised) if v else c.to(seen.dtype) for c, v in zip(columns, vectors, strict=True)], -1
        )

    def _normalised(self, vectors: Tensor) -> Tensor:
        exact = vectors.dtype == torch.float64  # numbers so large that float32 holds them without their mean alone
        centred = (vectors - self.exact_observation_mean).float() if exact else vectors - self.observation_mean
        return (centred / self.observation_std).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)

    def _of_task(self, tokens: Tensor, tasks: Tensor | None) -> Tensor:
        """State tokens (B, T, d), each with the vector of its window's task where the interface has any."""
        if not self.interface.tasks:
            return tokens
        if tasks is None:
            return self.task(tokens)
        named = tokens + self.tasks(tasks.clamp(min=0))[:, None]
        return torch.where((tasks >= 0)[:, None, None], named, self.task(tokens))

    def begin_task(self, number: int) -> None:
        """Put the vector of the interface's task of this number in force."""
        with torch.no_grad():
            self.task.weight.copy_(self.tasks.weight[number])

    def embed(self, kind: str, batch: Batch) -> Tensor:
        """The tokens of one kind, (B, T, d)."""
        if kind == "return":
            token = self.return_to_go(batch.returns_to_go[..., None] / self.interface.return_scale)
        elif kind == "state":
            token = self._of_task(self.state(self.normalize_observations(batch.observations)), batch.tasks)
        elif kind == "reward":
            token = self.reward(batch.rewards[..., None] / self.interface.reward_scale)
        elif self.interface.action_kind == "multi_discrete":
            token = self.action(batch.actions + self.first_choices).sum(-2)
        else:
            token = self.action(self.normalize_actions(batch.actions))
        return self.norm(token)

    def forward(self, batch: Batch) -> Tensor:
        return rearrange(torch.stack([self.embed(kind, batch) for kind in self.tokens]), "k b t d -> b (t k) d")
