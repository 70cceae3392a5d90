"""Datasets of many tasks -> a pretrained Decision Transformer, in steps.

- `asked_for`: what the settings mean. Mistakes show here, before anything is written.
- `gather`: trajectories of all tasks, collected where they are missing.
- `mixed`: an interface for each family of tasks, and windows of all of them.
- `begun`: the untrained model, and what is said of it.
- `trained`: the model, trained.
- `finish`: the model, saved, and the run's result.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eva_rl.config import Plan, PretrainConfig, plan
from eva_rl.data import (
    MixtureSampler,
    TaskSource,
    Trajectories,
    WindowSampler,
    datasets,
    domain_weights,
    find_sources,
    interface_of,
    load_dataset,
)
from eva_rl.errors import UserError, did_you_mean
from eva_rl.files import check_run_folder, make_folder, write_json, write_text
from eva_rl.interface import Interface
from eva_rl.model import DecisionTransformer, ModelConfig, check_output, save_base
from eva_rl.run import check_tracker, open_tracker, versions
from eva_rl.table import counted
from eva_rl.training import (
    Hooks,
    Processes,
    Recipe,
    Rules,
    Saves,
    TrainingConfig,
    TrainingResult,
    by_domain,
    check_run,
    check_shares,
    choose_device,
    processes,
    train,
)


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain as the settings say, in all processes that a launcher started, and return the run's folder.

    Raises:
        UserError: for settings that make no sense, before anything is written, and later on for whatever a user
            can mend.
    """
    with processes(config.device) as group:
        asked = asked_for(config, group)
        trajectories = gather(asked, group)
        mixture = mixed(asked, trajectories)
        model = begun(asked, mixture, group)
        result = trained(asked, mixture, model, group)
        if group.first:
            finish(asked, trajectories, mixture, model, result)
    return asked.run.folder


@dataclass(frozen=True)
class Asked:
    """What the settings of a run mean."""

    config: PretrainConfig
    run: Plan
    sources: Sequence[TaskSource]
    """Each task once."""
    model: ModelConfig
    training: TrainingConfig
    recipe: Recipe
    device: torch.device
    output: Path
    """Where the model is written."""


def asked_for(config: PretrainConfig, group: Processes) -> Asked:
    """What the settings mean.

    Raises:
        UserError: if they make no sense, alone or together with what is in the run's folder.
    """
    sources = list({source.task: source for task in config.task for source in find_sources(task)}.values())
    if not sources:
        raise UserError("task must be at least one task or split, got [].")
    domain_weights(dict.fromkeys(map(domain_of, sources), 1), config.weights, config.temperature)
    model, training = ModelConfig(**asdict(config.model)), TrainingConfig(**asdict(config.training))
    recipe = Recipe(**config.optimizer.recipe())
    check_shares(training, group)
    check_tracker(config.tracker)
    if config.labels not in ("actions", "expert"):
        raise UserError(f"labels must be actions or expert, got {config.labels}.")
    for name in config.tokens or ():
        if name not in (known := {source.interface for source in sources}):
            raise UserError(f"tokens names the interface '{name}', which these tasks lack. {did_you_mean(name, known)}")
    shared = None if group.state is None else group.state.device
    device = choose_device(config.device) if shared is None else shared
    run = plan(config, "pretrain")
    check_run(config.steps, run.checkpoints, config.resume, run.identity)
    output = Path(config.output) if config.output else run.folder / "model"
    if training.evaluate_every:
        raise UserError(
            "training.evaluate_every is for fine-tuning: `python -m eva_rl.evaluate` scores a pretrained model."
        )
    if group.first:
        check_run_folder(run.folder, config.resume)
        _check_place(config, run, output)
    return Asked(config, run, sources, model, training, recipe, device, output)


def _check_place(config: PretrainConfig, run: Plan, output: Path) -> None:
    """Raise a `UserError` if the model can't be written as `output`."""
    checkpoints = run.checkpoints.resolve()
    if checkpoints.is_relative_to(output.resolve()) or output.resolve().is_relative_to(checkpoints):
        raise UserError(f"output={output} would replace files of the run in '{run.folder}': name another folder.")
    check_output(output)


def gather(asked: Asked, group: Processes) -> Sequence[Trajectories]:
    """Each task's trajectories, collected where they are missing."""
    config, expert = asked.config, asked.config.labels == "expert"
    with group.first_alone():
        ids = datasets(asked.sources, config.demonstrations, config.seed, config.noise)
        found = [
            load_dataset(id, source.task, expert_labels=expert) for id, source in zip(ids, asked.sources, strict=True)
        ]
    if expert:
        warn_of_missing_labels(found)
    return found


def warn_of_missing_labels(trajectories: Sequence[Trajectories]) -> None:
    """Name the tasks whose datasets do not say what the expert meant: what it did is learned there.

    Raises:
        UserError: if none of them says it.
    """
    silent = [own.task for own in trajectories if own.labels is None]
    if len(silent) == len(trajectories):
        raise UserError(
            "labels=expert needs datasets that keep the expert's own actions, and none of these does: collect them again, or set "
            "labels=actions."
        )
    if silent:
        warnings.warn(
            f"labels=expert: the datasets of {', '.join(silent)} do not keep the expert's own actions, so that the actions taken "
            "are learned there.",
            stacklevel=2,
        )


