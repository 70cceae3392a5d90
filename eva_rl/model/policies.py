"""A model -> the policy that rolls it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from eva_rl.model.action_model import ActionModel
from eva_rl.model.cloning import CloningMLP, Reflexes
from eva_rl.model.decision_transformer import DecisionTransformer
from eva_rl.model.decoder import Decoder


def policy_in(model: ActionModel, interface: str, tasks: Sequence[str], own: str | None = None) -> Decoder | Reflexes:
    """The policy of episodes that begin in these tasks, each with the vector that its task has in the model.

    own: the one that the model was fine-tuned on, whose vector is the one in force.
    """
    spec = model.interfaces[interface]
    if not spec.tasks:
        return policy_of(model, interface)(len(tasks))
    assert isinstance(model, DecisionTransformer)  # a cloned network knows no tasks
    return Decoder(model, interface, len(tasks), tasks=[-1 if task == own else spec.number_of(task) for task in tasks])


def policy_of(model: ActionModel, interface: str, alone: bool = False) -> Callable[[int], Decoder | Reflexes]:
    """Makes the policy of n episodes that begin, which act through this interface of the model.

    alone: in a control loop, see `Decoder`.
    """
    return partial(Reflexes if isinstance(model, CloningMLP) else Decoder, model, interface, alone=alone)
