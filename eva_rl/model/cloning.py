"""Behaviour cloning: a small network from one observation to the action, without a history, a return or a base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva_rl.batch import Batch, Mixture
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model.action_model import ActionModel
from eva_rl.model.decoder import LEAST
from eva_rl.model.embedder import Embedder


@dataclass(frozen=True)
class CloningConfig:
    """A multilayer perceptron: `layers` hidden layers of `width`, each with ReLU and dropout."""

    layers: int = 3
    width: int = 400
    dropout: float = 0.1
    bounded: bool = True
    """Whether the actions' space has bounds: continuous actions then go through tanh."""
    context: int = 1
    """Steps in a window: what a network without a history looks at."""

    def __post_init__(self) -> None:
        if min(self.layers, self.width) < 1 or not 0 <= self.dropout < 1 or self.context != 1:
            raise UserError(
                "A cloned network must have positive sizes, a dropout in [0, 1) and a context of 1, got "
                f"layers={self.layers}, width={self.width}, dropout={self.dropout}, context={self.context}."
            )


class CloningMLP(ActionModel):
    """Observation -> action by a multilayer perceptron.

    Images, grids and tokens go through the encoders of the base.
    """

    config: CloningConfig

    def __init__(self, config: CloningConfig, interface: Interface):
        super().__init__()
        self.config = config
        embedder = Embedder(("state",), config.width, interface)
        embedder.norm = nn.Identity()
        hidden = [
            layer
            for number in range(config.layers)
            for layer in (
                *([nn.Linear(config.width, config.width)] if number else []),  # the first one is the embedder's
                nn.ReLU(),
                nn.Dropout(config.dropout),
            )
        ]
        self.trunk = nn.Sequential(*hidden)
        self.embedders[interface.name] = embedder
        self.heads[interface.name] = nn.Linear(config.width, interface.action_size)

    def predict(self, batch: Batch | Mixture) -> list[Tensor]:
        return [self._actions(part) for part in batch.parts]

    def _actions(self, batch: Batch) -> Tensor:
        """(B, T, act) float32, as `forward`."""
        features = self.trunk(self.embedders[batch.interface](batch))  # (B, T, d)
        predicted = self.heads[batch.interface](features).float()
        continuous = self.interfaces[batch.interface].action_kind == "continuous"
        return predicted.tanh() if continuous and self.config.bounded else predicted


class Reflexes:
    """A `CloningMLP` as the policy of n episodes that step together: it keeps nothing from one step to the next.

    alone: no rows are computed beside the episodes'.
    """

    def __init__(self, model: CloningMLP, interface: str, episodes: int, alone: bool = False):
        self.model, self.interface, self.least = model, interface, 1 if alone else LEAST

    @torch.no_grad()
    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """(n, obs), (n,) -> actions in the environment's units (n, *action_shape), ignoring the returns."""
        count = len(observations)
        rows = F.pad(observations, (0, 0, 0, max(self.least - count, 0)))[:, None]  # (rows, 1, obs)
        nothing = torch.zeros(rows.shape[:2], device=rows.device)
        batch = Batch(rows, nothing, nothing, nothing, nothing.bool(), self.interface)
        return self.model.embedder_of(self.interface).greedy(self.model(batch)[:count, 0])

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        """Nothing is kept."""

    def keep(self, episodes: Tensor) -> None:
        """Nothing is kept."""
