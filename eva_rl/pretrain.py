"""Datasets of many tasks -> a pretrained Decision Transformer: `python -m eva_rl.pretrain task=metaworld/mt40`."""

from dataclasses import asdict
from pathlib import Path

from eva_rl.config import PretrainConfig, entry_point, identity, run_folder, to_yaml


@entry_point(PretrainConfig, "pretrain")
def main(config: PretrainConfig) -> None:
    import torch

    from eva_rl.data import Recipe, WindowSampler, collect, interface_of, load_dataset
    from eva_rl.envs import expand_tasks
    from eva_rl.files import check_run_folder, make_folder, write_json, write_text
    from eva_rl.model import DecisionTransformer, ModelConfig, save_base
    from eva_rl.report import TensorBoard, versions
    from eva_rl.training import TrainingConfig, check_run, choose_device, train

    tasks = expand_tasks(config.task)
    model_config = ModelConfig(**asdict(config.model))
    training_config = TrainingConfig(**asdict(config.training))
    device = choose_device(config.device)
    run_dir = run_folder(config.run_dir)
    check_run(config.steps, run_dir / "checkpoints", config.resume, identity(config))
    check_run_folder(run_dir, config.resume)
    output = Path(config.output) if config.output else run_dir / "model"
    check_run_folder(output.parent, resume=True)
    recipes = [Recipe(task, config.demonstrations, seed=config.seed) for task in tasks]

    trajectories = [load_dataset(id, task) for id, task in zip(collect(recipes), tasks, strict=True)]
    interface = interface_of(config.task.partition("/")[0], trajectories, config.std_floor)
    torch.manual_seed(config.seed)
    model = DecisionTransformer(model_config, [interface]).to(device)
    sampler = WindowSampler(trajectories, interface.name, model_config.context, training_config.batch_size, config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{run_dir}: {len(tasks)} tasks, {len(sampler.rewards):,} transitions, {parameters:,} parameters")
    write_text(make_folder(run_dir) / "config.yaml", to_yaml(config))
    with TensorBoard(run_dir) as tensorboard:
        result = train(
            model,
            sampler.batch,
            model.loss,
            config.steps,
            training_config,
            run_dir / "checkpoints",
            config.resume,
            identity(config),
            tensorboard.log,
        )
    save_base(output, model, {t.task: t.statistics() for t in trajectories})
    facts = {"task": config.task, "steps": config.steps, "seed": config.seed, "parameters": parameters}
    facts |= {"transitions": len(sampler.rewards), "loss": result.losses[-1] if result.losses else None}
    facts |= {"seconds": round(result.seconds, 1), "status": "complete", "versions": versions()}
    write_json(run_dir / "result.json", facts)
    print(f"{output}: trained for {config.steps} steps in {result.seconds:.0f} s")
    print(f"tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main()
