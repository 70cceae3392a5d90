"""Continual World's sequence with one base: `python -m eva_rl.continual tasks=metaworld/cw10 method=told`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_rl.config import AdapterSettings, entry_point, run_folder
from eva_rl.config.identity import finite
from eva_rl.errors import UserError, did_you_mean
from eva_rl.settings import TrainingConfig, checked_filter

if TYPE_CHECKING:
    from eva_rl.adapter import Adapter
    from eva_rl.data import TaskSource, Trajectories, WindowSampler
    from eva_rl.model import Base, DecisionTransformer

WHOLE_RATE = 1e-3
"""The learning rate of all weights, as in configs/adapter/full.yaml."""


@dataclass(frozen=True)
class ContinualConfig:
    tasks: tuple[str, ...]
    reverse: bool
    method: str
    base: str
    adapter: AdapterSettings
    demonstrations: int
    steps: int
    evaluations: int
    episodes: int
    replay_share: float
    ewc_strength: float
    reference: str | None
    filter: str
    seed: int
    max_episode_steps: int | None
    workers: int | None
    device: str
    run_dir: str | None
    resume: bool
    training: TrainingConfig

    def __post_init__(self) -> None:
        for name in ("demonstrations", "steps", "evaluations", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.replay_share < 1:
            raise UserError(f"replay_share must be between 0 and 1, got {self.replay_share}.")
        if not 0 <= self.ewc_strength < math.inf:
            raise UserError(f"ewc_strength must be a number of at least 0, got {self.ewc_strength}.")
        object.__setattr__(self, "filter", checked_filter(self.filter))
        if self.method == "replay" and self.training.batch_size < 2:
            raise UserError("training.batch_size must be at least 2 with method=replay, got 1.")
        if self.method in ("told", "found") and (self.adapter.config or {}).get("use_dora"):
            raise UserError(
                f"adapter={self.adapter.name} is DoRA, which can't be served beside others: take lora or eva."
            )
        if not self.adapter.is_lora:
            raise UserError(f"adapter must be LoRA, such as lora or eva, got {self.adapter.name}.")


@entry_point(ContinualConfig, "continual")
def main(config: ContinualConfig) -> None:
    from eva_rl.continual.learners import METHODS
    from eva_rl.continual.sequence import reference_curves, run_sequence, table
    from eva_rl.data import find_sources
    from eva_rl.files import alone_in, check_run_folder
    from eva_rl.rollout import Simulators

    if config.method not in METHODS:
        raise UserError(
            f"method must be one of {', '.join(METHODS)}, got {config.method}. {did_you_mean(config.method, METHODS)}"
        )
    sources = [source for task in config.tasks for source in find_sources(task)]
    sources = sources[::-1] if config.reverse else sources
    tasks = [source.task for source in sources]
    if len(set(tasks)) < max(len(tasks), 2):
        raise UserError(f"tasks must be at least two, each named once, got {','.join(config.tasks)}.")
    if config.reference:  # before anything is written
        reference_curves(Path(config.reference), tasks, _facts(config))
    run_dir = run_folder(config.run_dir, "continual", f"{config.method}-{config.seed}")
    check_run_folder(run_dir, config.resume)
    with alone_in(run_dir), Simulators(config.workers) as simulators:
        lessons = _lessons(config, sources, simulators, run_dir)
        facts = _facts(config) | {"base_sha256": lessons.base.sha256}
        reference = reference_curves(Path(config.reference), tasks, facts) if config.reference else None
        result = run_sequence(lessons, facts, reference)
    print(f"\n{table(result)}\n\n{run_dir / 'result.json'}")


def _facts(config: ContinualConfig) -> dict[str, Any]:
    """What must be the same for one run to go on with another, as JSON holds it."""
    names = ("method", "base", "reverse", "demonstrations", "filter", "steps", "evaluations", "episodes", "seed")
    facts = {name: getattr(config, name) for name in names} | {"split": list(config.tasks)}
    if config.method in ("lora", "told", "found"):
        facts["adapter"] = config.adapter.name
        facts["adapter_settings"] = asdict(config.adapter)
    facts |= {"replay": {"replay_share": config.replay_share}, "ewc": {"ewc_strength": config.ewc_strength}}.get(
        config.method, {}
    )
    rates = {"learning_rate": _rate(config), "batch_size": config.training.batch_size}
    facts["training"] = {k: v for k, v in asdict(config.training).items() if not k.endswith("_every")}
    facts["max_episode_steps"] = config.max_episode_steps
    return json.loads(json.dumps(finite(facts | rates), allow_nan=False))


def _rate(config: ContinualConfig) -> float:
    if config.training.learning_rate is not None:
        return config.training.learning_rate
    return config.adapter.learning_rate if config.method in ("lora", "told", "found") else WHOLE_RATE


def _lessons(config: ContinualConfig, sources: list, simulators: Any, run_dir: Path) -> Any:
    """The trajectories, the base and the settings of training."""
    from eva_rl.continual.learners import Lessons
    from eva_rl.continual.play import Stage
    from eva_rl.model import load_base
    from eva_rl.training import choose_device

    device = choose_device(config.device)
    base = load_base(config.base, device)
    interface = _interface(config, base, sources)
    own = _demonstrations(config, sources)
    scored_every = max(1, config.steps // config.evaluations)
    training = replace(config.training, learning_rate=_rate(config), evaluate_every=scored_every)
    stage = Stage(
        sources,
        own,
        interface,
        config.episodes,
        config.seed,
        simulators,
        device,
        training.precision,
        config.max_episode_steps,
    )
    return Lessons(
        method=config.method,
        base=replace(base, model=base.model.requires_grad_(False)),
        stage=stage,
        attach=_attach(config),
        training=training,
        steps=config.steps,
        ratios=config.adapter.ratios if config.method in ("lora", "told", "found") else {},
        replay_share=config.replay_share,
        ewc=config.ewc_strength,
        seed=config.seed,
        folder=run_dir,
    )


def _demonstrations(config: ContinualConfig, sources: list[TaskSource]) -> list[Trajectories]:
    """Each task's, as far as they are learned from."""
    from eva_rl.data import datasets, load_dataset

    ids = datasets(sources, config.demonstrations, config.seed)
    every = [load_dataset(i, s.task, config.demonstrations) for i, s in zip(ids, sources, strict=True)]
    own = [trajectories.chosen(config.filter) for trajectories in every]
    left_out = sum(len(e.lengths) - len(o.lengths) for e, o in zip(every, own, strict=True))
    if left_out:
        print(
            f"learning from {sum(len(o.lengths) for o in own)} demonstrations, and leaving {left_out} out (filter={config.filter})"
        )
    return own


