"""The one loop, for pretraining and fine-tuning alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eva_rl.batch import Batch, Mixture
from eva_rl.errors import UserError
from eva_rl.settings import TrainingConfig
from eva_rl.training.checkpoint import Companion, TrainingState, check_run, load_newest, save
from eva_rl.training.optimizers import ADAMW, Recipe, make_optimizer
from eva_rl.training.precision import autocast
from eva_rl.training.processes import Processes

INSPECT = 5
"""Logs of the loss for one closer look at a batch, which costs a step."""


@dataclass(frozen=True)
class TrainingResult:
    losses: list[float]
    """The training loss of every step."""
    seconds: float
    """Wall time of all steps, those before an interruption included, without the evaluations."""

    def tenths(self) -> list[float]:
        """The mean loss of each tenth of the steps, or none where there are fewer than ten steps."""
        n = len(self.losses)
        parts = [self.losses[n * i // 10 : n * (i + 1) // 10] for i in range(10)] if n >= 10 else []
        return [sum(part) / len(part) for part in parts]


def learning_rate_at(step: int, steps: int, config: TrainingConfig, constant: bool = False) -> float:
    """Linear warm-up from 0, then half a cosine down to the final learning rate at step `steps`.

    If `constant`, the rate does not fall.
    """
    highest = _highest_rate(config)
    if step < config.warmup:
        return highest * (step + 1) / config.warmup
    if constant:
        return highest
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    span = highest - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _highest_rate(config: TrainingConfig) -> float:
    """The learning rate after the warm-up."""
    assert config.learning_rate is not None  # `check_shares` has looked
    return config.learning_rate


def with_rate(config: TrainingConfig, rate: float) -> TrainingConfig:
    """The schedule at another learning rate, of which the final one is the same share."""
    share = config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0
    return replace(config, learning_rate=rate, final_learning_rate=share * rate)


@runtime_checkable
class _WithModes(Protocol):
    """A schedule-free optimiser, which takes its gradients elsewhere than where it has got to."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def _set_mode(model: nn.Module, optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Ready for steps or for use."""
    model.train(training)
    if isinstance(optimizer, _WithModes):
        optimizer.train() if training else optimizer.eval()


def check_shares(config: TrainingConfig, processes: Processes) -> int:
    """How many parts a batch is computed in.

    Raises:
        UserError: if there are more of them than windows, or the learning rate is left open.
    """
    if config.learning_rate is None:
        raise UserError("training.learning_rate must be at least 0, got None.")
    shares = config.accumulate * processes.count
    if config.batch_size < shares:
        raise UserError(
            f"training.batch_size must be at least {shares}, got {config.batch_size}: one window for each "
            f"of {config.accumulate} parts in {processes.count} processes."
        )
    return shares


@dataclass(frozen=True)
class Saves:
    """Where the states of a training run are kept, and whether it goes on from there."""

    folder: Path
    resume: bool = False
    """Continue from the newest state there. With the same machine and thread count, the losses are those of an
    uninterrupted run, bit for bit. This holds for one process on a CPU, as some CUDA kernels are not deterministic.
    Dropout draws from torch's global generators, whose states are saved. Several processes draw anew."""
    identity: Mapping[str, Any] | None = None
    """What must be the same for a resumed run to continue this one, such as its task and seed. If None, the settings of
    training."""


@dataclass(frozen=True)
class Rules:
    """What the method that is trained asks for, besides the schedule."""

    recipe: Recipe = ADAMW
    """How the optimiser is made."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Parameters whose names contain this word learn at this multiple of the learning rate."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Modules, by name, whose parameters learn at a rate of their own in its place."""
    companion: Companion | None = None
    """What else takes part. Its penalty is not part of the losses returned and logged."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that training does not change and that a resumed run might not make again bit for bit."""


