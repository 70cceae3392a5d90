"""Where nothing else is said: how a model is called with a batch, and which rows of its layers count."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva.observe import Room, Rows, masked_rows

IGNORED = -100
"""A label that no loss counts, in torch and transformers."""


def call(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch as a data loader gives it: a mapping by its keys, a tuple or list by position, anything else
    as the one argument.

    What `forward` does not take is left out, as labels often are.
    """
    if not isinstance(batch, Mapping) and type(batch) not in (tuple, list):
        return model(batch)
    parameters = _parameters(model)
    kinds = {p.kind for p in parameters}
    if isinstance(batch, Mapping):
        taken = {p.name for p in parameters}
        every = inspect.Parameter.VAR_KEYWORD in kinds
        return model(**{key: value for key, value in batch.items() if every or key in taken})
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return model(*(batch if inspect.Parameter.VAR_POSITIONAL in kinds else batch[: len(positional)]))


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """What the model's own `forward` takes, also inside peft's and torch.compile's wrappers."""
    for attribute in ("get_base_model", "_orig_mod"):
        while hasattr(model, attribute):
            inner = getattr(model, attribute)
            model = inner() if attribute == "get_base_model" else inner
    return list(inspect.signature(model.forward).parameters.values())


def shapes(batch: Any) -> Any:
    """The shapes of all tensors in a batch, in its own structure."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, Mapping):
        return tuple((key, shapes(value)) for key, value in batch.items())
    if isinstance(batch, list | tuple):
        return tuple(shapes(value) for value in batch)
    if dataclasses.is_dataclass(batch):
        return tuple(shapes(getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return type(batch)


class TokenRows:
    """Chooses the rows that count by what a language model's batch says of its tokens: attention masks and labels.

    Tokens are chosen by `attention_mask`, (B, T). In a decoder, tokens whose labels are `ignored` are left out too, if
    `labels` has the mask's shape. In an encoder-decoder model, the attention mask chooses the encoder's rows, and also
    those of what the encoder gave the decoder. `decoder_attention_mask` and `labels` choose the decoder's. Without
    masks, all rows count. All rows also count in layers whose inputs have another shape, and a warning tells of these
    layers.

    peft's functions for language models choose the same rows, where they can.
    """

    def __init__(self, model: nn.Module, ignored: int | None = IGNORED):
        self.model, self.ignored = model, ignored
        get_base_model = getattr(model, "get_base_model", None)
        base = model if get_base_model is None else get_base_model()
        both = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        get_encoder = getattr(base, "get_encoder", None)
        self.encoder = get_encoder() if both and get_encoder is not None else None
        self.inside, self.given = False, []
        self.others: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def __call__(self, batch: Any, room: Room) -> Rows:
        self.inside, self.given = False, []
        masks = self.masks(batch)
        encoder, decoder = (masked_rows(mask, room) for mask in masks)
        everything = masked_rows(None, room)

        def rows(inputs: tuple[Any, ...], name: str) -> Tensor:
            x = inputs[0]
            of_encoder = self.inside or any(x is tensor for tensor in self.given)
            mask = masks[0 if of_encoder else 1]
            if mask is None or x.shape[:-1] == mask.shape[:1]:  # one row for each of the batch
                return everything(inputs, name)
            if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
                self.others.setdefault(name, (tuple(x.shape), tuple(mask.shape)))
                return everything(inputs, name)
            return (encoder if of_encoder else decoder)(inputs, name)

        return rows

    def masks(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens (B, T) count for an encoder and which for a decoder, or None for all.

        They are the same for models that do not have both.
        """
        if not isinstance(batch, Mapping):
            return None, None
        mask, labels = _matrix(batch.get("attention_mask")), _matrix(batch.get("labels"))
        counted = (
            None if labels is None or self.ignored is None or labels.is_floating_point() else labels != self.ignored
        )
        if self.encoder is None:
            ids = _matrix(batch.get("input_ids"))
            if mask is None and ids is not None:
                mask = torch.ones_like(ids)
            both = None if mask is None else _and(mask.bool(), counted)
            return both, both
        decoder = _matrix(batch.get("decoder_attention_mask"))
        decoder = counted if decoder is None else _and(decoder.bool(), counted)
        return None if mask is None else mask.bool(), decoder

    @contextmanager
    def watching(self) -> Iterator[TokenRows]:
        """Tell layers of the encoder from others while this lasts, and give the warning at its end."""
        handles = []
        if self.encoder is not None:
            handles.append(self.encoder.register_forward_pre_hook(self._enter))
            handles.append(self.encoder.register_forward_hook(self._leave))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        if self.others:
            name, (shape, mask) = next(iter(self.others.items()))
            warnings.warn(
                f"{len(self.others)} layers read inputs of other shapes than the attention mask or labels, such as '{name}' {shape} "
                f"where {mask} are told apart: all their rows count, padding included. token_mask can choose them.",
                stacklevel=3,
            )

    def _enter(self, *_: Any) -> None:
        self.inside = True

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inside = False
        outputs = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        self.given = [value for value in outputs if isinstance(value, Tensor)]


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


def _and(mask: Tensor, other: Tensor | None) -> Tensor:
    return mask if other is None or other.shape != mask.shape else mask & other
