"""A model's trainable parameters and a recipe -> the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from eva_rl.errors import UserError, in_one_line


@dataclass(frozen=True)
class LoraPair:
    """The two factors of a LoRA layer, whose weight is W + scale B A."""

    a: nn.Parameter  #: (r, in)
    b: nn.Parameter  #: (out, r)
    scale: float


@dataclass(frozen=True)
class Recipe:
    """How the optimiser is made."""

    make: Callable[..., torch.optim.Optimizer]
    """Makes the optimiser from groups of parameters and `lr=`, and with `pairs`, from `pairs=` too."""
    name: str = "adamw"
    pairs: bool = False
    """Whether it works on LoRA's factors in pairs."""
    constant: bool = False
    """Whether the learning rate stays what it is after the warm-up."""
    matrices: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the groups of matrices."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the groups of vectors and numbers."""


ADAMW = Recipe(partial(torch.optim.AdamW, fused=True))


def make_optimizer(
    recipe: Recipe,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    ratios: Mapping[str, float],
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of the parameters of `model` that require gradients.

    Each of its groups has a `rate`, the learning rate that the loop's schedule starts from.

    Args:
        weight_decay: of matrices. Biases and norms are left alone.
        ratios: parameters whose names contain this word learn at this multiple of the learning rate.
        rates: modules, by name, whose parameters learn at a rate of their own in its place.

    Raises:
        UserError: if a ratio is for parameters that do not exist, or the optimiser does not fit the model.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    extra = {}
    if recipe.pairs:
        extra["pairs"] = lora_pairs(model)
        if not extra["pairs"]:
            raise UserError(
                f"optimizer={recipe.name} works on LoRA's two factors, and there is no layer with both: take adapter=lora "
                "or another one of that form."
            )
    rate_of = partial(_rate, learning_rate=learning_rate, ratios=ratios, rates=rates or {})
    groups = _groups(recipe, trainable, weight_decay, ratios, rate_of)
    try:
        return recipe.make(groups, lr=learning_rate, **extra)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"optimizer={recipe.name} can't be made for this model: {in_one_line(error)}") from error


def _rate(name: str, learning_rate: float, ratios: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """The learning rate of the parameter of this name."""
    ratio = math.prod(value for word, value in ratios.items() if word in name)
    return next((rate for module, rate in rates.items() if f"{module}." in name), learning_rate * ratio)


def _groups(
    recipe: Recipe,
    trainable: Mapping[str, nn.Parameter],
    weight_decay: float,
    ratios: Mapping[str, float],
    rate_of: Callable[[str], float],
) -> list[dict[str, Any]]:
    """Groups of parameters of one learning rate, one weight decay and one kind each."""
    for word in ratios:
        if not any(word in name for name in trainable):
            raise UserError(f"adapter.ratios names '{word}', which is part of no trainable parameter's name.")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in trainable.items():
        groups.setdefault((rate_of(name), p.ndim >= 2), []).append(p)
    return [
        {"params": ps, "rate": rate, "weight_decay": weight_decay if matrix else 0.0}
        | dict(recipe.matrices if matrix else recipe.others)
        for (rate, matrix), ps in groups.items()
    ]


class _Scaled(Protocol):
    """A layer of peft's with LoRA."""

    scaling: Mapping[str, float]


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The factors of every LoRA layer of which B is trained, as peft names them."""
    pairs = []
    for layer in model.modules():
        first, second = (getattr(layer, kind, None) for kind in ("lora_A", "lora_B"))
        if not (isinstance(first, nn.ModuleDict) and isinstance(second, nn.ModuleDict)):
            continue
        for adapter in second:
            a, b = (cast("nn.Linear", factors[adapter]).weight for factors in (first, second))
            if not (isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)):
                continue  # made of other numbers at every call, as Hydra's A is
            if b.requires_grad and a.ndim == b.ndim == 2:
                pairs.append(LoraPair(a, b, float(cast("_Scaled", layer).scaling[adapter])))
    return pairs


def on_gradients(
    optimizer: torch.optim.Optimizer, change: Callable[[torch.optim.Optimizer], None]
) -> torch.optim.Optimizer:
    """The optimiser, with `change` called on it before every step, when the gradients are there."""

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            change(optimizer)

    optimizer.register_step_pre_hook(hook)
    return optimizer


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(gram + damping I)^-1 of a symmetric matrix (r, r), in double precision."""
    gram = gram.double()
    return torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
