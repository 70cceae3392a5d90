"""The folder: adapters of one base, and `library.json`, which says what they are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from eva_rl.errors import UserError, did_you_mean, in_one_line
from eva_rl.files import from_json, make_folder, read_json, replacing, write_json
from eva_rl.model import NOTES, AdapterNotes, Base, base_name, find_adapter, load_base, load_base_of, load_notes
from eva_rl.run import Estimate, RunResult
from eva_rl.settings import checked_filter

if TYPE_CHECKING:
    import numpy as np

    from eva_rl.adapter.starts import Start
    from eva_rl.data import Trajectories
    from eva_rl.library.serve import LibraryPolicy
    from eva_rl.library.sketch import Sketch
    from eva_rl.library.which import Ranking

INDEX = "library.json"
FORMAT = "eva_rl.library.1"
SKETCH = "sketch.safetensors"
FILES = ("adapter_config.json", "adapter_model.safetensors", NOTES)
"""What an adapter's folder must hold, and all that is taken from it."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SHOWN = ("success_rate", "episode_return", "normalized_score")
"""The scores of a run that the index repeats."""
WAIT = 60.0
"""Seconds that one process waits for another that changes the library."""


@dataclass(frozen=True)
class Entry:
    """One adapter of a library."""

    name: str
    task: str
    method: str | None
    """The run's `adapter`, or None where no run's result was beside the adapter."""
    demonstrations: int
    """Trajectories it was trained on."""
    sketch: bool
    """Whether it can be found by `which`."""
    success_rate: Estimate | None = None
    episode_return: Estimate | None = None
    normalized_score: Estimate | None = None


@dataclass(frozen=True)
class Index:
    """What `library.json` holds.

    A folder that it does not name is no part of the library.
    """

    format: str
    base: str
    base_sha256: str
    entries: tuple[Entry, ...]


