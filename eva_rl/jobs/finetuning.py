"""A pretrained base and a few trajectories -> an adapter and its score, in steps.

- `asked_for`: what the settings mean. Mistakes show here, before anything is written.
- `earlier_result`: how far a resumed run had got.
- `demonstrated`: trajectories of the task.
- `connected`: a model that can see the task and act in it, and windows for it.
- `initialised`: its adapter, at the start.
- `trained`: the adapter, trained and saved.
- `finish`: its scores, and the run's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from eva_rl import settings
from eva_rl.adapter import (
    Adapter,
    Allocator,
    EvaSettings,
    TaskData,
    attach,
    save_adapter,
    starts,
    trainable_parameters,
    within_budget,
)
from eva_rl.baselines import untrained
from eva_rl.config import FinetuneConfig, Plan, plan
from eva_rl.data import (
    MirroredSampler,
    TaskSource,
    Trajectories,
    WindowSampler,
    find_source,
    has_mirror_image,
    interface_of,
    load_dataset,
)
from eva_rl.errors import UserError
from eva_rl.files import InUseError, alone_in, make_folder, write_json, write_text
from eva_rl.interface import TaskStatistics
from eva_rl.jobs.known import BATCHES, check_library, known_start
from eva_rl.jobs.playing import Stage
from eva_rl.library import Library
from eva_rl.model import NOTES, AdapterNotes, Base, DecisionTransformer, base_name, load_base, save_base
from eva_rl.model.action_model import ActionModel
from eva_rl.model.nearest import begin_with_nearest, task_vector
from eva_rl.rollout import Job, Simulators, TargetReturn, check_spaces, warn_if_far
from eva_rl.run import (
    EVA_CLAIM,
    RunResult,
    Scores,
    Stopwatch,
    TensorBoard,
    check_run_folder,
    check_tracker,
    eva_figures,
    open_tracker,
    read_earlier,
    run_result,
    save_film,
    scores,
    summary,
    to_scalars,
)
from eva_rl.seeding import evaluation_seeds
from eva_rl.training import (
    BASE,
    Hooks,
    Processes,
    Recipe,
    Rules,
    Saves,
    TrainingConfig,
    TrainingResult,
    autocast,
    check_run,
    check_shares,
    choose_device,
    resolved,
    train,
)

PATIENCE = 4
"""How many times as long as the longest demonstration an episode may be where the environment sets no limit."""


def finetune(config: FinetuneConfig, simulators: Simulators | None = None) -> Path:
    """Fine-tune as the settings say, and return the run's folder.

    Args:
        simulators: those of several runs that follow one another. None: this run's own.

    Raises:
        UserError: for settings that make no sense, before anything is written, and later on for whatever a user
            can mend.
        InUseError: if another process works in the folder, unless this run is to go on with what is there.
    """
    config = replace(config, mirror=config.mirror and has_mirror_image(config.task))
    run = plan(config, config.task, f"{config.adapter.name}-{config.seed}")
    try:
        with (
            alone_in(run.folder),
            nullcontext(simulators) if simulators is not None else Simulators(config.workers) as own,
        ):
            _finetune(asked_for(config, run), own)
    except InUseError:
        if not config.resume:
            raise
        print(f"{run.folder}: left to another process, which is at it")
    return run.folder


def _finetune(asked: Asked, simulators: Simulators) -> None:
    clock = Stopwatch("collect", "load", "init", "train", "rollout")
    with clock("load"):
        base = load_base(asked.config.base, asked.device)
    earlier = earlier_result(asked, base)
    if earlier and earlier.status == "complete":
        return print(
            f"{asked.run.folder}: finished earlier, its result stays; `python -m eva_rl.evaluate` scores it again"
        )
    task = demonstrated(asked, clock)
    learner = connected(asked, task, base)
    player = player_of(asked, task, learner, simulators, clock)
    scores_base = asked.plays_zero_shot(bool(learner.fresh_modules))
    zero_shot = player.play(learner.model) if scores_base else scores(None, None)
    adapter = initialised(asked, task, learner, clock)
    facts = facts_of(asked, base, task, learner, player.target_return)
    record = Record(asked.run.folder, facts, clock, zero_shot, dict(earlier.curve) if earlier else {})
    with open_tracker(asked.config.tracker, asked.run.folder, asked.run.protocol) as tensorboard:
        write_text(make_folder(asked.run.folder) / "config.yaml", asked.run.yaml)
        record.write()
        print(f"run folder: {asked.run.folder}")
        if learner.fresh_modules and player.jobs and not scores_base:
            print(
                "zero-shot: left out, as the base has no trained embedder and head for this task; zero_shot=true plays it"
            )
        show_start(asked, adapter, zero_shot, tensorboard)
        losses = trained(asked, learner, adapter, player, record, tensorboard)
        save(asked, base, task, learner, adapter, record)
        finish(asked, _acting(learner.model, adapter), player, record, losses, tensorboard)
    print(f"tensorboard --logdir {asked.run.folder}")


@dataclass(frozen=True)
class Asked:
    """What the settings of a run mean."""

    config: FinetuneConfig
    run: Plan
    training: TrainingConfig
    recipe: Recipe
    start: starts.Start | None
    allocator: Allocator | None
    tokens: str
    """Those of the model's tokens that EVA looks at."""
    device: torch.device
    seeds: Sequence[int]
    """Of the rollouts, before and after."""
    target: TargetReturn

    def plays_zero_shot(self, fresh: bool) -> bool:
        """Whether the base is rolled out as it is.

        Args:
            fresh: whether its embedder and head for the task were never trained.
        """
        method, wanted = self.config.adapter, self.config.zero_shot
        if method.trainable == "none":
            return True
        return method.network == "base" and (not fresh if wanted is None else wanted)


