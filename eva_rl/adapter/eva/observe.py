"""A model and a batch -> the rows that each layer reads, without running more of the model than that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.errors import UserError

Rows = Callable[[tuple[Any, ...], str], Tensor]
"""(a layer's positional arguments, its name) -> the rows (n, d) that count."""

Room = Callable[[str, int], Tensor | None]
"""(a layer's name, a number of rows n) -> memory (n, d) that its rows may be written to."""


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensors."""

    layers: tuple[str, ...]
    calls: int
    """How often each of them runs in one forward pass."""


class _Enough(BaseException):
    """Ends a forward pass whose remaining layers nobody waits for; no `except Exception` of a model holds it up."""


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is in the mode it was in, and so is torch's random state."""
    training = {module: module.training for module in model.modules()}
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(cuda)):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def masked_rows(masks: Tensor | Sequence[Tensor] | None, room: Room = lambda name, count: None) -> Rows:
    """Rows of a layer's input (..., d) where the mask (...) is True; a copy, whatever the model does to the input.

    Of several masks, a layer's is the one of its input's shape.
    """
    masks = (masks,) if isinstance(masks, Tensor) else masks
    indices = {mask.shape: mask.flatten().nonzero()[:, 0] for mask in reversed(masks or ())}

    def rows(inputs: tuple[Any, ...], name: str) -> Tensor:
        x = inputs[0]
        flat = x.reshape(-1, x.shape[-1])
        index = indices.get(x.shape[:-1])
        if index is None and masks is not None:
            raise UserError(
                f"The layer '{name}' reads inputs of shape {tuple(x.shape)}, but the token mask has shape "
                f"{' or '.join(str(tuple(mask.shape)) for mask in masks)}."
            )
        out = room(name, len(flat) if index is None else len(index))
        if out is not None and out.dtype != flat.dtype:
            out = None
        if index is None:
            return flat.clone() if out is None else out.copy_(flat)
        return torch.index_select(flat, 0, index, out=out)

    return rows


def input_width(module: nn.Module, name: str) -> int:
    """The width of a linear layer's input, also inside an adapter, quantised, or GPT-2's `Conv1D`.

    Raises:
        UserError: if it is no linear layer.
    """
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    width = getattr(base, "in_features", None)
    if width is None and type(base).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        width = weight.shape[0]
    if width is None:
        raise UserError(f"EVA adapts linear layers; '{name}' is a {type(base).__name__}: leave it out of the adapter.")
    return width


def output_width(module: nn.Module) -> int:
    """The width of a linear layer's output, for the layers that `input_width` knows."""
    base = getattr(module, "base_layer", module)
    return base.weight.shape[1] if type(base).__name__ == "Conv1D" else base.out_features


def discover(
    model: nn.Module, widths: Mapping[str, int], run: Callable[[], Any], rows: Rows, shared: bool = True
) -> tuple[list[Group], list[Tensor]]:
    """Run one forward pass; return the groups of layers that read the same tensors, in the order of reading, and the rows
    of each.

    Inputs are the same if they are one tensor object, not if their values are equal. `shared=False`: each layer is a
    group of its own.

    Raises:
        UserError: if a layer does not run, or reads something else than floating-point rows of its width.
    """
    inputs: list[tuple[Any, Tensor]] = []  # kept until the pass is over, so that no other tensor takes their place
    calls: dict[str, list[int]] = {name: [] for name in widths}

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        _check_input(x, widths[name], name)
        found = next((i for i, (tensor, _) in enumerate(inputs) if tensor is x and shared), None)
        if found is None:
            inputs.append((x, rows(arguments, name)))
            found = len(inputs) - 1
        calls[name].append(found)

    with _hooked(model, widths, hook):
        run()
    _check_all_ran(calls)
    members: dict[tuple[int, ...], list[str]] = {}
    for name, seen in calls.items():
        members.setdefault(tuple(seen), []).append(name)
    in_order = sorted(members.items(), key=lambda member: max(member[0]))
    groups = [Group(tuple(names), len(seen)) for seen, names in in_order]
    return groups, [_joined([inputs[i][1] for i in seen]) for seen, _ in in_order]


def observe(model: nn.Module, groups: Sequence[Group], run: Callable[[], Any], rows: Rows) -> list[Tensor]:
    """Run a forward pass until these groups have been seen, and no further; return the rows of each."""
    collected: dict[str, list[Tensor]] = {group.layers[0]: [] for group in groups}
    missing = sum(group.calls for group in groups)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal missing
        collected[name].append(rows(arguments, name))
        missing -= 1
        if missing == 0:
            raise _Enough

    try:
        with _hooked(model, collected, hook):
            run()
    except _Enough:
        pass
    _check_all_ran(collected)
    return [_joined(seen) for seen in collected.values()]


def gradient_weights(
    model: nn.Module, groups: Sequence[Group], loss: Callable[[], Tensor], rows: Rows
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of each group's one layer, and the squared norm (n,) of the loss's gradient at its output for each row.

    One forward and one backward pass; no parameter gets a gradient.
    """
    names = [group.layers[0] for group in groups]
    collected: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        collected[name].append(rows(tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments), name))

    def after(name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a clone, which the model may change in place
        outputs[name].append(output)
        return output

    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: after(name, output))
        for name in names
    ]
    try:
        with torch.enable_grad(), _hooked(model, names, before):
            value = loss()
    finally:
        for handle in handles:
            handle.remove()
    flat = [output for name in names for output in outputs[name]]
    if not flat or not value.requires_grad:
        raise UserError("weighting=gradient needs a loss that depends on the adapted layers; this one does not.")
    gradients = dict(zip(map(id, flat), torch.autograd.grad(value, flat, allow_unused=True), strict=True))
    weights = []
    for name in names:
        squares = []
        for output in outputs[name]:
            gradient = gradients[id(output)]
            squared = torch.zeros_like(output[..., :1]) if gradient is None else gradient.square().sum(-1, keepdim=True)
            squares.append(rows((squared.detach(),), name)[:, 0])
        weights.append(_joined(squares))
    return [_joined(collected[name]) for name in names], weights


@contextmanager
def _hooked(model: nn.Module, names: Sequence[str] | Mapping[str, Any], hook: Callable[..., None]) -> Iterator[None]:
    """Pre-hooks on these layers that call `hook(name, positional arguments)`."""

    def pre_hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hook(name, arguments or tuple(keywords.values()))

        return call

    handles = [model.get_submodule(n).register_forward_pre_hook(pre_hook(n), with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_input(x: Any, width: int, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_quantized or x.shape[-1] != width:
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise UserError(
            f"The layer '{name}' reads {what}, where EVA expects floating-point rows {width} wide: leave it out of the "
            "adapter."
        )


def _check_all_ran(calls: Mapping[str, Sequence[Any]]) -> None:
    silent = [name for name, seen in calls.items() if not seen]
    if silent:
        raise UserError(f"The layer '{silent[0]}' did not run in the forward pass: leave it out of the adapter.")


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
