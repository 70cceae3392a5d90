"""Kinds of layers: what EVA reads of each, and which form its directions take there."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from eva_rl.errors import UserError

Read = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[Tensor]]
"""(the module that runs, its positional arguments, its keywords) -> the layer's inputs, each (..., d)."""


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def first_argument(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """What a module is called with first."""
    return [next(iter((*arguments, *keywords.values())), None)]


@dataclass(frozen=True)
class Reader:
    """How one layer is read."""

    width: int
    """d, the entries of one row of its input."""
    outputs: int
    """The entries of one row of its output: a rank costs d and these."""
    module: str
    """The name of the module whose calls are watched."""
    read: Read = first_argument
    form: tuple[int, ...] = ()
    """The form of one of A's rows, where it is no vector."""
    sharing: Hashable = "rows"
    """Layers of equal `sharing` that are called with the same tensor read the same rows."""
    redistributed: bool = True
    """False: the layer keeps its nominal rank."""

    def shaped(self, rows: Tensor) -> Tensor:
        """A's rows (r, d) in the form (r, ...) that A has."""
        return rows.reshape(len(rows), *self.form) if self.form else rows


def reader(model: nn.Module, name: str) -> Reader:
    """How to read this layer, also inside an adapter.

    Raises:
        UserError: if EVA has no directions for layers of its kind.
    """
    module = model.get_submodule(name)
    base = getattr(module, "base_layer", module)
    owner = name.rpartition(".")[0]
    attention = model.get_submodule(owner) if owner else model
    if isinstance(attention, nn.MultiheadAttention):  # its forward takes out_proj's weight and never calls it
        return _of_out_proj(model, owner, attention)
    if isinstance(base, nn.MultiheadAttention):
        width = base.embed_dim
        return Reader(width, 3 * width, name, _attended, sharing=name, redistributed=False)
    if isinstance(base, Convolution):
        return _of_convolution(module, base, name)
    weight = getattr(base, "weight", None)
    if type(base).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:  # GPT-2's
        return Reader(weight.shape[0], weight.shape[1], name)
    if isinstance(getattr(base, "in_features", None), int) and not hasattr(module, "parameter_name"):
        linear = cast("nn.Linear", base)  # or alike, such as a quantised one
        return Reader(linear.in_features, linear.out_features, name)
    raise UserError(f"EVA adapts linear layers; '{name}' is a {type(base).__name__}: leave it out of the adapter.")


def readers_of(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Reader], dict[str, str]]:
    """The readers of the layers that have one, and for each other layer a sentence that says why it has none."""
    found, refused = {}, {}
    for name in names:
        try:
            found[name] = reader(model, name)
        except UserError as error:
            refused[name] = str(error)
    return found, refused


def _of_convolution(module: nn.Module, base: Convolution, name: str) -> Reader:
    """A convolution is a linear layer over patches (im2col): W (out, C k1 k2) times rows of C k1 k2 entries."""
    adapters = list(getattr(module, "lora_A", {}).values())
    # LoRA's A, which is what reads them, takes stride and padding alone from the base.
    conv: Convolution = adapters[0] if adapters else base
    form = conv.weight.shape[1:]  # (C, k1, k2)
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return Reader(
        math.prod(form),
        base.out_channels,
        name,
        lambda module, arguments, keywords: [patches(first_argument(module, arguments, keywords)[0], conv)],
        tuple(form),
        geometry,
        base.groups == 1,  # peft wants ranks that the groups divide
    )


def patches(x: Any, conv: Convolution) -> Any:
    """The patches (B, O1, ..., C k1 ...) of x (B, C, L1, ...) or (C, L1, ...) that a convolution multiplies with its weight."""
    dimensions = len(conv.kernel_size)
    if not isinstance(x, Tensor) or x.ndim not in (dimensions + 1, dimensions + 2):
        return x
    x = x if x.ndim == dimensions + 2 else x[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, _padding(conv), mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]  # (B, C, O1, ..., k1, ...)
    order = (0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions))
    return x.permute(order).flatten(1 + dimensions)


def _padding(conv: Convolution) -> list[int]:
    """What is added before and after each dimension, the last first, as `torch.nn.functional.pad` takes it."""
    sides = []
    for i, (size, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        total = (size - 1) * dilation
        both = {"same": (total // 2, total - total // 2), "valid": (0, 0)}
        sides.append(both[conv.padding] if isinstance(conv.padding, str) else 2 * (conv.padding[i],))
    return [pad for side in reversed(sides) for pad in side]


def _bound(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("query", "key", "value"), arguments, strict=False)) | keywords


def _batch_first(attention: nn.Module, x: Tensor) -> Tensor:
    return x if attention.batch_first or x.ndim != 3 else x.transpose(0, 1)


def _attended(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """What in_proj reads: query, key and value, each tensor once."""
    bound = _bound(arguments, keywords)
    distinct = {id(bound[key]): bound[key] for key in ("query", "key", "value")}
    return [_batch_first(module, x) for x in distinct.values()]


def _of_out_proj(model: nn.Module, owner: str, attention: nn.MultiheadAttention) -> Reader:
    outer = owner.removesuffix(".base_layer")
    if outer == owner and hasattr(attention.out_proj, "lora_A"):
        raise UserError(
            f"'{owner}' never calls its out_proj, so LoRA has no effect there: target '{owner.rpartition('.')[2]}' itself."
        )
    width = attention.embed_dim
    return Reader(width, width, outer, _values_of(attention), sharing=f"{owner}.out_proj", redistributed=False)


def _values_of(attention: nn.MultiheadAttention) -> Read:
    """What out_proj reads: the heads' outputs side by side. They are computed anew, with the identity in out_proj's place."""

    def read(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
        projection = attention.out_proj
        projection = getattr(projection, "base_layer", projection)
        weight = projection.weight
        names = {id(weight): torch.eye(len(weight)).to(weight)}
        if projection.bias is not None:
            names[id(projection.bias)] = torch.zeros_like(projection.bias)
        swapped = {name: names[id(p)] for name, p in attention.named_parameters() if id(p) in names}
        call = _Forward(attention)
        values = torch.func.functional_call(
            call, {f"attention.{name}": value for name, value in swapped.items()}, arguments, keywords
        )
        return [_batch_first(attention, values[0])]

    return read


class _Forward(nn.Module):
    """Calls an attention's forward without its hooks."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.attention.forward(*arguments, **keywords)