def domain_of(source: TaskSource) -> str:
    return source.task.partition("/")[0]


@dataclass(frozen=True)
class Mixed:
    """Windows of all tasks."""

    interfaces: Sequence[Interface]
    sampler: MixtureSampler | WindowSampler
    domains: Mapping[str, str]
    """By interface."""
    tasks: Mapping[str, int]
    """How many, by domain."""
    transitions: Mapping[str, int]
    """How many, by domain."""
    shares: Mapping[str, float]
    """Of the windows, by domain."""


def mixed(asked: Asked, trajectories: Sequence[Trajectories]) -> Mixed:
    """An interface for each family of tasks that share one, and windows of all of them in the domains' shares."""
    config, sources = asked.config, asked.sources
    families: dict[str, list[Trajectories]] = {}
    transitions: dict[str, int] = {}
    for source, own in zip(sources, trajectories, strict=True):
        families.setdefault(source.interface, []).append(own)
        transitions[domain_of(source)] = transitions.get(domain_of(source), 0) + len(own.rewards)
    domains, tasks = {s.interface: domain_of(s) for s in sources}, Counter(map(domain_of, sources))
    shares = domain_weights(transitions, config.weights, config.temperature)
    windows = {
        name: WindowSampler(
            own, name, asked.model.context, asked.training.batch_size, config.seed, named=config.task_vectors
        )
        for name, own in families.items()
    }
    weights = [shares[domains[name]] * len(own) / tasks[domains[name]] for name, own in families.items()]
    sampler = MixtureSampler(list(windows.values()), weights, asked.training.batch_size, config.seed)
    if len(windows) == 1:
        [sampler] = windows.values()
    interfaces = [_interface(config, name, own) for name, own in families.items()]
    return Mixed(interfaces, sampler, domains, tasks, transitions, shares)


def _interface(config: PretrainConfig, name: str, family: Sequence[Trajectories]) -> Interface:
    """The interface that the tasks of a family share, with the tokens that the settings say it reads."""
    floor = [config.std_floor] if len(family) > 1 else []
    return replace(
        interface_of(name, family, *floor),
        tokens=tuple((config.tokens or {}).get(name, ())),
        tasks=tuple(own.task for own in family) if config.task_vectors else (),
    )


def begun(asked: Asked, mixture: Mixed, group: Processes) -> DecisionTransformer:
    """The model with fresh weights, alike in all processes.

    The first process says what will be trained on what.
    """
    config, run = asked.config, asked.run
    torch.manual_seed(config.seed)
    model = DecisionTransformer(asked.model, mixture.interfaces).to(asked.device)
    if group.first:
        parameters, transitions = _count(model), sum(mixture.transitions.values())
        print(
            f"{run.folder}: {counted(len(asked.sources), 'task')}, {transitions:,} transitions, {parameters:,} parameters"
        )
        for domain, share in mixture.shares.items() if len(mixture.shares) > 1 else ():
            tasks, own = mixture.tasks[domain], mixture.transitions[domain]
            print(f"  {domain}: {counted(tasks, 'task')}, {own:,} transitions, {share:.0%} of the windows")
        write_text(make_folder(run.folder) / "config.yaml", run.yaml)
    return model


def _count(model: DecisionTransformer) -> int:
    return sum(p.numel() for p in model.parameters())


def trained(asked: Asked, mixture: Mixed, model: DecisionTransformer, group: Processes) -> TrainingResult:
    """Train the model, and log in the first process."""
    config, run = asked.config, asked.run
    torch.manual_seed(config.seed + group.index)  # each process its own dropout
    saves, rules = Saves(run.checkpoints, config.resume, run.identity), Rules(asked.recipe)
    with open_tracker(config.tracker, run.folder, run.identity) if group.first else nullcontext() as tensorboard:
        hooks = Hooks()
        if tensorboard:
            several = len(mixture.shares) > 1
            look = by_domain(mixture.domains, model.loss, list(model.trunk.parameters())) if several else None
            hooks = Hooks(tensorboard.log, inspect=look)
        sampler = mixture.sampler
        return train(model, sampler.batch, model.loss, config.steps, asked.training, saves, rules, hooks, group)


def finish(
    asked: Asked,
    trajectories: Sequence[Trajectories],
    mixture: Mixed,
    model: DecisionTransformer,
    result: TrainingResult,
) -> None:
    """Save the model, write the result, and say it."""
    config = asked.config
    save_base(asked.output, model, {t.task: t.statistics() for t in trajectories})
    facts: dict[str, Any] = {"task": list(config.task), "steps": config.steps, "seed": config.seed}
    facts |= {"parameters": _count(model), "transitions": sum(mixture.transitions.values())}
    facts |= {"loss": result.losses[-1] if result.losses else None, "seconds": round(result.seconds, 1)}
    facts |= {"status": "complete", "versions": versions()}
    write_json(asked.run.folder / "result.json", facts)
    print(f"{asked.output}: trained for {config.steps} steps in {result.seconds:.0f} s")
    print(f"tensorboard --logdir {asked.run.folder}")
