"""Which of fifty tasks do these observations come from? Right answers against the number of transitions.

    python -m benchmarks.which

Each of Meta-World's fifty tasks is sketched from its first demonstrations (20, or 1), as a library does when an adapter
is added. Nothing is fine-tuned. Runs of 1, 10, 50 and 200 neighbouring steps of other episodes are then to be told
apart:

- share: what `Library.which` ranks by, the share of activations that a task's mean and components explain.
- nearest mean: the same without components.
- nearest mean of observations: of the normalised observations themselves.

"None fits" has a library of every other task, with runs of its own tasks and of the tasks it does not have. The
threshold is the library's own, from observations that its sketches have not seen. The command needs the datasets that
`python -m eva_rl.finetune` and `pretrain` collect (200 episodes of the base's forty tasks, 40 of the others).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import eva_rl
from benchmarks.eva_init import RESULTS
from eva_rl.batch import Batch
from eva_rl.data import Trajectories, load_dataset
from eva_rl.envs import expand_tasks, splits
from eva_rl.files import replacing, write_text
from eva_rl.library.sketch import Sketch, activations, make_sketch
from eva_rl.library.which import Distances, calibrate, distances, losses
from eva_rl.model import load_base
from eva_rl.run import versions
from eva_rl.table import markdown

BASE, INTERFACE = "mt40-small", "metaworld"
DEMONSTRATIONS = (20, 1)
EPISODES = (20, 25)
"""The episodes that runs are taken from, which no sketch has seen."""
TRANSITIONS = (1, 10, 50, 200)
RUNS = 20
"""Of each task and number of transitions."""
LOSS_RUNS = 4
"""Of each episode, where losses are compared too: those take as many forward passes as there are adapters."""
RIVALS = ("share", "nearest mean", "nearest mean of observations")


def trajectories_of(task: str) -> Trajectories:
    collected = 200 if task in splits()["metaworld/mt40"] else 40
    return load_dataset(f"{task}/expert-{collected}-seed0-v0", task, EPISODES[-1] + 1)


def first_episodes(whole: Trajectories, count: int) -> Trajectories:
    rows = int(whole.starts[count])
    fields = ("observations", "actions", "rewards", "returns_to_go")
    cut = {name: getattr(whole, name)[:rows] for name in fields}
    return replace(whole, **cut, starts=whole.starts[: count + 1], successes=None, labels=None)


def observations_only(sketches: Sequence[Trajectories], normalise: torch.nn.Module) -> list[Sketch]:
    """Sketches of one layer, the normalised observations, without components."""
    means = [normalise.normalize_observations(own.observations).mean(0) for own in sketches]
    return [
        Sketch({"x": m}, {"x": torch.zeros(0, len(m))}, {"x": torch.zeros(0)}, {"x": torch.zeros(())}, m[None])
        for m in means
    ]


def without_components(sketch: Sketch) -> Sketch:
    return replace(sketch, components={name: own[:0] for name, own in sketch.components.items()})


def runs(sizes: Sequence[Sequence[int]], count: int) -> list[tuple[int, slice]]:
    """(task, rows) of runs of so many steps within an episode, evenly spread.

    The tasks' rows stand one after the other.
    """
    found, first = [], 0
    for task, episodes in enumerate(sizes):
        starts = []
        for size in episodes:
            last = max(size - count, 0)
            starts += [(first + int(s), min(count, size)) for s in np.linspace(0, last, RUNS // len(episodes))]
            first += size
        found += [(task, slice(start, start + length)) for start, length in dict.fromkeys(starts)]
    return found


def shares(found: Distances, part: slice) -> Tensor:
    return Distances(found.errors[..., part], found.spread[..., part]).shares()


def accuracy(found: Distances, chosen: Sequence[tuple[int, slice]]) -> float:
    return float(np.mean([int(shares(found, part).argmax()) == task for task, part in chosen]))


def fits(found: Distances, chosen: Sequence[tuple[int, slice]], threshold: float) -> tuple[float, float]:
    """Of a library of every other task: the share of runs of its tasks that are found and fit, and of other tasks' runs that none fits."""
    known, unknown = [], []
    for task, part in chosen:
        own = shares(found, part)
        if task % 2 == 0:
            known.append(int(own.argmax()) == task // 2 and float(own.max()) >= threshold)
        else:
            unknown.append(float(own.max()) < threshold)
    return float(np.mean(known)), float(np.mean(unknown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--library", help="of adapters of CW10: compare with the choice by their losses, and nothing else"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.library:
        return by_loss(eva_rl.Library(arguments.library))
    base = load_base(BASE)
    model, tasks = base.model.requires_grad_(False), expand_tasks("metaworld/mt50")
    whole = [trajectories_of(task) for task in tqdm(tasks, "read")]
    queries = [[own.observations[own.starts[e] : own.starts[e + 1]] for e in EPISODES] for own in whole]
    sizes = [[len(part) for part in parts] for parts in queries]
    asked = torch.cat([part for parts in queries for part in parts])
    embedder, rows, rejected = model.embedders[INTERFACE], [], []
    curves: dict[str, list[float]] = {}
    for demonstrations in DEMONSTRATIONS:
        own = [first_episodes(t, demonstrations) for t in whole]
        sketches = [make_sketch(model, INTERFACE, t) for t in tqdm(own, f"sketch {demonstrations}")]
        seen = activations(model, INTERFACE, asked, list(sketches[0].means))
        plain = observations_only(own, embedder)
        rivals = dict(
            zip(
                RIVALS,
                (
                    distances(sketches, seen),
                    distances([without_components(s) for s in sketches], seen),
                    distances(plain, {"x": embedder.normalize_observations(asked)}),
                ),
                strict=True,
            )
        )
        for name, found in rivals.items():
            right = [accuracy(found, runs(sizes, count)) for count in TRANSITIONS]
            curves[f"{name}, {demonstrations} demonstrations"] = right
            rows.append((demonstrations, name, *(f"{value:.3f}" for value in right)))
        layers = list(sketches[0].means)
        kept = [activations(model, INTERFACE, s.observations, layers) for s in sketches[::2]]
        half = distances(sketches[::2], seen)
        for count in TRANSITIONS:
            threshold, _ = calibrate(sketches[::2], kept, count)
            told = threshold, *fits(half, runs(sizes, count), threshold)
            rejected.append((demonstrations, count, *(f"{value:.3f}" for value in told)))
    write(rows, rejected, curves)


def by_loss(library: eva_rl.Library) -> None:
    """Right answers of a library's own tasks, by the share and by the loss of each adapter on the same windows."""
    entries, context = library.entries, library.base.model.config.context
    whole = [trajectories_of(entry.task) for entry in entries]
    rows = []
    for count in TRANSITIONS:
        asked = [
            (task, slice(int(own.starts[e]) + start, int(own.starts[e]) + start + count))
            for task, own in enumerate(whole)
            for e in EPISODES
            for start in np.linspace(0, 200 - count, LOSS_RUNS, dtype=int)[: 1 if count == 200 else None]
        ]
        found = losses(
            library, [e.name for e in entries], [windows(whole[task], part, context) for task, part in asked]
        )
        chosen = [library.which(whole[task].observations[part].numpy()).matches[0].name for task, part in asked]
        by_share = np.mean([name == entries[task].name for name, (task, _) in zip(chosen, asked, strict=True)])
        by_losses = np.mean([int(best) == task for best, (task, _) in zip(found.argmin(0), asked, strict=True)])
        rows.append((count, len(asked), f"{by_share:.3f}", f"{by_losses:.3f}"))
    demonstrations = sorted({entry.demonstrations for entry in entries})
    text = [
        "# By activations or by losses?",
        f"`python -m benchmarks.which --library LIB`: {len(entries)} adapters of tasks the base has not seen, trained on "
        f"{', '.join(map(str, demonstrations))} demonstrations each. Right answers:",
        markdown(["transitions", "runs", "share", "least loss"], rows),
    ]
    write_text(RESULTS / "which_losses.md", "\n\n".join(text) + "\n")
    print(text[-1])


def windows(own: Trajectories, part: slice, context: int) -> Batch:
    """The steps as windows of `context`, the last one padded."""
    count = part.stop - part.start
    spare = -count % min(context, count)
    width = min(context, count)

    def cut(values: Tensor) -> Tensor:
        rows = torch.cat([values[part], torch.zeros_like(values[:spare])])
        return rows.view(-1, width, *values.shape[1:])

    mask = cut(torch.ones(len(own.rewards))) > 0
    return Batch(cut(own.observations), cut(own.actions), cut(own.returns_to_go), cut(own.rewards), mask, INTERFACE)


def write(rows: Sequence[tuple], rejected: Sequence[tuple], curves: Mapping[str, Sequence[float]]) -> None:
    """The tables and the picture."""
    text = [
        "# Which of fifty tasks?",
        "`python -m benchmarks.which` (the file says what is compared). Right answers of fifty tasks, by transitions looked at:",
        markdown(["demonstrations", "choice", *map(str, TRANSITIONS)], rows),
        "![right answers by transitions](which.png)",
        "None fits: a library of every other task; a run of its own tasks counts where the right adapter is first and fits, one of "
        "the others where none does.",
        markdown(["demonstrations", "transitions", "threshold", "known found", "unknown rejected"], rejected),
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions().items())}.",
    ]
    write_text(RESULTS / "which.md", "\n\n".join(text) + "\n")
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, right in curves.items():
        style = "-o" if name.startswith("share") else "--s" if "observations" in name else ":^"
        axes.plot(TRANSITIONS, right, style, label=name, markersize=4)
    axes.set(
        xscale="log", xticks=TRANSITIONS, xticklabels=TRANSITIONS, xlabel="transitions", ylabel="right of 50 tasks"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    with replacing(RESULTS / "which.png") as temporary:
        temporary.write_bytes(picture.getvalue())
    print(text[2], text[5], sep="\n\n")


if __name__ == "__main__":
    main()