def _interface(config: ContinualConfig, base: Base, sources: list[TaskSource]) -> str:
    """The interface of the base that all tasks act through.

    Raises:
        UserError: if there is none, or an environment is another than it expects.
    """
    from eva_rl.model import DecisionTransformer
    from eva_rl.rollout import check_spaces

    interfaces = {source.interface for source in sources}
    if not isinstance(base.model, DecisionTransformer):
        raise UserError(f"base must be a pretrained transformer, got {config.base}, a network cloned from scratch.")
    if len(interfaces) > 1 or not interfaces <= base.model.interfaces.keys():
        raise UserError(
            f"The tasks must act through one interface of the base, {' or '.join(sorted(base.model.interfaces))}, got "
            f"{' and '.join(sorted(interfaces))}."
        )
    interface = interfaces.pop()
    for source in sources:
        check_spaces(source.make_env, base.model.interfaces[interface])
    return interface


def _attach(config: ContinualConfig) -> Callable[[DecisionTransformer, WindowSampler], Adapter]:
    """What puts the adapter of the settings on a model, as finetune does."""
    from eva_rl.adapter import EvaSettings, attach, starts, within_budget

    method, start = config.adapter, config.adapter.start_function()
    options = asdict(method.eva) if method.eva else {}
    tokens = options.pop("tokens", "all")
    if options:
        start = partial(start or starts.eva, settings=EvaSettings(**options, seed=config.seed))

    def put_on(model: DecisionTransformer, sampler: WindowSampler) -> Adapter:
        import torch

        from eva_rl.model.nearest import task_vector

        torch.manual_seed(config.seed)
        device = model.trunk.positions.weight.device
        peft_config = within_budget(
            model, method.peft_config, method.budget, method.rank, method.tolerance, method.sizes
        )
        model.requires_grad_(False)
        return attach(
            model,
            peft_config,
            (sampler.spread(n).to(device) for n in count()),
            partial(model.token_masks, kind=tokens),
            start=start,
            loss=model.loss,
            few=method.start_batches,
            forward=lambda observed, batch: observed.as_trained(batch, tokens),
            fresh_modules=task_vector(model, sampler.interface),
        )

    return put_on


if __name__ == "__main__":
    main()
