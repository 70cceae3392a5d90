"""A model -> the policy that rolls it out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from eva_rl.model.action_model import ActionModel
from eva_rl.model.cloning import CloningMLP, Reflexes
from eva_rl.model.decoder import Decoder


def policy_of(model: ActionModel, interface: str, alone: bool = False) -> Callable[[int], Decoder | Reflexes]:
    """Makes the policy of n episodes that begin, which act through this interface of the model.

    alone: in a control loop, see `Decoder`.
    """
    return partial(Reflexes if isinstance(model, CloningMLP) else Decoder, model, interface, alone=alone)
