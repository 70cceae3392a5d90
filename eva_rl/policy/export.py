"""A policy -> one file that acts without this project: its window in, its action out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import eva_rl
from eva_rl.batch import Batch
from eva_rl.errors import UserError
from eva_rl.files import replacing
from eva_rl.policy.acting import ActingPolicy
from eva_rl.prepared import Exact, Prepared, Words, shape_of
from eva_rl.spaces import first_choice, nested

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
NOTES = "eva_rl.json"
"""The extra file of a `.pt2` that holds what `export_notes` says. In ONNX, the model's metadata hold this."""


class Window(nn.Module):
    """The greedy action for the newest step of a window that the caller keeps, in the environment's units, shape and type.

    Inputs are arrays over `context` steps, of which those after `step` are not looked at. There is one for each array
    of an observation: `observations` or, in a Dict or Tuple, `observations.<key>`. The others are those of `actions`
    (or `actions.<key>`), `rewards` and `returns_to_go` that the model reads. There is one output for each array of an
    action: `action` or `action.<key>`. All are as the environment has them, except for text and large pictures, which
    come as `eva_rl.prepared` makes them.
    """

    def __init__(self, policy: ActingPolicy):
        super().__init__()
        self.model, self.interface, self.space = policy.model, policy.interface, policy.action_space
        self.context = policy.model.config.context
        self.leaves = dict(leaves(policy.observation_space, "observations"))
        tokens = policy.model.embedder_of(self.interface.name).tokens
        self.acts = dict(leaves(self.space, "actions"))
        past = {"action": self.acts, "reward": {"rewards": NUMBER}, "return": {"returns_to_go": NUMBER}}
        self.past = {name: space for kind in tokens if kind != "state" for name, space in past[kind].items()}
        self.names = (*self.leaves, *self.past, "step")
        self.outputs = tuple(name for name, _ in leaves(self.space, "action"))

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs of the right shapes and types."""
        spaces = (*self.leaves.values(), *self.past.values())
        return *(torch.zeros(self.context, *_shape(s), dtype=_type(s)) for s in spaces), torch.tensor(0)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        *windows, step = inputs
        given = dict(zip(self.names, windows, strict=False))
        steps = torch.arange(self.context)

        def rows(name: str, space: gym.Space, seen: Tensor) -> Tensor:
            numbers = given[name]
            if (start := getattr(space, "start", None)) is not None:  # choices that may count from another number
                numbers = numbers - torch.as_tensor(start)
            numbers = numbers.reshape(self.context, -1)
            return torch.where(seen[:, None], numbers, torch.zeros_like(numbers))  # (T, size)

        wide = torch.float64 if self.interface.observation_dtype == "float64" else torch.float32
        observations = [rows(name, space, steps <= step).to(wide) for name, space in self.leaves.items()]
        number = {
            name: rows(name, NUMBER, steps <= step)[:, 0] if name in given else torch.zeros(self.context)
            for name in ("rewards", "returns_to_go")
        }
        kind = torch.int64 if self.interface.choices else torch.float32
        actions = torch.zeros(self.context, *self.interface.action_shape, dtype=kind)
        if self.acts.keys() <= given.keys():
            done = torch.cat([rows(name, space, steps < step) for name, space in self.acts.items()], -1)
            actions = done.to(kind).reshape(actions.shape)
        batch = Batch(
            observations=torch.cat(observations, -1)[None],
            actions=actions[None],
            returns_to_go=number["returns_to_go"][None],
            rewards=number["rewards"][None],
            mask=torch.ones(1, self.context, dtype=torch.bool),
            interface=self.interface.name,
        )
        predicted = self.model(batch)[0].index_select(0, step.reshape(1))[0]  # (act,)
        chosen = self.model.embedder_of(self.interface.name).greedy(predicted)
        if not nested(self.space):
            return _action(self.space, chosen)
        columns = chosen.split([part.size for part in self.interface.action_parts])
        return tuple(_action(space, own) for space, own in zip(self.acts.values(), columns, strict=True))


def _action(space: gym.Space, chosen: Tensor) -> Tensor:
    """As `eva_rl.spaces.to_action`, of a space without members."""
    if not isinstance(space, gym.spaces.Box):
        return (chosen.long() + torch.as_tensor(first_choice(space))).reshape(shape_of(space))
    low, high = (torch.as_tensor(side.reshape(-1).astype(np.float32)) for side in (space.low, space.high))
    return torch.maximum(torch.minimum(chosen, high), low).reshape(space.shape)


NUMBER = gym.spaces.Box(-np.inf, np.inf, (), np.float32)


def leaves(space: gym.Space, name: str) -> Iterator[tuple[str, gym.Space]]:
    """The arrays that an observation or action consists of, in the order of its flat form, with their names."""
    if isinstance(space, gym.spaces.Dict):
        for key in sorted(space):
            yield from leaves(space[key], f"{name}.{key}")
    elif isinstance(space, gym.spaces.Tuple):
        for number, member in enumerate(space):
            yield from leaves(member, f"{name}.{number}")
    else:
        yield name, space


def _shape(space: gym.Space) -> tuple[int, ...]:
    return space.seen if isinstance(space, Prepared) else shape_of(space)


def _type(space: gym.Space) -> torch.dtype:
    if isinstance(space, Exact):
        return torch.float64
    if not isinstance(space, Words) and np.issubdtype(space.dtype, np.floating):
        return torch.float32
    return torch.uint8 if space.dtype == np.uint8 else torch.int64


def export_notes(policy: ActingPolicy) -> dict[str, str]:
    """What the caller has to know.

    That is the inputs' names in order, the window's size, the steps that are kept when it is full, the return to ask
    for, and the spaces.
    """
    config, statistics = policy.model.config, policy.statistics
    typical = None if statistics is None else policy.typical_return
    return {
        "inputs": " ".join(Window(policy).names),
        "task": policy.task,
        "context": str(config.context),
        "keep": str(config.context // 2),
        "return_to_go": "" if typical is None else repr(typical),
        "spaces": policy.interface.spaces,
        "eva_rl": eva_rl.__version__,
    }


def export_policy(policy: ActingPolicy, format: str, output: Path) -> None:
    """Write the policy as ONNX (`onnx`) or as a program of torch.export (`torch`), atomically.

    Raises:
        UserError: if there is no such format, or the packages of the extra `onnx` are missing.
    """
    if format not in SUFFIXES:
        raise UserError(f"format must be {' or '.join(SUFFIXES)}, got {format}.")
    window, notes = Window(policy).eval(), export_notes(policy)
    with torch.no_grad():
        program = torch.export.export(window, window.examples())
    if format == "torch":
        with replacing(output) as temporary:
            torch.export.save(program, temporary, extra_files={NOTES: json.dumps(notes)})
        return
    model = _as_onnx(program, window)
    model.metadata_props.extend(_entries(notes))
    with replacing(output) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _as_onnx(program: torch.export.ExportedProgram, window: Window) -> Any:
    try:
        import onnxscript  # noqa: F401  torch asks for it deep inside, and once

        names = {"input_names": list(window.names), "output_names": list(window.outputs)}
        found = torch.onnx.export(program, **names, dynamo=True, verbose=False, optimize=True)
        assert found is not None  # dynamo=False alone gives nothing
        return found.model_proto
    except ImportError as error:
        raise UserError(
            f"format=onnx needs the package '{error.name}', which is not installed: run `pip install 'eva_rl[onnx]'`."
        ) from error


def _entries(notes: dict[str, str]) -> Iterator[Any]:
    import onnx

    for key, value in notes.items():
        yield onnx.StringStringEntryProto(key=key, value=value)