def asked_for(config: FinetuneConfig, run: Plan) -> Asked:
    """What the settings mean.

    Raises:
        UserError: if they make no sense, alone or together with what is in the run's folder.
    """
    method = config.adapter
    start, recipe = method.start_function(), Recipe(**config.optimizer.recipe())
    allocator = _allocator_of(config)
    if recipe.pairs and not method.is_lora:
        raise UserError(
            f"optimizer={recipe.name} works on LoRA's two factors, and adapter={method.name} has none: take adapter=lora or another "
            "one of that form."
        )
    check_library(config)
    training = training_of(config)
    eva_options = asdict(method.eva) if method.eva else {}
    tokens = eva_options.pop("tokens", "all")
    if eva_options:
        start = partial(start or starts.eva, settings=EvaSettings(**eva_options, seed=config.seed))
    device = choose_device(config.device)
    seeds, target = evaluation_seeds(config.task, config.seed, config.episodes), TargetReturn(config.target_return)
    if target.sweeps:
        raise UserError("target_return=sweep is for `python -m eva_rl.evaluate`: name one return here.")
    check_shares(training, Processes())
    check_tracker(config.tracker)
    check_run(config.steps, run.checkpoints, bool(config.resume), run.identity)
    check_run_folder(run.folder, bool(config.resume))
    return Asked(config, run, training, recipe, start, allocator, tokens, device, seeds, target)


def _allocator_of(config: FinetuneConfig) -> Allocator | None:
    """What decides the ranks or blocks from outside.

    Raises:
        UserError: if the adapter has none.
    """
    allocator, method = config.allocator.allocator(), config.adapter
    if allocator is None or method.is_lora:
        return allocator
    if allocator.on_all is None or method.trainable != "all" or method.network == "mlp":
        also = "" if allocator.on_all is None else ", adapter=full"
        raise UserError(
            f"allocator={config.allocator.name} works on LoRA, and adapter={method.name} is none: take adapter=lora or another one of "
            f"that form{also}."
        )
    return allocator


def training_of(config: FinetuneConfig) -> TrainingConfig:
    """The settings of training, at the adapter's own learning rate where the run names none."""
    rate = config.training.learning_rate
    if rate is None:
        rate = config.adapter.learning_rate * config.optimizer.rate
    return TrainingConfig(**asdict(replace(config.training, learning_rate=rate)))


def earlier_result(asked: Asked, base: Base) -> RunResult | None:
    """The result of the run that this one resumes, as far as it got, or None if there is none.

    Raises:
        UserError: if the run can't go on with what is in its folder, or its base is not one to adapt.
    """
    config, folder = asked.config, asked.run.folder
    if not isinstance(base.model, DecisionTransformer):
        raise UserError(f"base must be a pretrained transformer, got {config.base}, a network cloned from scratch.")
    if not config.resume:
        return None
    earlier = read_earlier(folder, asked.run.protocol, base.sha256)
    check_run(config.steps, asked.run.checkpoints, True, {**asked.run.identity, **seen_of(base, config)})
    if earlier and earlier.status == "complete":
        lacking = asked.seeds and earlier.zero_shot["episode_return"] is None
        if lacking and config.zero_shot and config.adapter.network == "base":
            raise UserError(
                f"'{folder}' was finished without zero-shot scores: set zero_shot=false, or another run_dir."
            )
    elif not earlier and asked.training.evaluate_every and any(asked.run.checkpoints.glob("*.safetensors")):
        raise UserError(
            f"'{folder}' holds training states but no result.json with the learning curve up to there: remove the folder, or set "
            "another run_dir."
        )
    return earlier


