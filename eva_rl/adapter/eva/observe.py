"""A model and a batch -> the rows that each layer reads, without running more of the model than that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva.kinds import Reader, first_argument
from eva_rl.errors import UserError

Rows = Callable[[tuple[Any, ...], str], Tensor]
"""(a layer's input (..., d) and what else it was called with, its name) -> the rows (n, d) that count."""

Room = Callable[[str, int], Tensor | None]
"""(a layer's name, a number of rows n) -> memory (n, d) that its rows may be written to."""


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensors."""

    layers: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What a forward pass showed of one layer."""

    rows: Tensor  #: (n, d) that count; none if it did not run
    calls: int
    """How often it ran."""


class _Enough(BaseException):
    """Ends a forward pass whose remaining layers nobody waits for.

    No `except Exception` of a model holds it up.
    """


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and uncompiled, since compiled code calls no hooks.

    Afterwards each module is in the mode it was in, and torch's random state is what it was.
    """
    training = {module: module.training for module in model.modules()}
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(cuda)), _eager(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _eager(model: nn.Module) -> AbstractContextManager:
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def masked_rows(masks: Tensor | Sequence[Tensor] | None, room: Room = lambda name, count: None) -> Rows:
    """Rows of a layer's input (..., d) where the mask (...) is True.

    They are a copy, so that nothing the model does to its input changes them. If there are several masks, a layer's is
    the one of its input's shape. Inputs (n, d) may also hold all tokens one after another, a row each.
    """
    masks = (masks,) if isinstance(masks, Tensor) else masks
    indices: dict[torch.Size | None, Tensor] = {
        mask.shape: mask.flatten().nonzero()[:, 0] for mask in reversed(masks or ())
    }
    flattened = {mask.numel(): mask.shape for mask in reversed(masks or ())}

    def rows(inputs: tuple[Any, ...], name: str) -> Tensor:
        x = inputs[0]
        flat = x.reshape(-1, x.shape[-1])
        index = indices.get(x.shape[:-1], indices.get(flattened.get(len(flat))) if x.ndim == 2 else None)
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


def discover(
    model: nn.Module, readers: Mapping[str, Reader], run: Callable[[], Any], rows: Rows, shared: bool = True
) -> tuple[list[Group], dict[str, Seen]]:
    """Run one forward pass, and return the groups of layers that read the same tensors and what was seen of each layer.

    Groups are in the order of reading. A layer that did not run is a group of its own, at the end. Inputs are the same
    if they are one tensor object, unchanged in between. Equal values do not make them so. With `shared=False`, each
    layer is a group of its own.

    Raises:
        UserError: if a layer reads something other than floating-point rows of its width.
    """
    inputs: list[
        tuple[Any, Any, list[Tensor]]
    ] = []  # kept until the pass is over, so that no other tensor takes their place
    calls: dict[str, list[int]] = {name: [] for name in readers}

    def hook(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        source = first_argument(module, arguments, keywords)[0]
        kind = readers[name].sharing, _version(source)
        found = next((i for i, (x, other, _) in enumerate(inputs) if x is source and other == kind and shared), None)
        if found is None:
            inputs.append((source, kind, _rows_of(readers[name], name, module, arguments, keywords, rows)))
            found = len(inputs) - 1
        calls[name].append(found)

    with _hooked(model, readers, hook):
        run()
    members: dict[tuple[int, ...] | str, list[str]] = {}
    for name, seen in calls.items():
        members.setdefault(tuple(seen) or name, []).append(name)
    in_order = sorted(members.values(), key=lambda names: max(calls[names[0]], default=len(inputs)))
    seen = {}
    for names in in_order:
        indices = calls[names[0]]
        joined = _joined([part for i in indices for part in inputs[i][2]], readers[names[0]].width)
        seen |= dict.fromkeys(names, Seen(joined, len(indices)))
    return [Group(tuple(names)) for names in in_order], seen


def observe(
    model: nn.Module,
    groups: Sequence[Group],
    readers: Mapping[str, Reader],
    run: Callable[[], Any],
    rows: Rows,
    cut: bool,
) -> dict[str, Seen]:
    """Run a forward pass, and return what was seen of each group's first layer.

    With `cut`, the pass ends once each of these layers has run. Otherwise it runs to its end, and each call is counted.
    """
    collected: dict[str, list[Tensor]] = {group.layers[0]: [] for group in groups}
    calls = dict.fromkeys(collected, 0)
    missing = set(collected)

    def hook(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        collected[name] += _rows_of(readers[name], name, module, arguments, keywords, rows)
        calls[name] += 1
        missing.discard(name)
        if cut and not missing:
            raise _Enough

    try:
        with _hooked(model, {name: readers[name] for name in collected}, hook):
            run()
    except _Enough:
        pass
    return {name: Seen(_joined(parts, readers[name].width), calls[name]) for name, parts in collected.items()}


def _version(x: Any) -> int:
    """How often a tensor was changed in place, where torch counts it."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _rows_of(
    reader: Reader,
    name: str,
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    rows: Rows,
) -> list[Tensor]:
    """The rows (n, d) of each of a layer's inputs that count."""
    rest = arguments[1:] if arguments else tuple(keywords.values())[1:]
    found = []
    for x in reader.read(module, arguments, keywords):
        _check_input(x, reader.width, name)
        found.append(rows((x, *rest), name))
    return found


