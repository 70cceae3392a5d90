"""How a sequence's tasks are learned: one model for all, or an adapter for each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_rl.adapter import Adapter, save_adapter
from eva_rl.batch import Batch
from eva_rl.continual.elastic import Elastic
from eva_rl.continual.play import Stage
from eva_rl.data import WindowSampler
from eva_rl.files import replacing
from eva_rl.library import Library
from eva_rl.model import NOTES, AdapterNotes, Base, DecisionTransformer, base_name
from eva_rl.model.action_model import ActionModel
from eva_rl.model.nearest import begin_with_nearest, task_vector
from eva_rl.training import Hooks, Rules, Saves, TrainingConfig, train

METHODS = {
    "sequential": "all weights, one task after the other",
    "replay": "the same, with part of each batch from the tasks before",
    "ewc": "the same, with a penalty on weights that mattered to the tasks before",
    "lora": "one adapter, one task after the other",
    "told": "an adapter for each task, which is told at test time",
    "found": "an adapter for each task, found by the episode's first observation",
    "alone": "all weights, each task from the base by itself: what forward transfer is measured against",
}
SHARED = ("sequential", "replay", "ewc", "lora")
"""Methods with one model for all tasks."""

Attach = Callable[[DecisionTransformer, WindowSampler], Adapter]
"""Puts an initialised adapter on a model, in place."""


@dataclass(frozen=True)
class Lessons:
    """What the learners of all methods have in common."""

    method: str
    base: Base
    stage: Stage
    attach: Attach
    training: TrainingConfig
    steps: int
    ratios: Mapping[str, float]
    replay_share: float
    ewc: float
    seed: int
    folder: Path
    """The run's folder, below which a learner writes what it knows after each task."""

    def beginner(self, number: int) -> DecisionTransformer:
        """A copy of the base, with the vector of its task that is nearest to this one, where it has such vectors."""
        model = copy.deepcopy(self.base.transformer)
        if task_vector(model, self.stage.interface):
            begin_with_nearest(model, self.sampler(number).spread(0).to(self.stage.device))
        return model

    def sampler(self, *numbers: int, batch_size: int | None = None) -> WindowSampler:
        """Windows of these tasks."""
        context, size = self.base.model.config.context, self.training.batch_size if batch_size is None else batch_size
        own = [self.stage.trajectories[number] for number in numbers]
        return WindowSampler(own, self.stage.interface, context, size, self.seed)

    def train(
        self,
        model: ActionModel,
        batches: Callable[[int], Batch],
        number: int,
        score: Callable[[], float],
        companion: Any = None,
    ) -> list[tuple[int, float]]:
        """Train for one task and return its scores on the way, by steps done."""
        curve: list[tuple[int, float]] = []

        def evaluate(step: int) -> dict[str, float]:
            curve.append((step, score()))
            return {}

        torch.manual_seed(self.seed + number)
        folder = self.folder / "training"
        shutil.rmtree(folder, ignore_errors=True)  # a task that was interrupted begins anew
        loss = model.loss
        rules, hooks = Rules(ratios=self.ratios, companion=companion), Hooks(evaluate=evaluate)
        train(model, batches, loss, self.steps, self.training, Saves(folder), rules, hooks)
        shutil.rmtree(folder, ignore_errors=True)
        return curve


class Learner(Protocol):
    """What learns the tasks of a sequence in their order."""

    def learn(self, number: int) -> list[tuple[int, float]]:
        """Train on task `number` and return its scores on the way."""
        ...

    def scores(self, number: int, before: list[float]) -> list[float]:
        """The scores of all tasks now that task `number` is learned.

        before: those after the task before. What can't have changed since is taken from there.
        """
        ...

    def save(self, number: int) -> None:
        """Write what it knows after task `number`."""

    def load(self, number: int) -> None:
        """Go on from what was written after task `number`."""


def learner_of(lessons: Lessons) -> Learner:
    """The learner of a method of `METHODS`."""
    return (
        Shared(lessons) if lessons.method in SHARED else Alone(lessons) if lessons.method == "alone" else Apart(lessons)
    )


