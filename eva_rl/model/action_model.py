"""What every model that predicts actions has in common: interfaces, and the loss of what it predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva_rl.batch import Batch, Mixture
from eva_rl.interface import Interface

if TYPE_CHECKING:
    from eva_rl.model.cloning import CloningConfig
    from eva_rl.model.embedder import Embedder
    from eva_rl.settings import ModelConfig


class ActionModel(nn.Module):
    """Predicts each step's action, with an embedder and a head of its own for each interface.

    Continuous actions: the mean squared error to the dataset's action, in units of the interface's action scale.
    Discrete actions: cross-entropy. Actions of several parts: the sum over the parts.
    """

    config: ModelConfig | CloningConfig

    def __init__(self):
        super().__init__()
        self.embedders = nn.ModuleDict()
        self.heads = nn.ModuleDict()

    def predict(self, batch: Batch | Mixture) -> list[Tensor]:
        """For each part of the batch, what `forward` returns."""
        raise NotImplementedError

    @property
    def interfaces(self) -> dict[str, Interface]:
        return {name: self.embedder_of(name).interface for name in self.embedders}

    def embedder_of(self, interface: str) -> Embedder:
        """What turns this interface's batches into tokens."""
        return cast("Embedder", self.embedders[interface])

    def modules_of(self, interface: str) -> tuple[str, str]:
        """The names of the interface's embedder and head."""
        return f"embedders.{interface}", f"heads.{interface}"

    def forward(self, batch: Batch) -> Tensor:
        """(B, T, act) float32: actions in the model's units, or logits of discrete actions."""
        [predicted] = self.predict(batch)
        return predicted

    def losses(self, batch: Batch | Mixture) -> dict[str, Tensor]:
        """By interface, the sum over the real steps of each step's loss, the mean over the action's components."""
        predictions = zip(batch.parts, self.predict(batch), strict=True)
        return {part.interface: (self._errors(part, found) * part.mask).sum() for part, found in predictions}

    def loss(self, batch: Batch | Mixture) -> Tensor:
        """The mean over the real steps (and action components).

        Padding counts in neither the sum nor the divisor.
        """
        return torch.stack(list(self.losses(batch).values())).sum() / batch.steps

    def _errors(self, batch: Batch, predicted: Tensor) -> Tensor:
        """Each step's loss, (B, T)."""
        embedder = self.embedder_of(batch.interface)
        wanted = batch.actions if batch.labels is None else batch.labels
        spec, wanted = embedder.interface, embedder.normalize_actions(wanted)
        if spec.action_kind == "continuous":
            return _squared(predicted, wanted)
        if spec.action_kind == "parts":
            cut = predicted.split([part.outputs for part in spec.action_parts], -1)
            rows = wanted.split([part.size for part in spec.action_parts], -1)
            pairs = zip(spec.action_parts, cut, rows, strict=True)
            losses = [_missed(own, row.long(), p.choices) if p.choices else _squared(own, row) for p, own, row in pairs]
            return torch.stack(losses).sum(0)
        return _missed(predicted, wanted if spec.action_kind == "multi_discrete" else wanted[..., None], spec.choices)


def _squared(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error of each step, (B, T)."""
    return (predicted - wanted).square().mean(-1)


def _missed(logits: Tensor, wanted: Tensor, choices: tuple[int, ...]) -> Tensor:
    """The mean over the components of each step's cross-entropy, (B, T)."""
    own = enumerate(logits.split(choices, -1))
    return torch.stack([F.cross_entropy(x.transpose(1, 2), wanted[..., i], reduction="none") for i, x in own]).mean(0)