def gradient_weights(
    model: nn.Module,
    groups: Sequence[Group],
    readers: Mapping[str, Reader],
    loss: Callable[[], Tensor],
    rows: Rows,
) -> tuple[dict[str, Seen], dict[str, Tensor]]:
    """What was seen of each group's one layer, and the squared norm (n,) of the loss's gradient at its output for each row.

    This takes one forward and one backward pass. No parameter gets a gradient.
    """
    names = [group.layers[0] for group in groups]
    collected, outputs = ({name: [] for name in names} for _ in range(2))

    def before(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in (*arguments, *keywords.values()))
        collected[name] += _rows_of(readers[name], name, module, detached, {}, rows)

    def after(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a clone, which the model may change in place
        outputs[name].append(output)
        return output

    handles = [model.get_submodule(name).register_forward_hook(partial(after, name)) for name in names]
    try:
        with torch.enable_grad(), _hooked(model, {name: readers[name] for name in names}, before):
            value = loss()
    finally:
        for handle in handles:
            handle.remove()
    flat = [output for name in names for output in outputs[name]]
    if not flat or not value.requires_grad:
        raise UserError("weighting=gradient needs a loss that depends on the adapted layers; this one does not.")
    gradients = iter(torch.autograd.grad(value, flat, allow_unused=True))
    seen, weights = {}, {}
    for name in names:
        squares = [rows((_squared(next(gradients), output),), name)[:, 0] for output in outputs[name]]
        seen[name] = Seen(_joined(collected[name], readers[name].width), len(outputs[name]))
        weights[name] = _joined(squares, 1).flatten()
    return seen, weights


def _squared(gradient: Tensor | None, output: Tensor) -> Tensor:
    """The squared norms (..., 1) of the gradient (..., d) at an output, or zeros where there is none."""
    return torch.zeros_like(output[..., :1]) if gradient is None else gradient.square().sum(-1, keepdim=True)


@contextmanager
def _hooked(model: nn.Module, readers: Mapping[str, Reader], hook: Callable[..., None]) -> Iterator[None]:
    """Pre-hooks that call `hook(name, module, positional arguments, keywords)` where these layers are read."""

    def pre_hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hook(name, module, arguments, keywords)

        return call

    handles = [
        model.get_submodule(reader.module).register_forward_pre_hook(pre_hook(name), with_kwargs=True)
        for name, reader in readers.items()
    ]
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


def _joined(parts: list[Tensor], width: int) -> Tensor:
    if not parts:
        return torch.empty(0, width)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