@dataclass(frozen=True)
class Demonstrated:
    """A task, and trajectories of it."""

    source: TaskSource
    dataset_id: str
    trajectories: Trajectories
    """Those that are learned from."""
    statistics: TaskStatistics
    """Of those."""
    demonstrations: int
    """How many there were to choose from."""
    longest: int
    """Steps of the longest of those."""


def demonstrated(asked: Asked, clock: Stopwatch) -> Demonstrated:
    """The task's trajectories, collected where they are missing."""
    config = asked.config
    source = find_source(config.task, config.dataset, config.trust_environment)
    with clock("collect"):
        dataset_id = source.dataset(config.demonstrations, config.seed)
    with clock("load"):
        trajectories = load_dataset(dataset_id, config.task, config.demonstrations)
    chosen, lengths = trajectories.chosen(config.filter), trajectories.lengths
    if config.filter == "successful" and len(chosen.lengths) < len(lengths):
        print(
            f"learning from the {len(chosen.lengths)} of {len(lengths)} demonstrations that solved the task (filter=all takes all)"
        )
    return Demonstrated(source, dataset_id, chosen, chosen.statistics(), len(lengths), int(lengths.max()))


@dataclass(frozen=True)
class Learner:
    """The model that is to learn the task, and what it learns from."""

    model: ActionModel
    interface: str
    fresh_modules: tuple[str, ...]
    """An embedder and head that the base does not have, by name."""
    task_vector: tuple[str, ...]
    """The module of the vector that tells the task from others, by name, where the base has such vectors."""
    known_tasks: Mapping[str, TaskStatistics]
    """Those that its weights know already."""
    sampler: WindowSampler | MirroredSampler
    total_parameters: int
    """Without the adapter's."""
    peft_config: Any
    """peft's config of the adapter. None where the method has none."""


def connected(asked: Asked, task: Demonstrated, base: Base) -> Learner:
    """The base with an embedder and a head for the task, or an untrained network in its place."""
    config, method = asked.config, asked.config.adapter
    torch.manual_seed(config.seed)
    model, interface = base.transformer, interface_of(task.source.interface, [task.trajectories])
    if method.network == "base":
        fresh_modules, known_tasks = model.connect(interface, f"The dataset '{task.dataset_id}'"), base.tasks
    else:
        model = untrained(method.network, model.config, task.source.interface, task.trajectories).to(asked.device)
        fresh_modules, known_tasks = (), {}
    windows = model.config.context, asked.training.batch_size
    sampler = WindowSampler([task.trajectories], interface.name, *windows, config.seed)
    if config.mirror and task.source.mirror:
        sampler = MirroredSampler(sampler, *task.source.mirror)
    total_parameters = sum(p.numel() for p in model.parameters())
    peft_config = None
    if method.config is not None:
        assert isinstance(model, DecisionTransformer), method.network  # adapters are the base's
        model.check_token(asked.tokens, interface.name)
        size = method.budget, method.rank, method.tolerance, method.sizes
        peft_config = within_budget(model, method.peft_config, *size)
    vector = _nearest_task(asked, model, interface.name, sampler) if method.network == "base" else ()
    return Learner(model, interface.name, fresh_modules, vector, known_tasks, sampler, total_parameters, peft_config)


def _nearest_task(
    asked: Asked, model: ActionModel, interface: str, sampler: WindowSampler | MirroredSampler
) -> tuple[str, ...]:
    """Begin with the task vector that predicts the demonstrations best.

    Returns:
        The name of its module, where there are such vectors.
    """
    vector = task_vector(model, interface)
    if vector:
        with autocast(asked.training.precision, asked.device):
            nearest = begin_with_nearest(model, sampler.spread(0).to(asked.device))
        if nearest is None:
            print("no task of the base predicts the demonstrations better than the vector that the base came with")
        else:
            print(f"of the base's tasks, {nearest} predicts the demonstrations best: its vector is the first")
    return vector


