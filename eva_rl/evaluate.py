"""A checkpoint, with or without an adapter, in a task or a split: `python -m eva_rl.evaluate checkpoint=... task=...`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from eva_rl.config import EvaluateConfig, entry_point, run_folder, to_yaml
from eva_rl.errors import UserError


@entry_point(EvaluateConfig, "evaluate", "eva_rl.configs.evaluate")
def main(config: EvaluateConfig) -> None:
    from eva_rl.adapter import load_adapter
    from eva_rl.data import find_sources
    from eva_rl.files import check_run_folder, make_folder, write_json, write_text
    from eva_rl.library.serve import adapters_of
    from eva_rl.model import find_adapter, load_base, load_base_of, load_notes, policy_of
    from eva_rl.report import (
        SCORES,
        Stopwatch,
        TensorBoard,
        failures_counted,
        markdown,
        save_film,
        save_sweep,
        scores,
        to_json,
        to_scalars,
        versions,
    )
    from eva_rl.rollout import Episodes, ForJobs, Job, Simulators, TargetReturn, check_spaces, film, rollout
    from eva_rl.seeding import evaluation_seeds
    from eva_rl.training import autocast, check_precision, choose_device, resolved

    if config.episodes < 1:
        raise UserError(f"episodes={config.episodes} was given where at least 1 was expected.")
    sources = find_sources(config.task, config.trust_environment)
    device, clock = choose_device(config.device), Stopwatch("load", "rollout")

    check_precision(config.precision)
    asked = TargetReturn(config.target_return)
    run_dir = run_folder(config.run_dir, "evaluate", config.task)
    check_run_folder(run_dir)

    with clock("load"):
        folder, notes, served = None, None, None
        if config.library is not None:
            served = adapters_of(
                config.library, [source.task for source in sources], config.adapter, config.checkpoint, device
            )
        elif config.adapter is not None:
            folder = find_adapter(Path(config.adapter))
            notes = load_notes(folder)
            base = load_base_of(folder, notes, "checkpoint", config.checkpoint, device)
        elif config.checkpoint is not None:
            base = load_base(config.checkpoint, device)
        else:
            raise UserError("Nothing to evaluate was named: add checkpoint=... (a base), adapter=... (a run), or both.")
        name = config.checkpoint or (notes.base if notes else config.library)
        model, known = (base.model, dict(base.tasks)) if served is None else (served.model, served.known)
        if notes is not None:
            model.connect(notes.interface, f"The adapter in '{folder}'")
            model = load_adapter(model, folder)
            known[notes.task] = notes.statistics
    for source in sources:
        if source.interface not in model.interfaces:
            raise UserError(f"The checkpoint '{name}' knows no interface '{source.interface}': fine-tune it first.")
        check_spaces(source.make_env, model.interfaces[source.interface])

    jobs = [
        Job(source.task, source.make_env, seed, target)
        for source in sources
        for target in asked.wanted(source.task, known.get(source.task), model.embedders[source.interface].tokens)
        for seed in evaluation_seeds(source.task, config.seed, config.episodes)
    ]
    write_text(make_folder(run_dir) / "config.yaml", to_yaml(config))
    computed = {"device": device.type, "precision": resolved(config.precision, device)}
    interface_of = {source.task: source.interface for source in sources}
    finished, stopped = {}, None
    with clock("rollout"), Simulators(config.workers) as simulators, autocast(config.precision, device):
        try:
            for interface in dict.fromkeys(interface_of.values()):
                numbers, ended = [i for i, job in enumerate(jobs) if interface_of[job.task] == interface], {}
                own, policy = [jobs[i] for i in numbers], policy_of(model, interface)
                policy = policy if served is None else ForJobs(served.policy_of)
                try:
                    rollout(
                        policy,
                        model.interfaces[interface],
                        own,
                        simulators,
                        device,
                        config.task,
                        ended,
                        config.max_episode_steps,
                    )
                finally:
                    finished |= {numbers[i]: row for i, row in ended.items()}
        except (UserError, KeyboardInterrupt) as error:
            stopped = error
    parts = {}  # by task and return asked for
    for i, row in sorted(finished.items()):
        parts.setdefault((jobs[i].task, jobs[i].target_return), []).append(row)
    scales = {source.task: source.score_scale for source in sources}
    played = {place: scores(Episodes.of(own), scales[place[0]]) for place, own in parts.items()}
    for task in scales:  # over all returns asked for
        places = [place for place in played if place[0] == task]
        played |= zip(places, failures_counted([played[place] for place in places]), strict=True)
    results, rows = {}, []
    with TensorBoard(run_dir) as tensorboard:
        for number, ((task, target), found) in enumerate(played.items()):
            tensorboard.log(number, to_scalars(found))
            results.setdefault(task, []).append({"target_return": target, **to_json(found)})
            rows.append((task, *([f"{target:.1f}"] if asked.sweeps else []), *(found[name] for name in SCORES)))
        if asked.sweeps:
            tensorboard.figures(0, {"evaluation/sweep": save_sweep(run_dir, results)})
        else:
            results = {task: found for task, [found] in results.items()}
        write_json(run_dir / "result.json", _result(config, computed, results, clock, stopped is None, versions()))
        for job in {job.task: job for job in reversed(jobs)}.values() if config.video and stopped is None else ():
            interface = interface_of[job.task]
            with autocast(config.precision, device):
                policy = policy_of(model, interface) if served is None else partial(served.alone, job.task)
                frames = film(policy, model.interfaces[interface], job, device, config.max_episode_steps)
            save_film(run_dir, tensorboard, 0, job.task, job.seed, frames)
    if stopped is not None:
        kept = f"The {len(finished)} episodes that had ended are in '{run_dir / 'result.json'}'."
        raise KeyboardInterrupt(kept) if isinstance(stopped, KeyboardInterrupt) else UserError(f"{stopped} {kept}")
    header = ["mean [95 % interval]", *(["asked for"] if asked.sweeps else [])]
    print("\n" + markdown([*header, *(name.replace("_", " ") for name in SCORES)], rows))
    if len(sources) > 1 and not asked.sweeps:
        for name in SCORES:
            means = [result[name]["mean"] for result in results.values() if result[name] is not None]
            if len(means) == len(sources):
                print(f"mean {name.replace('_', ' ')} over {len(means)} tasks: {sum(means) / len(means):.3f}")
    print(f"seconds: {clock}\n{run_dir / 'result.json'}")


def _result(
    config: EvaluateConfig, computed: dict, results: dict, clock: object, complete: bool, versions: dict
) -> dict:
    return {
        "checkpoint": config.checkpoint,
        "adapter": config.adapter,
        **({} if config.library is None else {"library": config.library}),
        "task": config.task,
        "seed": config.seed,
        "episodes": config.episodes,
        **computed,
        "tasks": results,
        "seconds": clock.rounded(),
        "status": "complete" if complete else "partial",
        "versions": versions,
    }


if __name__ == "__main__":
    main()
