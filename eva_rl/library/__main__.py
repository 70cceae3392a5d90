"""A library of adapters from the command line: `python -m eva_rl.library add|list|which|remove library=LIB ...`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eva_rl.config import entry_point
from eva_rl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from eva_rl.library.index import Library

FOLDER = "eva_rl.configs.library"


@dataclass(frozen=True)
class AddConfig:
    library: str
    run: str
    name: str | None
    dataset: str | None
    sketch: bool
    base: str | None


@dataclass(frozen=True)
class ListConfig:
    library: str


@dataclass(frozen=True)
class RemoveConfig:
    library: str
    name: str


@dataclass(frozen=True)
class WhichConfig:
    library: str
    task: str
    dataset: str | None
    demonstrations: int
    transitions: int | None
    seed: int
    base: str | None

    def __post_init__(self) -> None:
        for name in ("demonstrations", "transitions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")


@entry_point(AddConfig, "add", FOLDER)
def add(config: AddConfig) -> None:
    from eva_rl.library.index import Library

    library = Library(config.library, config.base)
    entry = library.add(config.run, config.name, dataset=config.dataset, sketch=config.sketch)
    print(f"{entry.name}: {entry.task}, added to {config.library}, which now holds {len(library)}")
    if config.sketch and not entry.sketch:
        print("The base has no embedder for this task's observations: `which` can't find this adapter.")


@entry_point(ListConfig, "list", FOLDER)
def show(config: ListConfig) -> None:
    from eva_rl.table import markdown

    library = _existing(config.library)
    header = ["name", "task", "method", "demonstrations", "success rate", "episode return", "found by which"]
    rows = [
        (
            entry.name,
            entry.task,
            entry.method,
            entry.demonstrations,
            entry.success_rate,
            entry.episode_return,
            "yes" if entry.sketch else "no",
        )
        for entry in library.entries
    ]
    print(markdown(header, rows))


@entry_point(RemoveConfig, "remove", FOLDER)
def remove(config: RemoveConfig) -> None:
    library = _existing(config.library)
    library.remove(config.name)
    print(f"{config.name}: removed from {config.library}, which now holds {len(library)}")


@entry_point(WhichConfig, "which", FOLDER)
def which(config: WhichConfig) -> None:
    from eva_rl.data import find_source, load_dataset

    library = _existing(config.library, config.base)
    source = find_source(config.task, config.dataset)
    dataset_id = source.dataset(config.demonstrations, config.seed)
    trajectories = load_dataset(dataset_id, config.task, config.demonstrations)
    ranking = library.which(trajectories, config.transitions)
    for match in ranking.matches:
        print(f"{match.name:<32} {match.share:6.3f} [{match.low:.3f}, {match.high:.3f}]  {match.task}")
    fits = "none fits" if ranking.best is None else f"{ranking.best.name} fits"
    print(f"{fits}: from {ranking.threshold:.3f} on an adapter does, by {ranking.observations} transitions")


def _existing(folder: str, base: str | None = None) -> Library:
    from eva_rl.library.index import INDEX, Library

    if not (Path(folder) / INDEX).is_file():
        raise UserError(f"'{folder}' is no library (there is no {INDEX} in it): `add` makes one.")
    return Library(folder, base)


VERBS = {"add": add, "list": show, "which": which, "remove": remove}


def main() -> None:
    """Run the verb that the command line begins with, with the rest as its settings.

    Raises:
        SystemExit: if it begins with none.
    """
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("-h", "--help"):
        print(
            "python -m eva_rl.library "
            + "|".join(VERBS)
            + " library=LIB ...; after one of these words, --help lists its settings."
        )
        return
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS)
        sys.exit(f"error: python -m eva_rl.library has no '{verb}'. {hint}")
    del sys.argv[1]
    VERBS[verb]()


if __name__ == "__main__":
    main()