class Shared:
    """One model that all tasks are learned by, all of it or one adapter."""

    def __init__(self, lessons: Lessons):
        self.lessons, self.model = lessons, lessons.beginner(0)
        self.adapter = lessons.attach(self.model, lessons.sampler(0)) if lessons.method == "lora" else None
        if self.adapter is None:  # else what trains is what `attach` left trainable
            self.model.requires_grad_(True)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.elastic = Elastic(self.trainable, lessons.ewc) if lessons.method == "ewc" else None

    def learn(self, number: int) -> list[tuple[int, float]]:
        lessons = self.lessons
        batches = lessons.sampler(number).batch
        if lessons.method == "replay" and number:
            batches = self._replayed(number)
        curve = lessons.train(
            self.model, batches, number, lambda: lessons.stage.score(number, self._acting()), self.elastic
        )
        if self.elastic is not None:
            self.elastic.consolidate(self._log_likelihoods(number))
        return curve

    def scores(self, number: int, before: list[float]) -> list[float]:
        acting = self._acting()
        return [self.lessons.stage.score(other, acting) for other in range(len(before))]

    def save(self, number: int) -> None:
        tensors = {f"weights.{name}": p.detach() for name, p in self.trainable.items()}
        if self.elastic is not None:
            tensors |= self.elastic.state_dict()
        with replacing(self._file(number)) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        self._file(number - 2).unlink(missing_ok=True)  # the last but one may be where the result stands still

    def load(self, number: int) -> None:
        tensors = load_file(self._file(number))
        for name, parameter in self.trainable.items():
            parameter.data.copy_(tensors[f"weights.{name}"])
        if self.elastic is not None:
            self.elastic.load_state_dict({n: t.to(self.lessons.stage.device) for n, t in tensors.items()})

    def _file(self, number: int) -> Path:
        return self.lessons.folder / f"learned-{number}.safetensors"

    def _acting(self) -> ActionModel:
        return self.model.eval() if self.adapter is None else _merged(self.adapter)

    def _replayed(self, number: int) -> Callable[[int], Batch]:
        lessons = self.lessons
        old = min(max(round(lessons.replay_share * lessons.training.batch_size), 1), lessons.training.batch_size - 1)
        fresh = lessons.sampler(number, batch_size=lessons.training.batch_size - old)
        memory = lessons.sampler(*range(number), batch_size=old)
        return lambda n: joined(fresh.batch(n), memory.batch(n))

    def _log_likelihoods(self, number: int) -> Callable[[int], Tensor]:
        """log p(y | x) of a window, y drawn: Gaussian of unit variance about continuous actions, or choices."""
        sampler, model = self.lessons.sampler(number, batch_size=1), self.model

        def one(n: int) -> Tensor:
            batch = sampler.batch(n).to(self.lessons.stage.device)
            predicted = model(batch)[batch.mask]  # (T, act)
            spec = model.interfaces[batch.interface]
            cut = predicted.split([part.outputs for part in spec.parts_of_actions], -1)
            pairs = zip(spec.parts_of_actions, cut, strict=True)
            return torch.stack([_log_likelihood(own, part.choices) for part, own in pairs]).sum()

        return one


def _log_likelihood(predicted: Tensor, choices: tuple[int, ...]) -> Tensor:
    """log p(y | x) of one part of the actions, y drawn."""
    if not choices:
        drawn = predicted.detach() + torch.randn_like(predicted)
        return -(predicted - drawn).square().sum() / 2
    likely = [torch.distributions.Categorical(logits=own) for own in predicted.split(choices, -1)]
    return torch.stack([own.log_prob(own.sample()).sum() for own in likely]).sum()


def _merged(adapter: Adapter) -> ActionModel:
    """The model with the adapter in its weights, ready to act."""
    return cast("ActionModel", adapter.merged().eval())


class Alone:
    """Each task from the base by itself, all weights: no sequence, but what one is measured against."""

    def __init__(self, lessons: Lessons):
        self.lessons = lessons

    def learn(self, number: int) -> list[tuple[int, float]]:
        lessons = self.lessons
        self.model = lessons.beginner(number).requires_grad_(True)

        def score() -> float:
            return lessons.stage.score(number, self.model.eval())

        return lessons.train(self.model, lessons.sampler(number).batch, number, score)

    def scores(self, number: int, before: list[float]) -> list[float]:
        return [*before[:number], self.lessons.stage.score(number, self.model.eval()), *before[number + 1 :]]

    def save(self, number: int) -> None:
        """Nothing is needed of it."""

    def load(self, number: int) -> None:
        """Nothing is needed of it."""


class Apart:
    """An adapter for each task, in a library.

    The base stays as it is, and so does every adapter.
    """

    def __init__(self, lessons: Lessons):
        self.lessons, self.library = lessons, Library(lessons.folder / "library", str(lessons.base.path))

    def learn(self, number: int) -> list[tuple[int, float]]:
        lessons, stage = self.lessons, self.lessons.stage
        model = lessons.beginner(number)
        adapter = lessons.attach(model, lessons.sampler(number))
        curve = lessons.train(
            model, lessons.sampler(number).batch, number, lambda: stage.score(number, _merged(adapter))
        )
        task, own = stage.sources[number].task, stage.trajectories[number]
        notes = AdapterNotes(
            base_name(str(lessons.base.path)),
            lessons.base.sha256,
            task,
            model.interfaces[stage.interface],
            own.statistics(),
        )
        save_adapter(adapter, lessons.folder / "trained", notes.base, {NOTES: asdict(notes)})
        name = self.name(number)
        if name in {entry.name for entry in self.library.entries}:  # the run was interrupted right here
            self.library.remove(name)
        self.library.add(lessons.folder / "trained", name, own)
        shutil.rmtree(lessons.folder / "trained")
        return curve

    def name(self, number: int) -> str:
        """What the adapter of a task is called."""
        return f"{number}-{self.lessons.stage.sources[number].task.rpartition('/')[2]}"

    def scores(self, number: int, before: list[float]) -> list[float]:
        from eva_rl.library.serve import Adapters

        stage = self.lessons.stage
        if self.lessons.method == "found":
            return [stage.score_found(other, self.library) for other in range(len(before))]
        adapters = Adapters.load(self.library, [self.name(number)], stage.device)
        task = stage.sources[number].task
        own = stage.score(number, adapters.model, lambda episodes: adapters.alone(task, episodes))
        return [*before[:number], own, *before[number + 1 :]]  # no other adapter was touched

    def save(self, number: int) -> None:
        """The library is on disk already."""

    def load(self, number: int) -> None:
        """The library is on disk already."""


def joined(one: Batch, other: Batch) -> Batch:
    """The windows of two batches of one interface."""
    tensors = {
        field.name: torch.cat([getattr(one, field.name), getattr(other, field.name)])
        for field in fields(Batch)
        if isinstance(getattr(one, field.name), Tensor)
    }
    return replace(one, **tensors)