@dataclass(frozen=True)
class Player:
    """Plays the run's episodes with any model that the learner becomes."""

    stage: Stage
    interface: str
    jobs: Sequence[Job]
    score_scale: tuple[float, float] | None
    target_return: float
    simulators: Simulators
    clock: Stopwatch

    def play(self, model: ActionModel) -> Scores:
        """The scores of all episodes, unknown where none were asked for."""
        if not self.jobs:
            return scores(None, None)
        with self.clock("rollout"):
            episodes = self.stage.play(model, self.interface, self.jobs, self.simulators)
        return scores(episodes, self.score_scale)


def player_of(asked: Asked, task: Demonstrated, learner: Learner, simulators: Simulators, clock: Stopwatch) -> Player:
    """What plays the episodes.

    Raises:
        UserError: if the environment is another than that of the trajectories.
    """
    name, source = asked.config.task, task.source
    [target_return] = asked.target.returns(name, task.statistics)
    warn_if_far(target_return, name, task.statistics)
    if asked.seeds:
        check_spaces(source.make_env, learner.model.interfaces[learner.interface])
    patience = PATIENCE * task.longest
    stage = Stage(asked.device, asked.training.precision, asked.config.max_episode_steps, patience)
    jobs = [Job(name, source.make_env, seed, target_return) for seed in asked.seeds]
    return Player(stage, learner.interface, jobs, source.score_scale, target_return, simulators, clock)


def initialised(asked: Asked, task: Demonstrated, learner: Learner, clock: Stopwatch) -> Adapter | None:
    """The frozen model's adapter with initialised weights, or None where the method has none.

    What the method trains is made trainable.
    """
    method, model, tokens = asked.config.adapter, learner.model, asked.tokens
    model.requires_grad_(method.trainable == "all")
    if method.trainable == "interface":
        for name in model.modules_of(learner.interface):
            model.get_submodule(name).requires_grad_()
    adapter = None
    if learner.peft_config is not None:
        assert isinstance(model, DecisionTransformer), method.network  # see `connected`
        with clock("init"):
            data = TaskData(
                (learner.sampler.spread(n).to(asked.device) for n in count()),
                partial(model.token_masks, kind=tokens),
                model.loss,
                method.start_batches,
                progress=True,
                forward=lambda observed, batch: cast("DecisionTransformer", observed).as_trained(batch, tokens),
            )
            fresh = learner.fresh_modules + learner.task_vector
            start = asked.start
            if asked.config.start_from:
                library = Library(asked.config.start_from, asked.config.base)
                few = [learner.sampler.spread(number).to(asked.device) for number in range(BATCHES)]
                found = task.trajectories, few, learner.peft_config
                start = known_start(
                    library, asked.run.folder, model, *found, otherwise=start, resume=bool(asked.config.resume)
                )
            adapter = attach(model, learner.peft_config, data, None, fresh, start, asked.allocator)
    for name, parameter in model.named_parameters():
        if any(word in name for word in asked.config.optimizer.freezes):
            parameter.requires_grad_(False)
    return adapter


def seen_of(base: Base, config: FinetuneConfig) -> dict[str, str]:
    """The hash of the base's weights, where the method sees them."""
    return {BASE: base.sha256} if config.adapter.network == "base" else {}


def facts_of(asked: Asked, base: Base, task: Demonstrated, learner: Learner, target_return: float) -> Mapping[str, Any]:
    """What result.json states besides the scores."""
    config, method = asked.config, asked.config.adapter
    return {
        "task": config.task,
        "adapter": method.name,
        "base": config.base,
        **seen_of(base, config),
        "seed": config.seed,
        "steps": config.steps,
        "learning_rate": asked.training.learning_rate,
        "dataset": task.dataset_id,
        "demonstrations": task.demonstrations,
        "learned_from": len(task.trajectories.lengths),
        "target_return": target_return,
        "trainable_parameters": trainable_parameters(learner.model),
        "total_parameters": learner.total_parameters,
        "settings": asked.run.protocol,
        "device": asked.device.type,
        "precision": resolved(asked.training.precision, asked.device),
    }


@dataclass(frozen=True)
class Record:
    """What is known of the run so far, which result.json states."""

    folder: Path
    facts: Mapping[str, Any]
    clock: Stopwatch
    zero_shot: Scores
    curve: dict[str, Scores]
    """The scores while training, by optimiser steps."""

    def write(self, tuned: Scores | None = None, losses: Sequence[float] = ()) -> RunResult:
        result = run_result(self.facts, self.clock, self.zero_shot, tuned, losses, self.curve)
        result.write(self.folder)
        return result