class Library:
    """Adapters of one base in one folder.

    Every adapter is a folder in peft's format, with a sketch of the base's activations on its task. `library.json`
    names them. An adapter's folder is renamed into its place before it is named there, so that a process that is
    killed leaves a library that opens. Processes that change the library wait for each other.

    Args:
        folder: the library's, which is made when the first adapter is added.
        base: where the base is now, if it was moved.

    Raises:
        UserError: if the folder holds something else, or a damaged library.
    """

    def __init__(self, folder: str | Path, base: str | None = None):
        self.folder, self._given_base = Path(folder), base
        self.calibrations: dict[tuple, tuple[float, list[float]]] = {}
        """What `which` has found of itself, by adapters and number of observations.
        See `eva_rl.library.which.calibrate`."""
        if self.folder.is_file():
            raise UserError(f"A library must be a folder, got the file '{folder}'.")
        if self.folder.exists():
            held = [path.name for path in self.folder.iterdir()]  # once: another process may be adding the first
            others = [name for name in held if name != "adapters" and not name.startswith(".")]
            if others and INDEX not in held:
                raise UserError(
                    f"'{folder}' holds '{min(others)}' and no {INDEX}: name the folder of a library, or a new one."
                )
        self._index()

    def _index(self) -> Index | None:
        """What is on disk at present, or None before the first adapter."""
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            index = from_json(Index, read_json(path))
        except TypeError as error:
            raise UserError(f"'{path}' is no index of a library ({in_one_line(error)}).") from error
        if index.format != FORMAT:
            raise UserError(f"The format of '{path}' must be '{FORMAT}', got '{index.format}'.")
        if wrong := next((entry.name for entry in index.entries if not NAME.fullmatch(entry.name)), None):
            raise UserError(f"'{path}' names an adapter '{wrong[:100]}', which is no name of one.")
        return index

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The adapters, by name, including what other processes have added since."""
        index = self._index()
        return () if index is None else tuple(sorted(index.entries, key=lambda entry: entry.name))

    def __getitem__(self, name: str) -> Entry:
        """The adapter of this name.

        Raises:
            UserError: if there is none.
        """
        entries = {entry.name: entry for entry in self.entries}
        if name not in entries:
            raise UserError(f"'{self.folder}' holds no adapter '{name}'. {did_you_mean(name, entries)}".rstrip())
        return entries[name]

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, name: str) -> Path:
        """The folder of an adapter, as `evaluate adapter=` and `eva_rl.load_policy` take it."""
        return self.folder / "adapters" / self[name].name

    @cached_property
    def base(self) -> Base:
        """The base of all adapters, frozen.

        Raises:
            UserError: if the library is empty, or the base is not where it was, or another.
        """
        index = self._index()
        if index is None:
            raise UserError(f"'{self.folder}' holds no adapter: add one first.")
        base = load_base(self._given_base or index.base)
        if base.sha256 != index.base_sha256:
            raise UserError(
                f"The adapters of '{self.folder}' belong to the base '{index.base}', and '{base.path}' holds other weights: name theirs "
                "with base=..."
            )
        base.model.requires_grad_(False)
        return base

    def add(
        self,
        run: str | Path,
        name: str | None = None,
        trajectories: Trajectories | None = None,
        dataset: str | None = None,
        sketch: bool = True,
    ) -> Entry:
        """Copy a finished run's adapter into the library, and sketch its task.

        Args:
            run: a fine-tuning run's folder, or an adapter's.
            name: what to call it. By default, the last part of its task's name.
            trajectories: its demonstrations. By default, those of `dataset`.
            dataset: the Minari id of its demonstrations. By default, the one that the run's result names.
            sketch: whether to sketch the task. Without a sketch, `which` will not find the adapter, and no
                demonstrations are needed.

        Raises:
            UserError: if there is no whole adapter, it belongs to another base, the name is taken, or its
                demonstrations are missing.
        """
        from eva_rl.adapter.safe import check_adapter_config

        folder = find_adapter(Path(run))
        notes, result = load_notes(folder), _result_of(folder)
        if missing := next((file for file in FILES if not (folder / file).is_file()), None):
            raise UserError(f"The adapter in '{folder}' has no {missing}: train it again.")
        check_adapter_config(folder)
        name = notes.task.rpartition("/")[2] if name is None else name
        if not NAME.fullmatch(name):
            raise UserError(f"name must be letters, digits, dots, dashes and underscores, got {name}.")
        self._check_new(name, notes, folder)
        made = self._sketch(notes, folder, result, trajectories, dataset) if sketch else None
        entry = Entry(
            name=name,
            task=notes.task,
            method=None if result is None else result.adapter,
            demonstrations=notes.statistics.episodes,
            sketch=made is not None,
            **{name: None if result is None else result.scores[name] for name in SHOWN},
        )
        with self._alone():
            self._check_new(name, notes, folder)  # another process may have been faster
            self._write(entry, notes, folder, made)
        return entry

    def _write(self, entry: Entry, notes: AdapterNotes, folder: Path, sketch: Sketch | None) -> None:
        from safetensors.torch import save_file

        with replacing(self.folder / "adapters" / entry.name) as temporary:
            temporary.mkdir()
            for file in FILES:
                shutil.copy(folder / file, temporary / file)
            if sketch is not None:
                save_file(sketch.tensors(), temporary / SKETCH)
        index = self._index()
        if index is None or not index.entries:
            index = Index(FORMAT, base_name(notes.base), notes.base_sha256, ())
            vars(self).pop("base", None)
        write_json(self.folder / INDEX, asdict(replace(index, entries=(*index.entries, entry))))

    def remove(self, name: str) -> None:
        """Take an adapter out of the library.

        Raises:
            UserError: if there is none of this name.
        """
        with self._alone():
            entry, index = self[name], self._index()
            assert index is not None  # it names this adapter
            rest = tuple(other for other in index.entries if other.name != entry.name)
            write_json(self.folder / INDEX, asdict(replace(index, entries=rest)))
            shutil.rmtree(self.folder / "adapters" / entry.name, ignore_errors=True)

    def which(
        self,
        data: Trajectories | np.ndarray | Mapping[str, Any] | tuple,
        transitions: int | None = None,
        interface: str | None = None,
    ) -> Ranking:
        """Which adapter is for the task that the data come from (see `eva_rl.library.which.rank`).

        Args:
            data: trajectories, or observations as the environment gives them, with a leading axis of n, in any order.
            transitions: how many to look at, from the first on. By default, all. Of more than 2000, only 2000 are
                looked at, evenly spread.
            interface: the name of the one that the adapters act through. By default, the first that has such
                observations.

        Raises:
            UserError: if no adapter has a sketch, or none of those reads such observations.
        """
        from eva_rl.library.which import rank

        return rank(self, data, transitions, interface)

    def start(
        self, data: Trajectories | np.ndarray | Mapping[str, Any] | tuple, nearest: int = 1, combination: str = "cat"
    ) -> Start:
        """A start for `eva_rl.adapter.attach`.

        The new adapter begins as the nearest one, or as a sum weighted by the shares.

        Args:
            data: of the new task, as `which` takes it.
            nearest: how many adapters are combined.
            combination: see `eva_rl.adapter.combine.start_from`.

        Raises:
            UserError: as in `which`, or if `nearest` is not from 1 to the number of adapters with a sketch that are
                plain LoRA.
        """
        from eva_rl.adapter.combine import start_from
        from eva_rl.adapter.factors import plain_lora

        matches = [match for match in self.which(data).matches if plain_lora(self.path(match.name))]
        if not matches:
            raise UserError(f"'{self.folder}' holds no plain LoRA with a sketch, which alone can be a start.")
        if not 1 <= nearest <= len(matches):
            raise UserError(f"nearest must be a number from 1 to {len(matches)}, got {nearest}.")
        shares = [max(match.share, 0.0) for match in matches[:nearest]]
        weights = [share / sum(shares) for share in shares] if sum(shares) else [1 / nearest] * nearest
        return start_from([self.path(match.name) for match in matches[:nearest]], weights, combination)

    def policy(self, names: tuple[str, ...] | list[str] | None = None, device: str = "cpu") -> LibraryPolicy:
        """A policy that acts with any of these adapters (None: all of the library), a name in each call of `act`.

        Raises:
            UserError: see `eva_rl.library.serve.Adapters`.
        """
        from eva_rl.library.serve import LibraryPolicy

        return LibraryPolicy.of(self, names, device)

    def _check_new(self, name: str, notes: AdapterNotes, folder: Path) -> None:
        index = self._index()
        if index is None or not index.entries:  # an empty library takes any base
            return
        if notes.base_sha256 != index.base_sha256:
            raise UserError(
                f"The adapter in '{folder}' belongs to the base '{notes.base}' (weights {notes.base_sha256[:8]}), and those of "
                f"'{self.folder}' to '{index.base}' ({index.base_sha256[:8]}): add it to a library of its own base."
            )
        if any(entry.name == name for entry in index.entries):
            raise UserError(f"'{self.folder}' holds an adapter '{name}' already: remove it first, or set another name.")

    def _sketch(
        self,
        notes: AdapterNotes,
        folder: Path,
        result: RunResult | None,
        trajectories: Trajectories | None,
        dataset: str | None,
    ) -> Sketch | None:
        """The adapter's sketch, or None for observations that the base has no embedder for."""
        from eva_rl.data import load_dataset
        from eva_rl.library.sketch import make_sketch

        base = load_base_of(folder, notes, "base", self._given_base)
        if notes.interface.name not in base.model.interfaces:
            return None
        if trajectories is None:
            if result is not None and dataset in (None, result.dataset):  # those that the run learned from
                filter = checked_filter(result.settings.get("filter", "all"))
                trajectories = load_dataset(result.dataset, notes.task, result.demonstrations).chosen(filter)
            elif dataset is not None:
                trajectories = load_dataset(dataset, notes.task).successful()
            else:
                raise UserError(
                    f"No demonstrations are known of the adapter in '{folder}': name them with dataset=..., or set sketch=false."
                )
        return make_sketch(base.transformer, notes.interface.name, trajectories)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for other processes that change the library, and keep them out."""
        make_folder(self.folder)
        lock = FileLock(self.folder / ".lock", timeout=WAIT)  # never removed: who waits has this file open
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"Another process has been changing '{self.folder}' for {WAIT:.0f} seconds: try again later."
            ) from error
        try:
            yield
        finally:
            lock.release()


def _result_of(folder: Path) -> RunResult | None:
    """The result of the run that the adapter's folder stands in, or None where it stands alone.

    Raises:
        UserError: if the run has not ended, or its result is damaged.
    """
    path = folder.parent / "result.json"
    if folder.name != "adapter" or not path.is_file():
        return None
    try:
        result = RunResult.from_json(read_json(path))
    except TypeError as error:
        raise UserError(f"The run's {path} is damaged ({in_one_line(error)}).") from error
    if result.status != "complete":
        raise UserError(f"The run in '{folder.parent}' has not ended: let it finish, or name its adapter alone.")
    return result
