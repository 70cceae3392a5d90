"""The one loop, for pretraining and fine-tuning alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eva_rl.errors import UserError
from eva_rl.interface import Batch, Mixture
from eva_rl.training.checkpoint import Companion, TrainingState, check_run, load_newest, save
from eva_rl.training.optimizers import ADAMW, Recipe, make_optimizer
from eva_rl.training.precision import autocast, check_precision
from eva_rl.training.processes import Processes

INSPECT = 5
"""Logs of the loss for one closer look at a batch, which costs a step."""


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of training: linear warm-up, cosine decay, clipping by the global norm."""

    batch_size: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    warmup: int = 50
    """Optimiser steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Applied to matrices; biases and norms are left alone."""
    gradient_clip: float = 0.25
    precision: str = "auto"
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints; one more is written at the end."""
    evaluate_every: int = 0
    """Optimiser steps between evaluations while training; 0: none."""
    log_every: int = 10
    accumulate: int = 1
    """Parts that a batch goes through the model in, one after the other, where it does not fit into memory whole."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for name, least in (
            ("batch_size", 1),
            ("warmup", 0),
            ("checkpoint_every", 1),
            ("evaluate_every", 0),
            ("log_every", 1),
            ("accumulate", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"training.{name}={getattr(self, name)} was given where at least {least} was expected.")
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            if getattr(self, name) is None or not getattr(self, name) >= 0:
                raise UserError(f"training.{name}={getattr(self, name)} was given where at least 0 was expected.")
        if not self.gradient_clip > 0:
            raise UserError(
                f"training.gradient_clip={self.gradient_clip} was given where more than 0 was expected; inf clips nothing."
            )