def show_start(asked: Asked, adapter: Adapter | None, zero_shot: Scores, tensorboard: TensorBoard) -> None:
    """Write what EVA found in eva.json, and the base's scores in TensorBoard."""
    if adapter and adapter.eva:
        layers = {name: layer.facts() for name, layer in adapter.eva.items()}
        settings = asdict(asked.config.adapter.eva) if asked.config.adapter.eva else None
        told = {"settings": settings, "about": EVA_CLAIM, "layers": layers}
        write_json(asked.run.folder / "eva.json", told)
        tensorboard.figures(0, eva_figures(layers))
    tensorboard.log(0, to_scalars(zero_shot))


def trained(
    asked: Asked,
    learner: Learner,
    adapter: Adapter | None,
    player: Player,
    record: Record,
    tensorboard: TensorBoard,
) -> TrainingResult:
    """Train what is trainable, and score it on the way where that was asked for."""
    config, model = asked.config, learner.model
    on_all = None if asked.allocator is None else asked.allocator.on_all
    whole = None if adapter or on_all is None else on_all(model)
    rules = Rules(
        asked.recipe,
        config.adapter.ratios,
        dict.fromkeys(learner.fresh_modules + learner.task_vector, config.fresh_learning_rate),
        adapter.companion if adapter else whole,
        adapter.frozen() if adapter else {},
    )
    weights = {name: value for name, value in record.facts.items() if name == BASE}
    saves = Saves(asked.run.checkpoints, bool(config.resume), {**asked.run.identity, **weights})
    hooks = Hooks(tensorboard.log, _evaluation(model, adapter, player, record))
    with record.clock("train"):
        result = train(model, learner.sampler.batch, model.loss, config.steps, asked.training, saves, rules, hooks)
    if config.resume:  # also the seconds before the interruption
        record.clock.seconds["train"] = result.seconds
    return result


def _evaluation(
    model: ActionModel, adapter: Adapter | None, player: Player, record: Record
) -> Callable[[int], Mapping[str, float]]:
    """What scores the model while it is trained, and adds that to the learning curve."""

    def evaluate(step: int) -> Mapping[str, float]:
        found = player.play(_acting(model, adapter))
        record.curve[str(step)] = found
        record.write()
        return to_scalars(found)

    return evaluate


def save(
    asked: Asked, base: Base, task: Demonstrated, learner: Learner, adapter: Adapter | None, record: Record
) -> None:
    """Write what was trained: the adapter, or the whole model."""
    config, model = asked.config, learner.model
    if adapter is not None:
        own = model.interfaces[learner.interface]
        notes = AdapterNotes(base_name(config.base), base.sha256, config.task, own, task.statistics)
        save_adapter(adapter, asked.run.folder / "adapter", notes.base, {NOTES: asdict(notes)})
    elif record.facts["trainable_parameters"]:
        known = dict(learner.known_tasks) | {config.task: task.statistics}
        save_base(asked.run.folder / "model", model, known, config.task)


def _acting(model: ActionModel, adapter: Adapter | None) -> ActionModel:
    """The model as it acts: with an adapter, a copy that has it in its weights."""
    return model if adapter is None else cast("ActionModel", adapter.merged())


def finish(
    asked: Asked, policy: ActionModel, player: Player, record: Record, losses: TrainingResult, tensorboard: TensorBoard
) -> None:
    """Score the trained model, write the result, say it, and film an episode unless that is switched off."""
    config, zero_shot = asked.config, record.zero_shot
    tuned = player.play(policy) if record.facts["trainable_parameters"] else zero_shot
    tensorboard.log(config.steps, to_scalars(tuned))
    result = record.write(tuned, losses.tenths())
    told = summary(result)
    tensorboard.text("run", f"{told}\n\n```yaml\n{asked.run.yaml}```")
    tensorboard.hparams(result)
    print("\n" + told)
    if player.jobs and (config.video or (config.video is None and settings.FILM_STEPS)):
        show_film(asked, policy, player, tensorboard)


def show_film(asked: Asked, policy: ActionModel, player: Player, tensorboard: TensorBoard) -> None:
    """Film an episode.

    A film that nobody asked for is short, and is left out where the episode can't be rendered.
    """
    config, job = asked.config, player.jobs[0]
    try:
        frames = player.stage.film(policy, player.interface, job, short=not config.video)
    except UserError as error:
        if config.video:
            raise
        return print(f"no film: {error}")
    save_film(asked.run.folder, tensorboard, config.steps, config.task, job.seed, frames)
