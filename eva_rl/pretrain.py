"""Datasets of many tasks -> a pretrained Decision Transformer: `python -m eva_rl.pretrain task=metaworld/mt40`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eva_rl.config import PretrainConfig, entry_point, identity, run_folder, to_yaml
from eva_rl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from eva_rl.data import TaskSource, Trajectories
    from eva_rl.training import Processes


@entry_point(PretrainConfig, "pretrain")
def main(config: PretrainConfig) -> None:
    from eva_rl.training import processes

    with processes(config.device) as group:
        pretrain(config, group)


def pretrain(config: PretrainConfig, group: Processes) -> None:
    import torch

    from eva_rl.data import (
        MixtureSampler,
        WindowSampler,
        datasets,
        domain_weights,
        find_sources,
        interface_of,
        load_dataset,
    )
    from eva_rl.files import check_run_folder, make_folder, write_json, write_text
    from eva_rl.model import DecisionTransformer, ModelConfig, check_output, save_base
    from eva_rl.run import TensorBoard, versions
    from eva_rl.training import Recipe, TrainingConfig, by_domain, check_run, check_shares, choose_device, train

    # What was asked for. Mistakes show before anything is written.
    sources = list({source.task: source for task in config.task for source in find_sources(task)}.values())
    if not sources:
        raise UserError("task=[] was given where at least one task or split was expected.")
    domain_weights(dict.fromkeys(map(domain_of, sources), 1), config.weights, config.temperature)
    model_config = ModelConfig(**asdict(config.model))
    training_config = TrainingConfig(**asdict(config.training))
    recipe = Recipe(**config.optimizer.recipe())
    check_shares(training_config, group)
    if config.labels not in ("actions", "expert"):
        raise UserError(f"labels={config.labels} was given where actions or expert was expected.")
    for name in config.tokens or ():
        if name not in (known := {source.interface for source in sources}):
            raise UserError(f"tokens names the interface '{name}', which these tasks lack. {did_you_mean(name, known)}")
    device = choose_device(config.device) if group.state is None else group.state.device
    run_dir = run_folder(config.run_dir, "pretrain")
    check_run(config.steps, run_dir / "checkpoints", config.resume, identity(config))
    output = Path(config.output) if config.output else run_dir / "model"
    if training_config.evaluate_every:
        raise UserError(
            "training.evaluate_every is for fine-tuning: `python -m eva_rl.evaluate` scores a pretrained model."
        )
    if group.first:
        check_run_folder(run_dir, config.resume)
        checkpoints = (run_dir / "checkpoints").resolve()
        if checkpoints.is_relative_to(output.resolve()) or output.resolve().is_relative_to(checkpoints):
            raise UserError(f"output={output} would replace files of the run in '{run_dir}': name another folder.")
        check_output(output)

    # Trajectories -> an interface for each family of tasks, and windows of all of them.
    with group.first_alone():
        ids = datasets(sources, config.demonstrations, config.seed)
        trajectories = [
            load_dataset(id, source.task, expert_labels=config.labels == "expert")
            for id, source in zip(ids, sources, strict=True)
        ]
    if config.labels == "expert":
        warn_of_missing_labels(trajectories)
    families, domains, sizes = {}, {}, {}
    for source, own in zip(sources, trajectories, strict=True):
        families.setdefault(source.interface, []).append(own)
        domains[source.interface] = domain_of(source)
        sizes[domain_of(source)] = sizes.get(domain_of(source), 0) + len(own.rewards)
    floor = {name: [config.std_floor] if len(own) > 1 else [] for name, own in families.items()}
    interfaces = [
        replace(interface_of(name, own, *floor[name]), tokens=tuple((config.tokens or {}).get(name, ())))
        for name, own in families.items()
    ]
    windows = {
        name: WindowSampler(own, name, model_config.context, training_config.batch_size, config.seed)
        for name, own in families.items()
    }
    shares = domain_weights(sizes, config.weights, config.temperature)
    tasks_of = Counter(domain_of(source) for source in sources)
    weights = [shares[domains[name]] * len(own) / tasks_of[domains[name]] for name, own in families.items()]
    sampler = MixtureSampler(list(windows.values()), weights, training_config.batch_size, config.seed)
    if len(windows) == 1:
        [sampler] = windows.values()

    # Windows -> model.
    torch.manual_seed(config.seed)
    model = DecisionTransformer(model_config, interfaces).to(device)
    parameters, transitions = sum(p.numel() for p in model.parameters()), sum(sizes.values())
    if group.first:
        print(f"{run_dir}: {len(sources)} tasks, {transitions:,} transitions, {parameters:,} parameters")
        for domain, share in shares.items() if len(shares) > 1 else ():
            print(f"  {domain}: {tasks_of[domain]} tasks, {sizes[domain]:,} transitions, {share:.0%} of the windows")
        write_text(make_folder(run_dir) / "config.yaml", to_yaml(config))
    torch.manual_seed(config.seed + group.index)  # each process its own dropout
    with TensorBoard(run_dir) if group.first else nullcontext() as tensorboard:
        result = train(
            model,
            sampler.batch,
            model.loss,
            config.steps,
            training_config,
            run_dir / "checkpoints",
            config.resume,
            identity(config),
            tensorboard.log if tensorboard else lambda step, scalars: None,
            inspect=by_domain(domains, model.loss, list(model.trunk.parameters()))
            if tensorboard and len(shares) > 1
            else None,
            processes=group,
            recipe=recipe,
        )
    if not group.first:
        return
    save_base(output, model, {t.task: t.statistics() for t in trajectories})
    facts = {"task": list(config.task), "steps": config.steps, "seed": config.seed, "parameters": parameters}
    facts |= {"transitions": transitions, "loss": result.losses[-1] if result.losses else None}
    facts |= {"seconds": round(result.seconds, 1), "status": "complete", "versions": versions()}
    write_json(run_dir / "result.json", facts)
    print(f"{output}: trained for {config.steps} steps in {result.seconds:.0f} s")
    print(f"tensorboard --logdir {run_dir}")


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


if __name__ == "__main__":
    main()