@dataclass(frozen=True)
class TrainingResult:
    losses: list[float]
    """The training loss of every step."""
    seconds: float
    """Wall time of all steps, those before an interruption included, without the evaluations."""

    def tenths(self) -> list[float]:
        """The mean loss of each tenth of the steps; none where there are fewer than ten."""
        n = len(self.losses)
        parts = [self.losses[n * i // 10 : n * (i + 1) // 10] for i in range(10)] if n >= 10 else []
        return [sum(part) / len(part) for part in parts]


def learning_rate_at(step: int, steps: int, config: TrainingConfig, constant: bool = False) -> float:
    """Linear warm-up from 0, then half a cosine down to the final learning rate at step `steps`; or no fall, if `constant`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if constant:
        return config.learning_rate
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def with_rate(config: TrainingConfig, rate: float) -> TrainingConfig:
    """The schedule at another learning rate, of which the final one is the same share."""
    share = config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0
    return replace(config, learning_rate=rate, final_learning_rate=share * rate)


def _set_mode(model: nn.Module, optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Ready for steps or for use: a schedule-free optimiser takes its gradients elsewhere than where it has got to."""
    model.train(training)
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        optimizer.train() if training else optimizer.eval()


def check_shares(config: TrainingConfig, processes: Processes) -> int:
    """How many parts a batch is computed in.

    Raises:
        UserError: if there are more of them than windows.
    """
    shares = config.accumulate * processes.count
    if config.batch_size < shares:
        raise UserError(
            f"training.batch_size={config.batch_size} was given where at least {shares} were expected: one window for each "
            f"of {config.accumulate} parts in {processes.count} processes."
        )
    return shares


def train(
    model: nn.Module,
    batches: Callable[[int], Batch | Mixture],
    loss: Callable[[Batch | Mixture], Tensor],
    steps: int,
    config: TrainingConfig,
    checkpoints: Path,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, scalars: None,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    ratios: Mapping[str, float] | None = None,
    rates: Mapping[str, float] | None = None,
    companion: Companion | None = None,
    frozen: Mapping[str, Tensor] | None = None,
    inspect: Callable[[Batch | Mixture], Mapping[str, float]] | None = None,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    recipe: Recipe = ADAMW,
) -> TrainingResult:
    """Make `steps` optimiser steps on the parameters of `model` that require gradients.

    Args:
        batches: batch number n, a pure function of n, so that a resumed run sees what an uninterrupted one sees; called
            in a thread, one step ahead.
        loss: the scalar to minimise, a mean over the batch's real steps.
        checkpoints: folder for the training state (trainable weights, optimiser, random state).
        resume: continue from the newest checkpoint there; with the same machine and thread count the losses are those of
            an uninterrupted run, bit for bit (one process, on a CPU; some CUDA kernels are not deterministic). Dropout
            draws from torch's global generators, whose states are saved; several processes draw anew.
        identity: what must be the same for a resumed run to continue this one, such as its task and seed; None: `config`.
        log: receives scalars by step.
        evaluate: called every `config.evaluate_every` steps, in evaluation mode; its scalars are logged.
        ratios: parameters whose names contain this word learn at this multiple of the learning rate.
        rates: modules, by name, whose parameters learn at a rate of their own in its place.
        companion: what else takes part; its penalty is not part of the losses returned and logged.
        frozen: tensors that training does not change and that a resumed run might not make again bit for bit.
        inspect: what else is worth logging of a batch, every `INSPECT` logs.
        processes: those that share the work; `batches` gives each the whole batch, of which it takes its part. The losses
            are those of one process with the same batches, up to rounding and dropout.
        recipe: how the optimiser is made.

    Raises:
        UserError: if the loss stops being finite, or the checkpoint to resume from belongs to other settings.
    """
    shares = check_shares(config, processes)
    settings = {name: "inf" if value == math.inf else value for name, value in asdict(config).items()}  # JSON has none
    identity = identity or {name: value for name, value in settings.items() if not name.endswith("_every")}
    check_run(steps, checkpoints, resume, identity)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable or steps == 0:
        model.eval()
        return TrainingResult([], 0.0)
    device = next(iter(trainable.values())).device
    optimizer = make_optimizer(recipe, model, config.learning_rate, config.weight_decay, ratios or {}, rates or {})
    state = TrainingState(trainable, optimizer, companion, frozen or {}, {"steps": steps, **identity})
    losses: list[float] = []
    started = time.perf_counter()
    if resume:
        saved, seconds = load_newest(checkpoints, state)
        losses, started = saved.tolist(), started - seconds
        if processes.count > 1:  # the saved generator is the first process's
            torch.manual_seed(len(losses) * processes.count + processes.index)
    _set_mode(model, optimizer, training=True)
    first, parameters, waited, since = len(losses), list(trainable.values()), 0.0, time.perf_counter()
    with (
        ThreadPoolExecutor(1, "batches") as pool,
        tqdm(total=steps, initial=first, desc="train", unit="step", disable=not processes.first) as bar,
    ):
        following = pool.submit(batches, first) if first < steps else None
        for step in range(first, steps):
            rate = learning_rate_at(step, steps, config, recipe.constant)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, steps, with_rate(config, group["rate"]), recipe.constant)
            asked = time.perf_counter()
            batch = following.result()
            waited += time.perf_counter() - asked
            following = pool.submit(batches, step + 1) if step + 1 < steps else None
            batch, total = batch.to(device), torch.zeros((), device=device)
            for number in range(config.accumulate):
                part = batch.share(processes.index * config.accumulate + number, shares) if shares > 1 else batch
                with autocast(config.precision, device):
                    value = loss(part)
                if shares > 1:
                    value = value * (part.steps / batch.steps)  # a mean over the whole batch's real steps
                penalty = 0.0 if companion is None else companion.penalty() / shares
                (value + penalty).backward()
                total += value.detach()
            losses.append(processes.sum_gradients(parameters, total).item())
            gradient_norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
            if not (math.isfinite(losses[-1]) and gradient_norm.isfinite()):
                raise UserError(
                    f"At step {step} the loss became {losses[-1]} and the norm of its gradient {gradient_norm.item()}: "
                    f"lower training.learning_rate (it is {config.learning_rate:g}) or look for extreme values in the dataset."
                )
            optimizer.step()
            if companion is not None:
                companion.after_step(step + 1)
            optimizer.zero_grad()
            done = step + 1
            bar.update()
            if done % config.log_every == 0 or done == steps:
                recent = losses[-config.log_every :]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
                now = time.perf_counter()
                scalars = {"loss": sum(recent) / len(recent), "gradient_norm": gradient_norm.item()}
                scalars |= {"learning_rate": rate, "share_of_time_waiting_for_batches": waited / (now - since)}
                log(done, {f"train/{k}": v for k, v in scalars.items()})
                waited, since = 0.0, now
                if inspect and done % (INSPECT * config.log_every) == 0:
                    with autocast(config.precision, device):
                        log(done, inspect(batch.share(0, config.accumulate)))
            if evaluate and config.evaluate_every and done % config.evaluate_every == 0 and done < steps:
                _set_mode(model, optimizer, training=False)
                paused = time.perf_counter()
                log(done, evaluate(done))
                started += time.perf_counter() - paused  # evaluations are no training
                _set_mode(model, optimizer, training=True)
            if processes.first and (done % config.checkpoint_every == 0 or done == steps):
                save(checkpoints, state, torch.tensor(losses, dtype=torch.float64), time.perf_counter() - started)
    _set_mode(model, optimizer, training=False)
    return TrainingResult(losses, time.perf_counter() - started)
