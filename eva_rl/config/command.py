"""A function of settings -> a command: its help, its grid, and one sentence for every mistake."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from eva_rl.config.compose import choices
from eva_rl.config.foreign import check_config_folders
from eva_rl.config.grids import GRID, checked, with_tasks_listed
from eva_rl.config.mistakes import explain, mistake, of_plugin
from eva_rl.config.parse import parse
from eva_rl.errors import UserError, while_read
from eva_rl.settings import CollectConfig, FinetuneConfig, PretrainConfig


def entry_point(
    schema: type,
    name: str,
    folder: str = "eva_rl.configs",
    splits: Callable[[], Mapping[str, Sequence[str]]] = dict,
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make `main(config: schema)` a command that reads `configs/<name>.yaml` and the command line.

    splits: the tasks that a word after `task=` stands for in a grid, each a run of its own.

    A `UserError`, a misspelt key, a wrong value or a launcher that fails ends the process with one sentence on stderr and
    status 1. Ctrl-C ends it with status 130. Anything else is a bug and keeps its traceback.
    """
    return lambda main: _Command(main, schema, name, folder, splits).run


@dataclass
class _Command:
    main: Callable[[Any], None]
    schema: type
    name: str
    folder: str
    splits: Callable[[], Mapping[str, Sequence[str]]]
    composed: bool = False
    """Whether Hydra is done: an error is then no longer one of its own."""

    def run(self) -> None:
        """Read the command line, and call `main` with what it says, in a grid several times."""
        for group in (word.removesuffix("=?") for word in sys.argv[1:] if word.endswith("=?")):
            with while_read():
                return print(choices(group, self.name))
        try:
            check_config_folders(sys.argv[1:])
        except UserError as error:
            sys.exit(f"error: {error}")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # whatever it was: exceptions reach us, where Hydra would print and exit
        if in_grid := any(word.startswith(GRID) for word in sys.argv[1:]):
            sys.argv[1:] = [with_tasks_listed(word, self.splits) for word in sys.argv[1:]]
        try:
            with while_read():
                hydra.main(version_base="1.3", config_path=f"pkg://{self.folder}", config_name=self.name)(self.task)()
        except ValueError as error:  # Hydra's answer to `model=3`
            if self.composed:
                raise
            sys.exit(f"error: {' '.join(sys.argv[1:])}: {explain(error, self.schema)}")
        except Exception as error:
            if not (said := mistake(error, self.schema) or of_plugin(error)):
                raise
            sys.exit(f"error: {said}")
        except KeyboardInterrupt as interruption:
            self._interrupted(str(interruption), in_grid)

    def task(self, config: DictConfig) -> None:
        """Do one run. Hydra calls this with what it composed."""
        self.composed = True
        in_grid = HydraConfig.get().mode == RunMode.MULTIRUN
        if in_grid:  # a launcher's own would be unknown to processes started here
            multiprocessing.set_start_method("spawn", force=True)
        try:  # here, because Hydra prints a line of its own for an exception that leaves the job
            with while_read():
                self.main(checked(parse(config, self.schema)))
        except Exception as error:
            said = mistake(error, self.schema)
            if in_grid:  # its other runs go on
                given = " ".join(HydraConfig.get().overrides.task)
                said = f"error: {said}" if said else traceback.format_exc().rstrip()
                print(f"{said} ({given})", file=sys.stderr, flush=True)
                raise UserError("Not all runs of the grid ended well; those that did keep their results.") from None
            if not said:
                raise
            sys.exit(f"error: {said}")

    def _interrupted(self, kept: str, in_grid: bool) -> NoReturn:
        """Say what Ctrl-C left, and how to go on."""
        if not kept and self.schema in (CollectConfig, PretrainConfig, FinetuneConfig):
            kept = "Collected episodes are kept."
        if self.schema is FinetuneConfig and in_grid:
            kept += " The same command goes on, with resume=true if it has a run_dir."
        elif "resume" in get_type_hints(self.schema):
            kept += " A run continues with its run_dir and resume=true."
        print(f"\nInterrupted. {kept}".rstrip(), file=sys.stderr)
        sys.exit(130)
