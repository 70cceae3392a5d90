"""A pretrained base and a few trajectories -> an adapter and its score: `python -m eva_rl.finetune task=...`."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from eva_rl.config import FinetuneConfig, entry_point, identity, protocol, run_folder, to_yaml

if TYPE_CHECKING:
    from pathlib import Path

    from eva_rl.rollout import Simulators


def _splits() -> dict[str, tuple[str, ...]]:
    from eva_rl.envs import splits

    return splits()


@entry_point(FinetuneConfig, "finetune", splits=_splits)
def main(config: FinetuneConfig) -> None:
    from eva_rl.files import InUseError, alone_in
    from eva_rl.rollout import Simulators

    run_dir = run_folder(config.run_dir, config.task, f"{config.adapter.name}-{config.seed}")
    try:
        with alone_in(run_dir), Simulators(config.workers) as simulators:
            finetune(config, run_dir, simulators)
    except InUseError:
        if not config.resume:
            raise
        print(f"{run_dir}: left to another process, which is at it")


def finetune(config: FinetuneConfig, run_dir: Path, simulators: Simulators) -> None:
    import torch

    from eva_rl.adapter import EvaSettings, attach, save_adapter, starts, trainable_parameters, within_budget
    from eva_rl.baselines import untrained
    from eva_rl.data import WindowSampler, find_source, interface_of, load_dataset
    from eva_rl.errors import UserError
    from eva_rl.files import make_folder, write_json, write_text
    from eva_rl.model import NOTES, AdapterNotes, DecisionTransformer, base_name, load_base, policy_of, save_base
    from eva_rl.rollout import Job, TargetReturn, check_spaces, film, rollout, warn_if_far
    from eva_rl.run import (
        EVA_CLAIM,
        Stopwatch,
        TensorBoard,
        check_run_folder,
        eva_figures,
        read_earlier,
        run_result,
        save_film,
        scores,
        summary,
        to_json,
        to_scalars,
    )
    from eva_rl.seeding import evaluation_seeds
    from eva_rl.training import (
        Processes,
        Recipe,
        TrainingConfig,
        autocast,
        check_run,
        check_shares,
        choose_device,
        resolved,
        train,
    )

    # What was asked for. Mistakes show before anything is written.
    method, start = config.adapter, config.adapter.start_function()
    recipe, rate = Recipe(**config.optimizer.recipe()), config.training.learning_rate
    if rate is None:
        rate = method.learning_rate * config.optimizer.rate
    if recipe.pairs and not method.is_lora:
        raise UserError(
            f"optimizer={recipe.name} works on LoRA's two factors, and adapter={method.name} has none: take adapter=lora or another "
            "one of that form."
        )
    training = TrainingConfig(**asdict(replace(config.training, learning_rate=rate)))
    eva_options = asdict(method.eva) if method.eva else {}
    tokens = eva_options.pop("tokens", "all")
    if eva_options:
        start = partial(start or starts.eva, settings=EvaSettings(**eva_options, seed=config.seed))
    device = choose_device(config.device)
    seeds, target = evaluation_seeds(config.task, config.seed, config.episodes), TargetReturn(config.target_return)
    if target.sweeps:
        raise UserError("target_return=sweep is for `python -m eva_rl.evaluate`: name one return here.")
    check_shares(training, Processes())
    check_run(config.steps, run_dir / "checkpoints", config.resume, identity(config))
    check_run_folder(run_dir, config.resume)
    clock = Stopwatch("collect", "load", "init", "train", "rollout")
    with clock("load"):
        base = load_base(config.base, device)
    if not isinstance(base.model, DecisionTransformer):
        raise UserError(
            f"base={config.base} is a network cloned from scratch where a pretrained transformer was expected."
        )
    earlier = {}
    if config.resume:
        earlier = read_earlier(run_dir, protocol(config), base.sha256)
    if earlier.get("status") == "complete":
        if config.zero_shot and seeds and earlier["zero_shot"]["episode_return"] is None:
            raise UserError(
                f"'{run_dir}' was finished without zero-shot scores: set zero_shot=false, or another run_dir."
            )
        return print(f"{run_dir}: finished earlier, its result stays; `python -m eva_rl.evaluate` scores it again")
    if config.resume and not earlier and training.evaluate_every and any(run_dir.glob("checkpoints/*.safetensors")):
        raise UserError(
            f"'{run_dir}' holds training states but no result.json with the learning curve up to there: remove the folder, or set "
            "another run_dir."
        )
    source = find_source(config.task, config.dataset, config.trust_environment)

    # Trajectories -> windows for the base.
    with clock("collect"):
        dataset_id = source.dataset(config.demonstrations, config.seed)
    with clock("load"):
        trajectories = load_dataset(dataset_id, config.task, config.demonstrations)
    torch.manual_seed(config.seed)
    model, statistics = base.model, trajectories.statistics()
    interface = interface_of(source.interface, [trajectories])
    if method.network == "base":
        fresh_modules, known_tasks = model.connect(interface, f"The dataset '{dataset_id}'"), base.tasks
    else:
        model, known_tasks = untrained(method.network, model.config, source.interface, trajectories).to(device), {}
        fresh_modules = ()
    sampler = WindowSampler([trajectories], interface.name, model.config.context, training.batch_size, config.seed)
    total_parameters = sum(p.numel() for p in model.parameters())
    peft_config = None
    if method.config is not None:
        model.check_token(tokens, interface.name)
        peft_config = within_budget(
            model, method.peft_config, method.budget, method.rank, method.tolerance, method.sizes
        )

    # The base as it is.
    [target_return] = target.returns(config.task, statistics)
    warn_if_far(target_return, config.task, statistics)
    if seeds:
        check_spaces(source.make_env, model.interfaces[interface.name])

    def play(policy):
        if not seeds or policy is None:
            return scores(None, None)
        jobs = [Job(config.task, source.make_env, seed, target_return) for seed in seeds]
        with clock("rollout"), autocast(training.precision, device):
            episodes = rollout(
                policy_of(policy, interface.name),
                policy.interfaces[interface.name],
                jobs,
                simulators,
                device,
                max_steps=config.max_episode_steps,
            )
        return scores(episodes, source.score_scale)

    zero_shot = play(model if method.trainable == "none" or (config.zero_shot and method.network == "base") else None)

    # Frozen base + batches -> adapter with initialised weights.
    adapter = None
    model.requires_grad_(method.trainable == "all")
    if method.trainable == "interface":
        for name in model.modules_of(interface.name):
            model.get_submodule(name).requires_grad_()
    if peft_config is not None:
        with clock("init"):
            batches = (sampler.spread(n).to(device) for n in count())
            adapter = attach(
                model,
                peft_config,
                batches,
                partial(model.token_masks, kind=tokens),
                fresh_modules,
                start,
                model.loss,
                method.start_batches,
                progress=True,
                forward=lambda observed, batch: observed.as_trained(batch, tokens),
            )
    for name, parameter in model.named_parameters():
        if any(word in name for word in config.optimizer.freezes):
            parameter.requires_grad_(False)
    facts = {
        "task": config.task,
        "adapter": method.name,
        "base": config.base,
        **({"base_sha256": base.sha256} if method.network == "base" else {}),  # others see nothing of it
        "seed": config.seed,
        "steps": config.steps,
        "learning_rate": rate,
        "dataset": dataset_id,
        "demonstrations": statistics.episodes,
        "target_return": target_return,
        "trainable_parameters": trainable_parameters(model),
        "total_parameters": total_parameters,
        "settings": protocol(config),
        "device": device.type,
        "precision": resolved(training.precision, device),
    }

    # Train, save, score again.
    curve = dict(earlier.get("curve", {}))

    def evaluate(step):
        found = play(adapter.merged() if adapter else model)
        curve[str(step)] = to_json(found)
        write_json(run_dir / "result.json", run_result(facts, clock, zero_shot, None, curve=curve))
        return to_scalars(found)

    write_text(make_folder(run_dir) / "config.yaml", to_yaml(config))
    write_json(run_dir / "result.json", run_result(facts, clock, zero_shot, None, curve=curve))
    print(f"run folder: {run_dir}")
    with TensorBoard(run_dir) as tensorboard:
        if adapter and adapter.eva:
            layers = {name: layer.facts() for name, layer in adapter.eva.items()}
            settings = asdict(method.eva) if method.eva else None
            write_json(run_dir / "eva.json", {"settings": settings, "about": EVA_CLAIM, "layers": layers})
            tensorboard.figures(0, eva_figures(layers))
        tensorboard.log(0, to_scalars(zero_shot))
        with clock("train"):
            trained = train(
                model,
                sampler.batch,
                model.loss,
                config.steps,
                training,
                run_dir / "checkpoints",
                config.resume,
                identity(config),
                tensorboard.log,
                evaluate=evaluate,
                ratios=method.ratios,
                rates=dict.fromkeys(fresh_modules, config.fresh_learning_rate),
                companion=adapter and adapter.companion,
                frozen=adapter and adapter.frozen(),
                recipe=recipe,
            )
        if config.resume:  # also the seconds before the interruption
            clock.seconds["train"] = trained.seconds
        if adapter is not None:
            own = model.interfaces[interface.name]
            notes = AdapterNotes(base_name(config.base), base.sha256, config.task, own, statistics)
            save_adapter(adapter, run_dir / "adapter", notes.base, {NOTES: asdict(notes)})
        elif facts["trainable_parameters"]:
            save_base(run_dir / "model", model, known_tasks | {config.task: statistics}, config.task)
        policy = adapter.merged() if adapter else model
        tuned = play(policy) if facts["trainable_parameters"] else zero_shot
        tensorboard.log(config.steps, to_scalars(tuned))
        result, told = (
            run_result(facts, clock, zero_shot, tuned, trained.tenths(), curve),
            summary(facts, clock, zero_shot, tuned),
        )
        write_json(run_dir / "result.json", result)
        tensorboard.text("run", f"{told}\n\n```yaml\n{to_yaml(config)}```")
        tensorboard.hparams(result)
        print("\n" + told)
        if config.video and seeds:
            job = Job(config.task, source.make_env, seeds[0], target_return)
            with autocast(training.precision, device):
                frames = film(
                    policy_of(policy, interface.name),
                    policy.interfaces[interface.name],
                    job,
                    device,
                    config.max_episode_steps,
                )
            save_film(run_dir, tensorboard, config.steps, config.task, job.seed, frames)
    print(f"tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main()
