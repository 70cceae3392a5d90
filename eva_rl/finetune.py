"""A pretrained base and a few trajectories -> an adapter and its score: `python -m eva_rl.finetune task=...`."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import count

from eva_rl.config import FinetuneConfig, entry_point, instantiate, run_folder, to_yaml


@entry_point(FinetuneConfig, "finetune")
def main(config: FinetuneConfig) -> None:
    import torch

    from eva_rl.adapter import EvaSettings, attach, base_parameters, save_adapter, trainable_parameters
    from eva_rl.data import WindowSampler, find_source, interface_of, load_dataset
    from eva_rl.files import check_writable, make_folder, write_json, write_text
    from eva_rl.model import AdapterNotes, load_base, save_base, save_notes
    from eva_rl.report import Stopwatch, TensorBoard, markdown, scores, to_json, to_scalars, versions
    from eva_rl.rollout import rollout
    from eva_rl.seeding import evaluation_seeds
    from eva_rl.training import TrainingConfig, autocast, check_run, choose_device, train

    # What was asked for. Mistakes show before anything is written.
    learning_rate = (
        config.adapter.learning_rate if config.training.learning_rate is None else config.training.learning_rate
    )
    training = TrainingConfig(**asdict(replace(config.training, learning_rate=learning_rate)))
    eva = EvaSettings(**config.adapter.eva) if config.adapter.eva else None
    device, run_dir = choose_device(config.device), run_folder(config.run_dir)
    seeds = evaluation_seeds(config.task, config.seed, config.episodes)
    check_run(config.steps, run_dir / "checkpoints", config.resume)
    check_writable(run_dir)
    source = find_source(config.task, config.dataset)
    clock = Stopwatch("collect", "load", "init", "train", "rollout")

    # Trajectories -> windows for the base.
    with clock("load"):
        base = load_base(config.base, device)
    with clock("collect"):
        dataset_id = source.dataset(config.demonstrations, config.seed)
    with clock("load"):
        trajectories = load_dataset(dataset_id, config.task, config.demonstrations)
    torch.manual_seed(config.seed)
    model, statistics = base.model, trajectories.statistics()
    interface = interface_of(source.interface, [trajectories])
    fresh_modules = model.connect(interface, f"The dataset '{dataset_id}'")
    sampler = WindowSampler([trajectories], interface.name, model.config.context, training.batch_size, config.seed)

    # Frozen base + batches -> adapter with initialised weights.
    peft_model, found = None, {}
    model.requires_grad_(config.adapter.trainable == "all")
    if config.adapter.config is not None:
        with clock("init"):
            peft_model, found = attach(
                model,
                instantiate(config.adapter.config),
                batches=(sampler.batch(n).to(device) for n in count()),
                token_mask=model.token_mask,
                fresh_modules=fresh_modules,
                eva=eva,
            )
    trainable, total = trainable_parameters(model), base_parameters(model)

    target_return = statistics.return_max if config.target_return is None else config.target_return

    def play():
        if not seeds:
            return scores(None, None)
        with clock("rollout"), autocast(training.precision, device):
            episodes = rollout(
                model, source.make_env, interface.name, model.config.context, seeds, target_return, device
            )
        return scores(episodes, source.score_scale)

    # Score, train, score again.
    write_text(make_folder(run_dir) / "config.yaml", to_yaml(config))
    with TensorBoard(run_dir) as tensorboard:
        with peft_model.disable_adapter() if peft_model else nullcontext():
            zero_shot = play()
        tensorboard.log(0, {f"eva/rank/{name}": len(layer.components) for name, layer in found.items()})
        tensorboard.log(0, to_scalars(zero_shot))
        with clock("train"):
            train(
                model,
                sampler.batch,
                model.loss,
                config.steps,
                training,
                run_dir / "checkpoints",
                config.resume,
                identity={
                    "task": config.task,
                    "dataset": dataset_id,
                    "base": config.base,
                    "adapter": config.adapter.name,
                }
                | {"demonstrations": statistics.episodes, "seed": config.seed},
                log=tensorboard.log,
                evaluate=lambda step: to_scalars(play()),
            )
        if peft_model is not None:
            save_adapter(peft_model, run_dir / "adapter", config.base)
            notes = AdapterNotes(config.base, config.task, model.interfaces[interface.name], statistics)
            save_notes(run_dir / "adapter", notes)
            peft_model.merge_adapter()
        elif trainable:
            save_base(run_dir / "model", model, base.tasks | {config.task: statistics})
        tuned = play() if trainable else zero_shot
        tensorboard.log(config.steps, to_scalars(tuned))

    result = {
        "task": config.task,
        "adapter": config.adapter.name,
        "base": config.base,
        "seed": config.seed,
        "steps": config.steps,
        "dataset": dataset_id,
        "demonstrations": statistics.episodes,
        "target_return": target_return,
        "trainable_parameters": trainable,
        "total_parameters": total,
        **to_json(tuned),
        "zero_shot": to_json(zero_shot),
        "seconds": {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()},
        "status": "complete",
        "versions": versions(),
    }
    write_json(run_dir / "result.json", result)
    print(
        f"\n{config.task}: {config.adapter.name} on {config.base}, {statistics.episodes} episodes, {config.steps} steps\n"
    )
    rows = [(name.replace("_", " "), zero_shot[name], tuned[name]) for name in tuned]
    print(markdown(["mean [95 % interval]", "zero-shot", "fine-tuned"], rows))
    print(f"\ntrainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.1f} %)\nseconds: {clock}")
    print(f"tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main()
