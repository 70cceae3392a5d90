"""A checkpoint, with or without an adapter, in a task or a split -> its scores, in steps.

- `asked_for`: what the settings mean. Mistakes show here, before anything is written.
- `load`: the model, and what is known of its tasks.
- `jobs_of`: the episodes to play.
- `play`: those that ended.
- `scored`: their scores, by task and return asked for.
- `write`, `say`: the run's result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eva_rl.adapter import load_adapter
from eva_rl.config import EvaluateConfig, Plan, plan
from eva_rl.data import TaskSource, find_sources
from eva_rl.errors import UserError
from eva_rl.files import check_run_folder, make_folder, write_json, write_text
from eva_rl.interface import TaskStatistics
from eva_rl.jobs.playing import Stage
from eva_rl.library.serve import Adapters, adapters_of
from eva_rl.model import find_adapter, load_base, load_base_of, load_notes, policy_in
from eva_rl.model.action_model import ActionModel
from eva_rl.rollout import Episodes, ForJobs, Job, Policy, Simulators, TargetReturn, check_spaces
from eva_rl.run import (
    SCORES,
    Scores,
    Stopwatch,
    TensorBoard,
    check_tracker,
    failures_counted,
    open_tracker,
    save_film,
    save_sweep,
    scores,
    to_json,
    to_scalars,
    versions,
)
from eva_rl.seeding import evaluation_seeds
from eva_rl.table import markdown
from eva_rl.training import check_precision, choose_device, resolved

Place = tuple[str, float]
"""A task, and a return asked for there."""


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate as the settings say, and return the run's folder.

    Raises:
        UserError: for settings that make no sense, before anything is written, and later on for whatever a user
            can mend. Episodes that had ended are kept.
        KeyboardInterrupt: after the episodes that had ended were kept. The message says so.
    """
    asked, clock = asked_for(config), Stopwatch("load", "rollout")
    with clock("load"):
        loaded = load(asked)
    for source in asked.sources:
        if source.interface not in loaded.model.interfaces:
            raise UserError(
                f"The checkpoint '{loaded.name}' knows no interface '{source.interface}': fine-tune it first."
            )
        check_spaces(source.make_env, loaded.model.interfaces[source.interface])
    jobs = jobs_of(asked, loaded)
    write_text(make_folder(asked.run.folder) / "config.yaml", asked.run.yaml)
    with clock("rollout"):
        played = play(asked, loaded, jobs)
    found = scored(asked, jobs, played)
    results = write(asked, loaded, jobs, played, found, clock)
    if played.stopped is not None:
        kept = f"The {len(played.finished)} episodes that had ended are in '{asked.run.folder / 'result.json'}'."
        interrupted = isinstance(played.stopped, KeyboardInterrupt)
        raise KeyboardInterrupt(kept) if interrupted else UserError(f"{played.stopped} {kept}")
    say(asked, found, results, clock)
    return asked.run.folder


@dataclass(frozen=True)
class Asked:
    """What the settings of an evaluation mean."""

    config: EvaluateConfig
    run: Plan
    sources: Sequence[TaskSource]
    target: TargetReturn
    stage: Stage


def asked_for(config: EvaluateConfig) -> Asked:
    """What the settings mean.

    Raises:
        UserError: if they make no sense, alone or together with what is in the run's folder.
    """
    if config.episodes < 1:
        raise UserError(f"episodes must be at least 1, got {config.episodes}.")
    sources, device = find_sources(config.task, config.trust_environment), choose_device(config.device)
    check_precision(config.precision)
    check_tracker(config.tracker)
    target = TargetReturn(config.target_return)
    run = plan(config, "evaluate", config.task)
    check_run_folder(run.folder)
    return Asked(config, run, sources, target, Stage(device, config.precision, config.max_episode_steps))


@dataclass(frozen=True)
class Loaded:
    """A model that acts."""

    name: str
    model: ActionModel
    known: Mapping[str, TaskStatistics]
    """The tasks it was trained on."""
    own: str | None = None
    """The one it was fine-tuned on, if it was."""
    served: Adapters | None = None
    """A library's adapters, one for each task, which act on the model as the base."""


def load(asked: Asked) -> Loaded:
    """The checkpoint, with the adapter in its weights if one was named, or under those of a library.

    Raises:
        UserError: if neither was named, or one can't be loaded.
    """
    config, device = asked.config, asked.stage.device
    if config.library is not None:
        tasks = [source.task for source in asked.sources]
        served = adapters_of(config.library, tasks, config.adapter, config.checkpoint, device)
        return Loaded(config.checkpoint or config.library, served.model, served.known, served=served)
    if config.adapter is None:
        if config.checkpoint is None:
            raise UserError("Nothing to evaluate was named: add checkpoint=... (a base), adapter=... (a run), or both.")
        base = load_base(config.checkpoint, device)
        return Loaded(config.checkpoint, base.model, dict(base.tasks), base.task)
    folder = find_adapter(Path(config.adapter))
    notes = load_notes(folder)
    base = load_base_of(folder, notes, "checkpoint", config.checkpoint, device)
    base.transformer.connect(notes.interface, f"The adapter in '{folder}'")
    model = cast("ActionModel", load_adapter(base.transformer, folder))
    known = dict(base.tasks) | {notes.task: notes.statistics}
    return Loaded(config.checkpoint or notes.base, model, known, notes.task)


def jobs_of(asked: Asked, loaded: Loaded) -> Sequence[Job]:
    """The episodes to play: of each task, for each return asked for, one for each seed."""
    config = asked.config
    return [
        Job(source.task, source.make_env, seed, target)
        for source in asked.sources
        for target in asked.target.wanted(
            source.task, loaded.known.get(source.task), loaded.model.embedder_of(source.interface).tokens
        )
        for seed in evaluation_seeds(source.task, config.seed, config.episodes)
    ]


