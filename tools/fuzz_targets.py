"""What is fuzzed: how a whole input of each kind is made, and how it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.errors import UserError
from tools.fuzz_logs import MAKERS, use_logs


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    make: Callable[[Path], None]
    """Writes a whole one as this folder."""
    use: Callable[[Any], object]
    """Uses a folder, or words of a command line."""
    words: Callable[[np.random.Generator], list[str]] | None = None
    """Draws a command line, where the input is one."""


def _model() -> Any:
    import torch

    from eva_rl.interface import Interface
    from eva_rl.model import DecisionTransformer, ModelConfig

    torch.manual_seed(0)
    torch.set_num_threads(1)
    arm = Interface("arm", 3, "continuous", 2, (0.0,) * 3, (1.0,) * 3, (0.0,) * 2, (1.0,) * 2, 1.0, 1.0)
    config = ModelConfig(layers=1, heads=2, width=16, context=4, dropout=0.0, tokens=("return", "state", "action"))
    return DecisionTransformer(config, [arm])


def _batch(number: int = 0) -> Any:
    import torch

    from eva_rl.batch import Batch

    generator = torch.Generator().manual_seed(number)
    observations = torch.randn(2, 4, 3, generator=generator)
    zeros = torch.zeros(2, 4)
    return Batch(observations, observations[..., :2], zeros, zeros, torch.ones(2, 4, dtype=torch.bool), "arm")


def _statistics() -> Any:
    from eva_rl.interface import TaskStatistics

    return TaskStatistics(4, 2.0, 1.0, 0.5, tuple(np.linspace(0, 2, 11).tolist()), 2.0)


def make_checkpoint(folder: Path) -> None:
    from eva_rl.model import save_base

    save_base(folder, _model(), {"toy/reach": _statistics()})


def use_checkpoint(folder: Path) -> None:
    from eva_rl.model import load_base

    base = load_base(str(folder))
    for name in base.model.interfaces:
        if name == "arm" and base.model.interfaces[name].observation_size == 3:
            base.model(_batch())


def make_adapter(folder: Path) -> None:
    from dataclasses import asdict

    from peft import LoraConfig

    from eva_rl.adapter import attach, save_adapter
    from eva_rl.model import NOTES, AdapterNotes

    model = _model()
    notes = AdapterNotes("base", "0" * 64, "toy/reach", model.interfaces["arm"], _statistics())
    save_adapter(attach(model, LoraConfig(r=2, target_modules=["q", "v"])), folder, "base", {NOTES: asdict(notes)})


def use_adapter(folder: Path) -> None:
    from eva_rl.adapter import load_adapter
    from eva_rl.model import load_notes

    model = _model()
    model.connect(load_notes(folder).interface, "The adapter")
    load_adapter(model, folder)(_batch())


def _train(folder: Path, steps: int, resume: bool) -> None:
    from eva_rl.training import Saves, TrainingConfig, train

    model = _model()
    config = TrainingConfig(batch_size=2, checkpoint_every=1, warmup=1, precision="float32")
    with redirect_stderr(StringIO()):
        train(model, _batch, model.loss, steps, config, Saves(folder, resume, {"of": "the fuzzer"}))


def make_state(folder: Path) -> None:
    import eva_rl.training.loop as loop

    save, taken = loop.save, []

    def interrupted(*arguments: Any) -> None:
        save(*arguments)
        taken.append(1)
        if len(taken) == 2:
            raise KeyboardInterrupt

    loop.save = interrupted
    try:
        _train(folder, 3, False)
    except KeyboardInterrupt:
        pass
    finally:
        loop.save = save


def use_state(folder: Path) -> None:
    _train(folder, 3, True)


def _result(adapter: str, seed: int) -> dict[str, Any]:
    score = {"mean": 0.5, "low": 0.3, "high": 0.7, "n": 20}
    scores = dict.fromkeys(("success_rate", "success_at_end", "episode_return", "normalized_score"), score)
    settings = {"base": "b", "task": "toy/reach", "seed": seed, "steps": 10, "episodes": 20, "target_return": "max"}
    settings |= {"adapter": {"name": adapter, "rank": 8}, "training": {"batch_size": 32, "learning_rate": None}}
    facts = {"task": "toy/reach", "adapter": adapter, "base": "b", "dataset": "d", "seed": seed, "steps": 10}
    facts |= {"demonstrations": 4, "target_return": 1.0, "learning_rate": 1e-3, "trainable_parameters": 10}
    facts |= {"total_parameters": 100, "settings": settings, "curve": {"5": scores}, "status": "complete"}
    return facts | scores | {"zero_shot": scores, "seconds": {"init": 1.0, "train": 2.0}, "versions": {"torch": "2"}}


def make_run(folder: Path) -> None:
    for adapter in ("eva", "lora"):
        for seed in (0, 1):
            run = folder / f"{adapter}-{seed}"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text("")
            (run / "result.json").write_text(json.dumps(_result(adapter, seed)))


def use_run(folder: Path) -> None:
    from eva_rl.study import compare, document, pack
    from eva_rl.study.runs import to_csv

    comparison = compare([folder])
    if comparison.runs:
        document(comparison)
        to_csv(comparison.runs)
    if comparison.left_out:
        raise UserError(comparison.left_out[0])
    pack(folder)


def make_rows(folder: Path) -> None:
    from eva_rl.study import pack

    make_run(folder)
    pack(folder)
    for file in [*folder.rglob("result.json")]:
        file.unlink()
        (file.parent / "config.yaml").unlink()
        file.parent.rmdir()


def make_dataset(folder: Path, data_format: str = "hdf5") -> None:
    import warnings

    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    from eva_rl.data.collection import datasets_root_at

    folder.mkdir()
    rng = np.random.default_rng(0)
    steps = {"rewards": np.ones(6), "terminations": np.arange(6) == 5, "truncations": np.zeros(6, bool)}

    def episode() -> EpisodeBuffer:
        columns: dict[str, Any] = {"observations": rng.normal(size=(7, 3)), "actions": rng.uniform(-1, 1, (6, 2))}
        return EpisodeBuffer(**columns, **steps)

    episodes = [episode() for _ in range(3)]
    spaces: dict[str, Any] = {
        "observation_space": gym.spaces.Box(-10, 10, (3,), np.float64),
        "action_space": gym.spaces.Box(-1, 1, (2,), np.float64),
    }
    with datasets_root_at(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("mine/random-v0", episodes, data_format=data_format, **spaces)


def use_dataset(folder: Path) -> None:
    import minari

    from eva_rl.data import WindowSampler, load_dataset
    from eva_rl.data.collection import datasets_root_at

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("the fuzzer runs without a network")

    minari.download_dataset = no_network
    with datasets_root_at(folder):
        trajectories = load_dataset("mine/random-v0", "mine")
        WindowSampler([trajectories], "mine", 4, 2, 0).batch(0)


VALUES = (
    "0",
    "1",
    "-1",
    "7",
    "1e-3",
    "1e400",
    "nan",
    "true",
    "null",
    "x",
    "''",
    "[1,2]",
    "{a: 1}",
    "???",
    "a=b",
    "ä",
    "[",
    "${nope}",
    "",
)
COMMANDS = ("collect", "pretrain", "finetune", "merge", "evaluate", "tasks")


def draw_words(rng: np.random.Generator) -> list[str]:
    """A command and one to four settings of it, with values of any kind.

    Now and then there is something that is no setting.
    """
    from eva_rl import config

    command = COMMANDS[rng.integers(len(COMMANDS))]
    names = config.setting_names(_schema(command))
    words = [command]
    for _ in range(int(rng.integers(1, 5))):
        name, value = names[rng.integers(len(names))], VALUES[rng.integers(len(VALUES))]
        prefix = ("", "", "", "+", "++", "~")[rng.integers(6)]
        if rng.random() < 0.1:
            name = name[: int(rng.integers(len(name)))] + "x"
        words.append(f"{prefix}{name}={value}" if rng.random() < 0.95 else value or name)
    return words


def _schema(command: str) -> type:
    from eva_rl import config

    return config.TaskListConfig if command == "tasks" else getattr(config, f"{command.capitalize()}Config")


def use_words(words: Sequence[str]) -> None:
    """Parse and check, as the command does before it does anything else.

    Raises:
        UserError: the sentence it is answered with.
        AssertionError: where the answer is not one sentence.
    """
    from eva_rl.config import entry_point

    command, *arguments = words
    before, errors = sys.argv, StringIO()
    sys.argv = [command, *arguments]
    folder = "eva_rl.configs.evaluate" if command == "evaluate" else "eva_rl.configs"
    try:
        with redirect_stderr(errors), redirect_stdout(StringIO()):
            entry_point(_schema(command), command, folder)(lambda config: None)()
    except SystemExit as ended:
        said = ended.code if isinstance(ended.code, str) else errors.getvalue()
        if ended.code in (0, None):
            return
        if not said.strip() or "Traceback" in said or (isinstance(ended.code, str) and "\n" in said.strip()):
            raise AssertionError(f"answered with {said!r}") from ended
        raise UserError(said.strip().splitlines()[-1]) from ended
    finally:
        sys.argv = before


TARGETS = {
    "checkpoint": Target(make_checkpoint, use_checkpoint),
    "adapter": Target(make_adapter, use_adapter),
    "training_state": Target(make_state, use_state),
    "run": Target(make_run, use_run),
    "rows": Target(make_rows, use_run),
    "dataset": Target(make_dataset, use_dataset),
    "arrow_dataset": Target(lambda folder: make_dataset(folder, "arrow"), use_dataset),
    **{f"{name}_logs": Target(make, use_logs) for name, make in MAKERS.items()},
    "command": Target(lambda folder: folder.mkdir(), use_words, draw_words),
}