@dataclass(frozen=True)
class Hooks:
    """Who is told how training goes."""

    log: Callable[[int, Mapping[str, float]], None] = lambda step, scalars: None
    """Receives scalars by step."""
    evaluate: Callable[[int], Mapping[str, float]] | None = None
    """Called every `evaluate_every` steps, in evaluation mode. The scalars it returns are logged."""
    inspect: Callable[[Batch | Mixture], Mapping[str, float]] | None = None
    """What else is worth logging of a batch, every `INSPECT` logs."""


def train(
    model: nn.Module,
    batches: Callable[[int], Batch | Mixture],
    loss: Callable[[Batch | Mixture], Tensor],
    steps: int,
    config: TrainingConfig,
    saves: Saves,
    rules: Rules = Rules(),
    hooks: Hooks = Hooks(),
    processes: Processes = Processes(),  # noqa: B008
) -> TrainingResult:
    """Make `steps` optimiser steps on the parameters of `model` that require gradients.

    Args:
        batches: returns batch number n, as a pure function of n, so that a resumed run sees what an uninterrupted one
            sees. Called in a thread, one step ahead.
        loss: the scalar to minimise, a mean over the batch's real steps.
        processes: those that share the work. `batches` gives each the whole batch, of which it takes its part. The
            losses are those of one process with the same batches, up to rounding and dropout.

    Raises:
        UserError: if the loss stops being finite, or the checkpoint to resume from belongs to other settings.
    """
    shares = check_shares(config, processes)
    identity = saves.identity or _of_training(config)
    check_run(steps, saves.folder, saves.resume, identity)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable or steps == 0:
        model.eval()
        return TrainingResult([], 0.0)
    rate = _highest_rate(config)
    optimizer = make_optimizer(rules.recipe, model, rate, config.weight_decay, rules.ratios, rules.rates)
    if rules.companion is not None:
        rules.companion.watch(optimizer)
    state = TrainingState(trainable, optimizer, rules.companion, rules.frozen, {"steps": steps, **identity})
    loop = _Loop(model, loss, steps, config, rules, hooks, processes, shares, saves.folder, state)
    if saves.resume:
        loop.go_on()
    return loop.run(batches)


def _of_training(config: TrainingConfig) -> dict[str, Any]:
    """The settings of training that decide the weights, as JSON states them."""
    settings = {name: "inf" if value == math.inf else value for name, value in asdict(config).items()}
    return {name: value for name, value in settings.items() if not name.endswith("_every")}


