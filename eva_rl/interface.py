"""What goes into a model and what comes out of it: sizes and scales of one family of observations and actions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eva_rl.errors import UserError
from eva_rl.prepared import Words, members_of
from eva_rl.spaces import ActionPart, Part, dtype_of, spaces_from_text

OBSERVATION_CLIP = 10.0
"""Normalised observations are clipped to this range: a target task may move what the statistics never saw move."""


@dataclass(frozen=True)
class Interface:
    """The observations, actions and returns of a domain or a dataset, with the statistics that normalise them.

    Discrete actions are numbered from 0. `action_size` is then the number of choices of all their components, and
    `action_mean` and `action_scale` are empty.

    An action of several parts, a Dict's or Tuple's, is a row of real numbers and choices. `action_size` then counts the
    outputs that predict them. `action_mean` and `action_scale` are those of the row, with 0 and 1 for choices.
    """

    name: str
    observation_size: int
    """Numbers in a flat observation."""
    action_kind: Literal["continuous", "discrete", "multi_discrete", "parts"]
    action_size: int
    observation_mean: tuple[float, ...]
    """Of the numbers in vectors. Images, grids, tokens and choices have none."""
    observation_std: tuple[float, ...]
    action_mean: tuple[float, ...]
    action_scale: tuple[float, ...]
    return_scale: float
    reward_scale: float
    parts: tuple[Part, ...] = ()
    """What an observation consists of, by default one vector."""
    choices: tuple[int, ...] = ()
    """The choices of each component of a discrete action, by default `action_size` for a single one."""
    tokens: tuple[str, ...] = ()
    """Those of the model's tokens that it reads, in the model's order. By default it reads all."""
    tasks: tuple[str, ...] = ()
    """Those that have a vector of their own in the model, in the order of its rows."""
    spaces: str = ""
    """The environment's spaces of observations and actions, as `eva_rl.spaces.spaces_to_text` writes them. Empty if
    unknown."""
    action_parts: tuple[ActionPart, ...] = ()
    """What an action consists of, where it is one of several parts."""

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (Part("vector", (self.observation_size,)),))
        if not self.choices and self.action_kind == "discrete":
            object.__setattr__(self, "choices", (self.action_size,))

    def number_of(self, task: str) -> int:
        """The row of the task's vector, or -1 where it has none."""
        return self.tasks.index(task) if task in self.tasks else -1

    @property
    def observation_dtype(self) -> str:
        return dtype_of(self.parts)

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Of one action: (act,), (components,), or () for one choice."""
        sizes = {
            "continuous": (self.action_size,),
            "discrete": (),
            "multi_discrete": (len(self.choices),),
            "parts": (sum(part.size for part in self.action_parts),),
        }
        return sizes[self.action_kind]

    @property
    def parts_of_actions(self) -> tuple[ActionPart, ...]:
        """What an action consists of: one part, unless it is a Dict's or Tuple's."""
        if self.action_kind == "parts":
            return self.action_parts
        return (ActionPart(self.action_kind, math.prod(self.action_shape), self.choices),)

    @property
    def sizes(self) -> tuple[tuple[Part, ...], str, int, tuple[int, ...], tuple[ActionPart, ...]]:
        """What tensors of this interface must have in common."""
        return (self.parts, self.action_kind, self.action_size, self.choices, self.action_parts)

    def fits(self, other: Interface) -> bool:
        """Whether tensors of the other interface have this one's shapes and kinds."""
        return self.sizes == other.sizes

    @property
    def vocabularies(self) -> list[tuple[str, ...]]:
        """The numbered words of each text in its observations."""
        if '"Words"' not in self.spaces:
            return []
        return [member.words for member in members_of(spaces_from_text(self.spaces)[0]) if isinstance(member, Words)]

    def require(self, other: Interface, what: str) -> None:
        """Raise a `UserError` that names `what` unless the other interface fits this one."""
        if self.fits(other) and self.vocabularies != other.vocabularies:
            raise UserError(
                f"{what} numbers the words of its text otherwise than the interface '{self.name}': take as many demonstrations as it was "
                "trained on, or a base that does not know this dataset."
            )
        if not self.fits(other):
            raise UserError(f"{what} has {other.in_words}, but the interface '{self.name}' expects {self.in_words}.")

    @property
    def in_words(self) -> str:
        """Its observations and actions, to stand in a sentence."""
        vector = [part.kind for part in self.parts] == ["vector"]
        seen = f"of size {self.observation_size}" if vector else f"of {' and '.join(map(str, self.parts))}"
        if self.action_parts:
            return f"observations {seen} and actions of {' and '.join(map(str, self.action_parts))}"
        size = " x ".join(map(str, self.choices)) if self.action_kind == "multi_discrete" else self.action_size
        return f"observations {seen} and {self.action_kind.replace('_', '-')} actions of size {size}"


def interface_name(dataset_id: str) -> str:
    """The name of a Minari dataset's own interface: its id as the name of a module, in which PyTorch forbids dots."""
    return dataset_id.replace("/", "_").replace(".", "_")


@dataclass(frozen=True)
class TaskStatistics:
    """What is known of a task from the trajectories of it that a model was trained on."""

    episodes: int
    return_max: float
    """The best undiscounted episode return: the return a rollout asks for."""
    return_mean: float
    success_rate: float | None
    """Share of the episodes that solved the task. None where the dataset does not say."""
    return_deciles: tuple[float, ...] = ()
    """(11,) the quantiles 0, 0.1, ..., 1 of the episodes' returns."""
    return_typical: float | None = None
    """The median return of the successful episodes, or of all where success is unknown. None where none succeeded, or
    where the checkpoint is older than this field."""