@dataclass(frozen=True)
class Played:
    """Episodes that ended."""

    finished: Mapping[int, tuple]
    """Return, length and successes, by the numbers of their jobs."""
    stopped: UserError | KeyboardInterrupt | None
    """What cut the others short."""


def play(asked: Asked, loaded: Loaded, jobs: Sequence[Job]) -> Played:
    """Play the episodes, those of one interface together.

    If playing breaks off, the episodes that had ended are kept.
    """
    finished: dict[int, tuple] = {}
    interface_of = {source.task: source.interface for source in asked.sources}
    with Simulators(asked.config.workers) as simulators:
        try:
            for interface in dict.fromkeys(interface_of.values()):
                numbers = [i for i, job in enumerate(jobs) if interface_of[job.task] == interface]
                own, ended = [jobs[i] for i in numbers], {}
                policy = _policies(loaded, interface)
                try:
                    asked.stage.play(loaded.model, interface, own, simulators, asked.config.task, ended, policy)
                finally:
                    finished |= {numbers[i]: row for i, row in ended.items()}
        except (UserError, KeyboardInterrupt) as error:
            return Played(finished, error)
    return Played(finished, None)


def _policies(loaded: Loaded, interface: str) -> ForJobs:
    """Makes the policies of episodes through this interface, each in its own task."""

    def make(jobs: Sequence[Job]) -> Policy:
        return policy_in(loaded.model, interface, [job.task for job in jobs], loaded.own)

    return ForJobs(loaded.served.policy_of if loaded.served else make)


def scored(asked: Asked, jobs: Sequence[Job], played: Played) -> Mapping[Place, Scores]:
    """The scores of the episodes that ended. What a task has is decided over all returns asked for."""
    parts: dict[Place, list[tuple]] = {}
    for i, row in sorted(played.finished.items()):
        parts.setdefault((jobs[i].task, jobs[i].target_return), []).append(row)
    scales = {source.task: source.score_scale for source in asked.sources}
    found = {place: scores(Episodes.of(own), scales[place[0]]) for place, own in parts.items()}
    for task in scales:
        places = [place for place in found if place[0] == task]
        found |= zip(places, failures_counted([found[place] for place in places]), strict=True)
    return found


def write(
    asked: Asked,
    loaded: Loaded,
    jobs: Sequence[Job],
    played: Played,
    found: Mapping[Place, Scores],
    clock: Stopwatch,
) -> Mapping[str, Any]:
    """Write result.json, TensorBoard, and the films if they were asked for.

    Returns:
        The scores by task, as they are written.
    """
    results: dict[str, Any] = {}
    for (task, target), own in found.items():
        results.setdefault(task, []).append({"target_return": target, **to_json(own)})
    sweep = {"evaluation/sweep": save_sweep(asked.run.folder, results)} if asked.target.sweeps else {}
    if not sweep:
        results = {task: own for task, [own] in results.items()}
    write_json(asked.run.folder / "result.json", _result(asked, results, clock, played.stopped is None))
    settings = {name: own for name, own in vars(asked.config).items() if own is not None}
    with open_tracker(asked.config.tracker, asked.run.folder, settings) as tensorboard:
        tensorboard.figures(0, sweep)
        for number, own in enumerate(found.values()):
            tensorboard.log(number, to_scalars(own))
        if asked.config.video and played.stopped is None:
            _film(asked, loaded, jobs, tensorboard)
    return results


def _result(asked: Asked, results: Mapping[str, Any], clock: Stopwatch, complete: bool) -> dict[str, Any]:
    config, stage = asked.config, asked.stage
    return {
        "checkpoint": config.checkpoint,
        "adapter": config.adapter,
        **({} if config.library is None else {"library": config.library}),
        "task": config.task,
        "seed": config.seed,
        "episodes": config.episodes,
        "device": stage.device.type,
        "precision": resolved(stage.precision, stage.device),
        "tasks": results,
        "seconds": clock.rounded(),
        "status": "complete" if complete else "partial",
        "versions": versions(),
    }


def _film(asked: Asked, loaded: Loaded, jobs: Sequence[Job], tensorboard: TensorBoard) -> None:
    """Film each task's first episode."""
    interface_of = {source.task: source.interface for source in asked.sources}
    for job in {job.task: job for job in reversed(jobs)}.values():
        interface = interface_of[job.task]
        frames = asked.stage.film(loaded.model, interface, job, _policies(loaded, interface))
        save_film(asked.run.folder, tensorboard, 0, job.task, job.seed, frames)


def say(asked: Asked, found: Mapping[Place, Scores], results: Mapping[str, Any], clock: Stopwatch) -> None:
    """Print the scores as a table, and their means over the tasks."""
    sweeps = asked.target.sweeps
    rows = [
        (task, *([f"{target:.1f}"] if sweeps else []), *(own[name] for name in SCORES))
        for (task, target), own in found.items()
    ]
    header = ["mean [95 % interval]", *(["asked for"] if sweeps else [])]
    print("\n" + markdown([*header, *(name.replace("_", " ") for name in SCORES)], rows))
    if len(asked.sources) > 1 and not sweeps:
        for name in SCORES:
            means = [result[name]["mean"] for result in results.values() if result[name] is not None]
            if len(means) == len(asked.sources):
                print(f"mean {name.replace('_', ' ')} over {len(means)} tasks: {sum(means) / len(means):.3f}")
    print(f"seconds: {clock}\n{asked.run.folder / 'result.json'}")