@dataclass
class _Loop:
    """A training run under way."""

    model: nn.Module
    loss: Callable[[Batch | Mixture], Tensor]
    steps: int
    config: TrainingConfig
    rules: Rules
    hooks: Hooks
    processes: Processes
    shares: int
    folder: Path
    state: TrainingState
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    """When training would have begun, had it gone on without a break."""
    waited: float = 0.0
    """Seconds that the steps since the last log waited for batches."""
    since: float = 0.0
    """When the last log was."""

    def __post_init__(self) -> None:
        self.parameters = list(self.state.parameters.values())
        self.device = self.parameters[0].device

    def go_on(self) -> None:
        """Continue from the newest state."""
        saved, seconds = load_newest(self.folder, self.state)
        self.losses, self.started = saved.tolist(), self.started - seconds
        if self.processes.count > 1:  # the saved generator is the first process's
            torch.manual_seed(len(self.losses) * self.processes.count + self.processes.index)

    def run(self, batches: Callable[[int], Batch | Mixture]) -> TrainingResult:
        """All steps that are left."""
        _set_mode(self.model, self.state.optimizer, training=True)
        first, self.since = len(self.losses), time.perf_counter()
        hidden = not self.processes.first
        with (
            ThreadPoolExecutor(1, "batches") as pool,
            tqdm(total=self.steps, initial=first, desc="train", unit="step", disable=hidden) as bar,
        ):
            following = pool.submit(batches, first) if first < self.steps else None
            for step in range(first, self.steps):
                asked = time.perf_counter()
                assert following is not None  # there is a batch for every step
                batch = following.result()
                self.waited += time.perf_counter() - asked
                following = pool.submit(batches, step + 1) if step + 1 < self.steps else None
                self.step(step, batch.to(self.device), bar)
        _set_mode(self.model, self.state.optimizer, training=False)
        return TrainingResult(self.losses, self.seconds)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def step(self, step: int, batch: Batch | Mixture, bar: tqdm) -> None:
        """One optimiser step, and what is due after it."""
        rate, gradient_norm = self.set_rates(step), self.backward(step, batch)
        self.state.optimizer.step()
        if self.rules.companion is not None:
            self.rules.companion.after_step(step + 1)
        self.state.optimizer.zero_grad()
        done, config = step + 1, self.config
        bar.update()
        if done % config.log_every == 0 or done == self.steps:
            self.log(done, {"gradient_norm": gradient_norm.item(), "learning_rate": rate}, bar)
            if self.hooks.inspect and done % (INSPECT * config.log_every) == 0:
                with autocast(config.precision, self.device):
                    self.hooks.log(done, self.hooks.inspect(batch.share(0, config.accumulate)))
        if self.hooks.evaluate and config.evaluate_every and done % config.evaluate_every == 0 and done < self.steps:
            self.evaluate(done)
        if self.processes.first and (done % config.checkpoint_every == 0 or done == self.steps):
            save(self.folder, self.state, torch.tensor(self.losses, dtype=torch.float64), self.seconds)

    def set_rates(self, step: int) -> float:
        """Give each group of parameters its learning rate at this step, and return the schedule's own."""
        constant = self.rules.recipe.constant
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.steps, with_rate(self.config, group["rate"]), constant)
        return learning_rate_at(step, self.steps, self.config, constant)

    def backward(self, step: int, batch: Batch | Mixture) -> Tensor:
        """Compute the clipped gradients of the whole batch's mean loss, and return their norm before clipping.

        Raises:
            UserError: if the loss or the norm is not finite.
        """
        total = torch.zeros((), device=self.device)
        for number in range(self.config.accumulate):
            own = self.processes.index * self.config.accumulate + number
            part = batch.share(own, self.shares) if self.shares > 1 else batch
            with autocast(self.config.precision, self.device):
                value = self.loss(part)
            if self.shares > 1:
                value = value * (part.steps / batch.steps)  # a mean over the whole batch's real steps
            penalty = 0.0 if self.rules.companion is None else self.rules.companion.penalty() / self.shares
            (value + penalty).backward()
            total += value.detach()
        self.losses.append(self.processes.sum_gradients(self.parameters, total).item())
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        if not (math.isfinite(self.losses[-1]) and norm.isfinite()):
            raise UserError(
                f"At step {step} the loss became {self.losses[-1]} and the norm of its gradient {norm.item()}: "
                f"lower training.learning_rate (it is {self.config.learning_rate:g}) or look for extreme values in the dataset."
            )
        return norm

    def log(self, done: int, scalars: Mapping[str, float], bar: tqdm) -> None:
        """Tell the mean loss of the last steps, and these scalars."""
        recent, now = self.losses[-self.config.log_every :], time.perf_counter()
        loss = sum(recent) / len(recent)
        bar.set_postfix(loss=f"{loss:.4f}")
        waiting = {"share_of_time_waiting_for_batches": self.waited / (now - self.since)}
        self.hooks.log(done, {f"train/{k}": v for k, v in ({"loss": loss} | dict(scalars) | waiting).items()})
        self.waited, self.since = 0.0, now

    def evaluate(self, done: int) -> None:
        """Log what the evaluation says of the model as it is.

        The seconds it takes do not count as training.
        """
        assert self.hooks.evaluate is not None
        _set_mode(self.model, self.state.optimizer, training=False)
        paused = time.perf_counter()
        self.hooks.log(done, self.hooks.evaluate(done))
        self.started += time.perf_counter() - paused
        _set_mode(self.model, self.state.optimizer, training=True)
