"""What a task looks like to the base: mean and leading components of what each layer reads, from observations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eva_rl.adapter import EvaSettings
from eva_rl.adapter.eva import Reading, eva_init
from eva_rl.adapter.eva.kinds import reader
from eva_rl.adapter.eva.observe import discover, masked_rows
from eva_rl.batch import Batch
from eva_rl.errors import UserError, in_one_line
from eva_rl.files import not_finite
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer

if TYPE_CHECKING:
    from pathlib import Path

    from eva_rl.data import Trajectories
    from eva_rl.interface import Interface

RANK = 8
"""Components of a layer's inputs that are kept."""
ROWS = 2000
"""Observations that a sketch is made of at most."""
BATCH = 250
KEPT = 200
"""Observations of a task that are kept beside its sketch, which has not seen them: what fits is judged by them."""
KEPT_BYTES = 2**18
"""Bytes of those observations at most."""


@dataclass(frozen=True)
class Sketch:
    """One task, as the base sees it.

    Layers that read the same tensor are taken together, under the first one's name.
    """

    means: dict[str, Tensor]  #: (d,) float32 each
    components: dict[str, Tensor]  #: (k, d) orthonormal rows
    values: dict[str, Tensor]  #: (k,) variance along each component
    totals: dict[str, Tensor]  #: () all variance
    observations: Tensor  #: (m, obs) flat, of the task; no part of what the rest was made from

    def tensors(self) -> dict[str, Tensor]:
        """As `sketch.safetensors` has them."""
        named = {"means": self.means, "components": self.components, "values": self.values, "totals": self.totals}
        flat = {f"{kind}.{name}": value.contiguous() for kind, own in named.items() for name, value in own.items()}
        return flat | {"observations": self.observations.contiguous()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Sketch:
        """The inverse of `tensors`.

        Raises:
            LookupError: if some are missing.
        """
        kinds = ("means", "components", "values", "totals")
        parts = {
            kind: {n.removeprefix(f"{kind}."): value for n, value in tensors.items() if n.startswith(f"{kind}.")}
            for kind in kinds
        }
        if any(own.keys() != parts["means"].keys() or not own for own in parts.values()):
            raise KeyError("means, components, values or totals of a layer")
        return cls(**parts, observations=tensors["observations"])


def make_sketch(model: DecisionTransformer, interface: str, trajectories: Trajectories) -> Sketch:
    """The sketch of a task from its demonstrations: EVA's components of what every layer of the trunk reads.

    Each observation is seen alone, as the first of its episode, by the model's state tokens. So a sketch knows no order
    of observations, and needs no actions, rewards or returns. Every fourth episode (of fewer than four, every fourth
    observation) is left out, and some of its observations are kept as they are.

    Raises:
        UserError: if there are fewer than four observations, or they are not the interface's.
    """
    spec = model.interfaces[interface]
    if trajectories.observations.shape[1] != spec.observation_size or len(trajectories.observations) < 4:
        raise UserError(
            f"The demonstrations of '{trajectories.task}' must hold at least 4 observations of {spec.observation_size} numbers, got "
            f"{len(trajectories.observations)} of {trajectories.observations.shape[1]}."
        )
    seen, kept = _parted(trajectories)
    row = trajectories.observations[0]
    most = max(1, min(KEPT, KEPT_BYTES // (row.numel() * row.element_size())))
    seen, kept = spread(seen, ROWS), spread(kept, most)
    widths = {
        f"trunk.{name}": layer.in_features
        for name, layer in model.trunk.named_modules()
        if name.rpartition(".")[2] in TRUNK_LAYERS and isinstance(layer, nn.Linear)
    }
    settings = EvaSettings(rho=1.0, tau=1.0, max_batches=len(seen))  # never ends before all was seen
    found = eva_init(
        model,
        (trajectories.observations[rows] for rows in seen.split(BATCH)),
        {name: min(RANK, width) for name, width in widths.items()},
        settings,
        Reading(forward=lambda _, rows: states_alone(model, interface, rows)),
        together=False,
    )
    groups = {result.group: result for result in found.values()}
    return Sketch(
        means={name: result.mean for name, result in groups.items()},
        components={name: result.components.cpu() for name, result in groups.items()},
        values={name: (result.squared_singular_values / result.rows).float() for name, result in groups.items()},
        totals={name: torch.tensor(result.total / result.rows) for name, result in groups.items()},
        observations=trajectories.observations[kept].clone(),
    )


def _parted(trajectories: Trajectories) -> tuple[Tensor, Tensor]:
    """The numbers of the rows that a sketch is made of, and of those left out."""
    rows = torch.arange(len(trajectories.observations))
    number = torch.searchsorted(trajectories.starts, rows, right=True) - 1 if len(trajectories.lengths) >= 4 else rows
    left_out = number % 4 == 3
    return rows[~left_out], rows[left_out]


def spread(rows: Tensor, count: int) -> Tensor:
    """So many of these rows (n, ...) at most, evenly spread."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).long()]


def states_alone(model: DecisionTransformer, interface: str, observations: Tensor) -> Tensor:
    """The trunk's features (n, 1, d) of observations (n, obs), by their state tokens alone.

    Each observation is in a window of its own.
    """
    device = next(model.parameters()).device
    observations = observations.to(device)
    n, spec = len(observations), model.interfaces[interface]
    zeros = torch.zeros(n, 1, device=device)
    batch = Batch(
        observations=observations[:, None],
        actions=torch.zeros(
            n, 1, *spec.action_shape, dtype=torch.int64 if spec.choices else torch.float32, device=device
        ),
        returns_to_go=zeros,
        rewards=zeros,
        mask=torch.ones(n, 1, dtype=torch.bool, device=device),
        interface=interface,
    )
    return model.trunk(model.embedder_of(interface).embed("state", batch), tokens=("state",))


@torch.no_grad()
def activations(
    model: DecisionTransformer, interface: str, observations: Tensor, layers: list[str]
) -> dict[str, Tensor]:
    """What these layers read of observations (n, obs): (n, d) float32 each."""
    readers = {name: reader(model, name) for name in layers}
    parts = [
        discover(model, readers, lambda rows=rows: states_alone(model, interface, rows), masked_rows(None))
        for rows in observations.split(BATCH)
    ]
    names = [group.layers[0] for group in parts[0][0]]
    return {name: torch.cat([seen[name].rows for _, seen in parts]).cpu() for name in names}


def load_sketch(path: Path, interface: Interface, widths: dict[str, int]) -> Sketch:
    """Read a sketch of observations of this interface, of layers of these widths.

    Raises:
        UserError: if it is missing, damaged, or of another model.
    """
    try:
        tensors = load_file(path)
        sketch = Sketch.of(tensors)
    except (SafetensorError, OSError, LookupError) as error:
        raise UserError(
            f"'{path}' is missing or damaged ({in_one_line(error)[:200]}): add the adapter again."
        ) from error
    fits = all(
        widths.get(name) == len(mean) and sketch.components[name].shape == (min(RANK, len(mean)), len(mean))
        for name, mean in sketch.means.items()
    )
    if not fits or sketch.observations.ndim != 2 or sketch.observations.shape[1] != interface.observation_size:
        raise UserError(f"'{path}' is a sketch of another model or of other observations: add the adapter again.")
    if broken := not_finite({name: tensor.float() for name, tensor in tensors.items()}):
        raise UserError(f"'{path}' holds NaN or infinite numbers in '{broken}': add the adapter again.")
    return sketch
