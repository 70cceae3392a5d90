"""An optimiser's state as tensors and JSON, and back: nothing is pickled, and nothing is imported because a file names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

OWN = ("params", "lr", "rate", "weight_decay")
"""Entries of a group that the run's settings decide."""


def pack(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimiser's state by name, and the rest of it as JSON with the names in the tensors' places."""
    tensors: dict[str, Tensor] = {}
    state = {
        name: {key: _packed(value, f"{name}.{key}", tensors) for key, value in optimizer.state[p].items()}
        for name, p in parameters.items()
        if p in optimizer.state
    }
    groups = [
        {key: _packed(value, f"group.{number}.{key}", tensors) for key, value in group.items() if key not in OWN}
        for number, group in enumerate(optimizer.param_groups)
    ]
    return tensors, {"state": state, "groups": groups}


def unpack(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
) -> None:
    """The inverse of `pack`, into an optimiser made with the same settings.

    Some optimisers keep objects of their own, such as GaLore's projectors. These are made in a step whose gradients are
    zero, and then get their values. The caller restores the weights after that.
    """
    if any(_has_object(value) for own in rest["state"].values() for value in own.values()):
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in parameters.items():
        if name not in rest["state"]:
            optimizer.state.pop(p, None)  # it had made no step with this one
        else:
            there = dict(optimizer.state[p]) if p in optimizer.state else {}
            own = rest["state"][name]
            optimizer.state[p] = {
                key: _unpacked(value, tensors, p.device, there.get(key)) for key, value in own.items()
            }
    for group, own in zip(optimizer.param_groups, rest["groups"], strict=True):
        device = group["params"][0].device
        group |= {key: _unpacked(value, tensors, device, group.get(key)) for key, value in own.items()}


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": [name, *sorted(range(value.ndim), key=value.stride, reverse=True)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, dict):
        return {"dict": {key: _packed(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if callable(value):
        return {"kept": None}
    return {"object": {key: _packed(item, f"{name}.{key}", tensors) for key, item in vars(value).items()}}


def _unpacked(node: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device, there: Any) -> Any:
    [(kind, content)] = node.items()
    if kind == "tensor":
        name, *order = content  # of the dimensions in memory: sums in another order round otherwise
        value = tensors[name].to(device)
        return value.permute(order).contiguous().permute([order.index(dimension) for dimension in range(value.ndim)])
    if kind == "value":
        return content
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_unpacked(item, tensors, device, None) for item in content)
    if kind == "dict":
        return {key: _unpacked(item, tensors, device, None) for key, item in content.items()}
    if kind == "object":
        for key, item in content.items():
            setattr(there, key, _unpacked(item, tensors, device, getattr(there, key, None)))
    return there


def _has_object(node: Mapping[str, Any]) -> bool:
    [(kind, content)] = node.items()
    inner = content if isinstance(content, list) else list(content.values()) if isinstance(content, dict) else []
    return kind == "object" or any(isinstance(item, dict) and _has_object(item) for item in inner)
