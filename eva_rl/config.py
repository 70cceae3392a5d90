"""Hydra's YAML -> typed, frozen dataclasses; mistakes on the command line -> one sentence.

This file alone knows Hydra. It is imported before anything heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eva_rl.errors import UserError, did_you_mean, in_one_line, refused_path, while_read


@dataclass(frozen=True)
class TaskListConfig:
    domain: str | None = None


@dataclass(frozen=True)
class CollectConfig:
    task: str
    episodes: int
    noise: tuple[float, ...]
    seed: int
    workers: int


@dataclass(frozen=True)
class ModelSettings:
    """The fields of `eva_rl.model.ModelConfig`."""

    layers: int
    heads: int
    width: int
    context: int
    dropout: float
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class TrainingSettings:
    """The fields of `eva_rl.training.TrainingConfig`; a learning rate of None is the adapter's own."""

    batch_size: int
    learning_rate: float | None
    final_learning_rate: float
    warmup: int
    weight_decay: float
    gradient_clip: float
    precision: str
    checkpoint_every: int
    evaluate_every: int
    log_every: int
    accumulate: int


@dataclass(frozen=True)
class OptimizerSettings:
    """One optimiser of `configs/optimizer/`."""

    name: str
    rate: float
    """Times the adapter's own learning rate, where the run names none."""
    constant: bool
    pairs: bool
    freezes: tuple[str, ...]
    matrices: dict[str, Any]
    others: dict[str, Any]
    extra: str | None
    config: dict[str, Any]
    """What makes the optimiser and its `_target_`, but for its parameters and their rate."""

    def recipe(self) -> dict[str, Any]:
        """The fields of `eva_rl.training.Recipe`.

        Raises:
            UserError: if the package it comes from is not installed, or its settings make no sense.
        """
        package = str(self.config.get("_target_")).partition(".")[0]
        if self.extra and importlib.util.find_spec(package) is None:
            raise UserError(
                f"optimizer={self.name} needs the package {package}: install it with `pip install 'eva_rl[{self.extra}]'`."
            )
        make = instantiate(self.config | {"_partial_": True})
        own = {name: getattr(self, name) for name in ("name", "pairs", "constant", "matrices", "others")}
        return {"make": make, **own}


ADAMW = OptimizerSettings(
    name="adamw",
    rate=1.0,
    constant=False,
    pairs=False,
    freezes=(),
    matrices={},
    others={},
    extra=None,
    config={"_target_": "torch.optim.AdamW", "fused": True},
)
"""configs/optimizer/adamw.yaml, the optimiser of runs whose settings name none."""


@dataclass(frozen=True)
class PretrainConfig:
    task: tuple[str, ...]
    weights: dict[str, float] | None
    temperature: float
    demonstrations: int
    labels: str
    std_floor: float
    tokens: dict[str, Any] | None
    model: ModelSettings
    training: TrainingSettings
    steps: int
    seed: int
    device: str
    run_dir: str | None
    resume: bool
    output: str | None
    optimizer: OptimizerSettings = ADAMW


@dataclass(frozen=True)
class EvaOptions:
    """The fields of `eva_rl.adapter.EvaSettings` but the seed, which is the run's; and `tokens`, those that count."""

    rho: float
    tau: float
    convergence: str
    max_batches: int
    method: str
    tokens: str
    center: bool
    weighting: str
    budget: str
    ranking: str
    components: str
    rotation: bool
    permutation: bool
    whiten: bool


@dataclass(frozen=True)
class AdapterSettings:
    """One method of `configs/adapter/`."""

    name: str
    trainable: str
    """`adapter`, `interface`, `all` weights or `none`."""
    layers: tuple[str, ...]
    rank: int
    budget: str | None
    """`params`, a number of weights, or None."""
    tolerance: float
    size: dict[str, float] | None
    """The peft config's settings that the budget decides, by how much each grows with the size."""
    sizes: tuple[int, ...] | None
    learning_rate: float
    ratios: dict[str, float]
    start: str | None
    """The name of a function of `eva_rl.adapter.starts`, or like those."""
    start_batches: int
    config: dict[str, Any] | None
    """The peft config and its `_target_`."""
    eva: EvaOptions | None
    steps: int
    """Optimiser steps, where the run does not say."""
    batch_size: int
    """Windows in a batch, where the run does not say."""
    network: str
    """`base`, with the weights it was pretrained to; `fresh`, the same with fresh weights; `mlp`, a perceptron."""

    def __post_init__(self) -> None:
        if self.network not in ("base", "fresh", "mlp") or (self.network != "base" and self.trainable != "all"):
            raise UserError(
                f"adapter.network={self.network} was given with adapter.trainable={self.trainable} where base was expected, or fresh "
                "or mlp with all weights trainable."
            )
        if self.trainable not in ("adapter", "interface", "all", "none"):
            raise UserError(
                f"adapter.trainable={self.trainable} was given where adapter, interface, all or none was expected."
            )
        if (self.config is None) == (self.trainable == "adapter"):
            raise UserError(
                f"adapter.trainable={self.trainable} does not go with {'no' if self.config is None else 'an'} "
                "adapter.config: a peft config trains the adapter, and nothing else does."
            )
        for name in ("rank", "start_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"adapter.{name}={getattr(self, name)} was given where at least 1 was expected.")
        if self.budget not in (None, "params") and not (self.budget.isdecimal() and int(self.budget)):
            raise UserError(
                f"adapter.budget={self.budget} was given where params, a number of weights or null was expected."
            )
        if self.config is not None and self.budget is not None and not self.size:
            raise UserError(
                f"adapter.budget={self.budget} can't be met without adapter.size, the settings of adapter.config that "
                "grow with it, such as {r: 1}: set one, or adapter.budget=null."
            )

    @property
    def is_lora(self) -> bool:
        """Whether it is made of LoRA's two factors."""
        return self.config is not None and str(self.config.get("_target_")).rpartition(".")[2] == "LoraConfig"

    def peft_config(self, size: int | None = None) -> Any:
        """The peft config, of this size or as it stands.

        Raises:
            UserError: if it can't be made of these settings.
        """
        grown = {} if size is None else {key: max(1, round(size * by)) for key, by in self.size.items()}
        return instantiate(self.config | grown)

    def start_function(self) -> Callable[..., Any] | None:
        if self.start is None:
            return None
        try:
            return hydra.utils.get_method(self.start)
        except (ImportError, ValueError) as error:
            raise UserError(f"adapter.start={self.start} names no function ({in_one_line(error)}).") from error


@dataclass(frozen=True)
class FinetuneConfig:
    task: str
    dataset: str | None
    demonstrations: int | None
    base: str
    adapter: AdapterSettings
    training: TrainingSettings
    fresh_learning_rate: float
    """Of an embedder and head that the base does not have, whatever the method."""
    steps: int
    seed: int
    episodes: int
    zero_shot: bool
    target_return: str | None
    video: bool
    max_episode_steps: int | None
    trust_environment: bool
    workers: int | None
    device: str
    run_dir: str | None
    resume: bool | None
    optimizer: OptimizerSettings = ADAMW

    def __post_init__(self) -> None:
        if not 0 <= self.fresh_learning_rate < math.inf:
            raise UserError(
                f"fresh_learning_rate={self.fresh_learning_rate} was given where a number of at least 0 was expected."
            )


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str | None
    adapter: str | None
    library: str | None
    task: str
    episodes: int
    seed: int
    target_return: str | None
    video: bool
    max_episode_steps: int | None
    trust_environment: bool
    workers: int | None
    precision: str
    device: str
    run_dir: str | None


@dataclass(frozen=True)
class MergeConfig:
    run: str
    base: str | None
    output: str | None


@dataclass(frozen=True)
class ExportConfig:
    run: str
    format: str
    task: str | None
    base: str | None
    output: str | None


@dataclass(frozen=True)
class PublishConfig:
    run: str
    repo: str
    base: str | None
    private: bool


@dataclass(frozen=True)
class ColumnSettings:
    """The fields of `eva_rl.convert.Columns`."""

    observations: tuple[str, ...] | None
    actions: tuple[str, ...] | None
    rewards: tuple[str, ...] | None
    terminations: tuple[str, ...] | None
    truncations: tuple[str, ...] | None
    success: tuple[str, ...] | None
    episode: tuple[str, ...] | None


@dataclass(frozen=True)
class ConvertConfig:
    source: str
    dataset: str
    format: str | None
    columns: ColumnSettings
    mapping: str | None
    actions: str | None
    environment: str | None
    skip_bad: bool
    overwrite: bool


HELP = """Settings are given as key=value; the files in configs/ explain them. `adapter=?`, `optimizer=?`, `model=?` and `study=?` list
what there is to choose from, where a command has these.

Settings and their defaults:

$CONFIG"""

# Hydra parses the command line and leaves files, folders and logging to us.
ConfigStore.instance().store(
    name="entry",
    package="_global_",
    node={
        "defaults": [{"override /hydra/job_logging": "none"}, {"override /hydra/hydra_logging": "none"}],
        "hydra": {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": "runs/multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "."},
            "job": {"chdir": False, "name": "${hydra.job.config_name}"},  # what a cluster calls its jobs
            "help": {"template": HELP},
        },
    },
)


# ${share:0.1,${steps}} in a config
OmegaConf.register_new_resolver("share", lambda part, whole: round(part * whole), replace=True)


def entry_point(
    schema: type,
    name: str,
    folder: str = "eva_rl.configs",
    splits: Callable[[], Mapping[str, Sequence[str]]] = dict,
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make `main(config: schema)` a command that reads `configs/<name>.yaml` and the command line.

    splits: the tasks that a word after `task=` stands for in a grid, each a run of its own.

    A `UserError`, a misspelt key, a wrong value or a launcher that fails ends the process with one sentence on stderr and
    status 1; Ctrl-C with 130. Anything else is a bug and keeps its traceback.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        composed = False

        def task(config: DictConfig) -> None:
            nonlocal composed
            composed = True
            if (
                HydraConfig.get().mode == RunMode.MULTIRUN
            ):  # a launcher's own would be unknown to processes started here
                multiprocessing.set_start_method("spawn", force=True)
            try:  # here, because Hydra prints a line of its own for an exception that leaves the job
                with while_read():
                    main(checked(parse(config, schema)))
            except Exception as error:
                said = mistake(error, schema)
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other runs of the grid go on
                    given = " ".join(HydraConfig.get().overrides.task)
                    said = f"error: {said}" if said else traceback.format_exc().rstrip()
                    print(f"{said} ({given})", file=sys.stderr, flush=True)
                    raise UserError("Not all runs of the grid ended well; those that did keep their results.") from None
                if not said:
                    raise
                sys.exit(f"error: {said}")

        def run() -> None:
            for group in (word.removesuffix("=?") for word in sys.argv[1:] if word.endswith("=?")):
                with while_read():
                    return print(choices(group, name))
            try:
                _check_config_folders(sys.argv[1:])
            except UserError as error:
                sys.exit(f"error: {error}")
            os.environ["HYDRA_FULL_ERROR"] = (
                "1"  # whatever it was: exceptions reach us, where Hydra would print and exit
            )
            if in_grid := any(word.startswith(GRID) for word in sys.argv[1:]):
                sys.argv[1:] = [_with_tasks_listed(word, splits) for word in sys.argv[1:]]
            try:
                with while_read():
                    hydra.main(version_base="1.3", config_path=f"pkg://{folder}", config_name=name)(task)()
            except ValueError as error:  # Hydra's answer to `model=3`
                if composed:
                    raise
                sys.exit(f"error: {' '.join(sys.argv[1:])}: {explain(error, schema)}")
            except Exception as error:
                if not (said := mistake(error, schema) or _of_plugin(error)):
                    raise
                sys.exit(f"error: {said}")
            except KeyboardInterrupt as interruption:
                kept = str(interruption)
                if not kept and schema in (CollectConfig, PretrainConfig, FinetuneConfig):
                    kept = "Collected episodes are kept."
                if schema is FinetuneConfig and in_grid:
                    kept += " The same command goes on, with resume=true if it has a run_dir."
                elif "resume" in get_type_hints(schema):
                    kept += " A run continues with its run_dir and resume=true."
                print(f"\nInterrupted. {kept}".rstrip(), file=sys.stderr)
                sys.exit(130)

        return run

    return decorate


SECTIONS = {"pretrain": ("model", "optimizer"), "finetune": ("adapter", "optimizer", "study")}
"""What a command has several files of settings to choose from for."""


def choices(group: str, command: str) -> str:
    """The choices of a command's section such as `adapter`, with the first line of each one's file.

    Raises:
        SystemExit: if it has no such section.
    """
    sections = SECTIONS.get(command, ())
    if group not in sections:
        hint = f"It has {', '.join(sections)}." if sections else "It has none."
        sys.exit(f"error: {command} has no section '{group}' to choose from. {hint}")
    files = sorted(
        (f for f in (resources.files("eva_rl.configs") / group).iterdir() if f.name.endswith(".yaml")), key=str
    )
    texts = {Path(f.name).stem: f.read_text(encoding="utf-8").removeprefix("# @package _global_\n") for f in files}
    lines = [(name, text.partition("\n")[0].removeprefix("# ")) for name, text in texts.items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines)


def parse(config: DictConfig, schema: type) -> Any:
    """The dataclass `schema` filled from a composed config, its values converted to the declared types.

    Raises:
        UserError: if a value is missing, unknown or of the wrong type.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"'{missing[0]}' is not set: add {missing[0]}=... to the command line.")
    built = _build(schema, OmegaConf.to_container(config, resolve=True), "")
    if not 0 <= getattr(built, "seed", 0) < 2**63:
        raise UserError(f"seed={built.seed} was given where a whole number from 0 to 2**63 - 1 was expected.")
    return built


GRID = ("-m", "--multi", "hydra.mode=MULTIRUN", "study=")
"""What words of the command line that ask for a grid begin with."""


def _with_tasks_listed(word: str, splits: Callable[[], Mapping[str, Sequence[str]]]) -> str:
    """A word of a grid's command line, with the tasks of a split in the place of its name."""
    if not word.lstrip("+").startswith("task="):
        return word
    try:
        given = OverridesParser.create().parse_override(word)
        names = list(given.sweep_string_iterator()) if given.is_sweep_override() else [str(given.value())]
    except HydraException:  # it is said when Hydra reads all words
        return word
    names = [name.strip("'\"") for name in names]
    known = splits()  # imports the domains, which other words do without
    if known.keys().isdisjoint(names):
        return word
    return f"{given.input_line.partition('=')[0]}={','.join(','.join(known.get(name, (name,))) for name in names)}"


def checked(config: Any) -> Any:
    """A config whose settings go together with each other and with what the command line names.

    A fine-tuning run of a grid that was given no folder gets one that its settings name, and goes on with what is there.

    Raises:
        UserError: if they don't.
    """
    alone = HydraConfig.get().mode != RunMode.MULTIRUN
    if alone and getattr(config, "resume", False) and config.run_dir is None:
        raise UserError("resume=true was given without run_dir=..., the folder of the run to go on with.")
    if isinstance(config, FinetuneConfig) and config.run_dir is None and not alone:
        config = replace(config, run_dir=str(_folder_in_grid(config)), resume=config.resume is not False)
    method = getattr(config, "adapter", None)
    if isinstance(method, AdapterSettings) and method.budget is not None:
        words = OverridesParser.create().parse_overrides(HydraConfig.get().overrides.task)
        given = set().union(*(_given(word.key_or_group, word.value()) for word in words))
        for name in method.size or ():
            if f"adapter.config.{name}" in given:
                raise UserError(
                    f"adapter.config.{name} was given, which adapter.budget={method.budget} decides: set adapter.rank or "
                    f"adapter.size.{name} (how much it grows with the size), or adapter.budget=null."
                )
    return config


def _given(key: str, value: Any) -> set[str]:
    """The settings that `key=value` on the command line sets, those within a section by their full names."""
    if not isinstance(value, dict):
        return {key}
    return {key}.union(*(_given(f"{key}.{name}", own) for name, own in value.items()))


def _build(schema: type, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(schema)
    names = [f.name for f in fields(schema)]
    unknown = sorted(values.keys() - set(names))
    if unknown:
        raise UserError(f"There is no setting '{prefix}{unknown[0]}'. {did_you_mean(unknown[0], names)}".rstrip())
    for f in fields(schema):
        if f.name not in values and f.default is MISSING:
            raise UserError(f"'{prefix}{f.name}' is not set: add {prefix}{f.name}=... to the command line.")
    return schema(**{name: _convert(values[name], hints[name], prefix + name) for name in names if name in values})


def _convert(value: Any, hint: Any, key: str) -> Any:
    options = get_args(hint) if get_origin(hint) not in (tuple, dict) else ()
    if type(None) in options:
        if value is None or value == "None":  # as Python spells null
            return None
        hint = next(option for option in options if option is not type(None))
    if is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, key + ".")
    if get_origin(hint) is tuple and isinstance(value, str | int | float) and not isinstance(value, bool):
        value = [value]  # one is a list of one
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(item, get_args(hint)[0], key) for item in value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            return float(value)
    if get_origin(hint) is dict and isinstance(value, dict):
        kind = get_args(hint)[1]
        return value if kind is Any else {k: _convert(v, kind, f"{key}.{k}") for k, v in value.items()}
    plain = hint if isinstance(hint, type) else None
    if plain is str and value == "":
        raise UserError(f"{key}= was given without a value.")
    if plain in (int, str, bool) and type(value) is plain:
        return value
    if plain is str and isinstance(value, int | float):
        return str(value)
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        plain, "a list or section"
    )
    raise UserError(f"{key}={value} was given where {kind} was expected.")


def mistake(error: Exception, schema: type) -> str:
    """One sentence for an error that is a user's mistake; empty for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, schema)
    if isinstance(error, yaml.YAMLError):
        return f"A config can't be read ({in_one_line(error)}): mend it."
    return refused_path(error)


def _of_plugin(error: Exception) -> str:
    """One sentence for what a launcher of Hydra's could not do, such as reach its cluster; empty for any other error.

    The runs it launches say themselves what they failed of, and end in a `UserError`: what else leaves a launcher is its own.
    """
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    name = next((module.split(".")[1] for module in modules if module.startswith("hydra_plugins.")), None)
    return f"Hydra's plugin {name} failed ({type(error).__name__}: {in_one_line(error)})." if name else ""


def explain(error: Exception, schema: type) -> str:
    """One sentence for what Hydra or OmegaConf found wrong with the command line."""
    message = in_one_line(error)
    key = getattr(error.__cause__ or error, "full_key", None)
    if "is not in struct" in message or "Could not override" in message:
        given = str(key or message.partition("'")[2].partition("'")[0])
        if given in setting_names(schema):
            section = given.rpartition(".")[0]
            if section in setting_names(schema):
                return f"'{given}' can't be set here: what was chosen has no '{section}'."
            return f"'{given}' can't be chosen here ({message}): a run's own config holds one choice of it already."
        if (section := given.rpartition(".")[0]) in OPEN:
            return f"'{section}' has no '{given.rpartition('.')[2]}' here: +{given}=..., with a plus, adds it."
        return f"There is no setting '{given}'. {did_you_mean(given, setting_names(schema))}".rstrip()
    if "missing EQUAL" in message:
        given = message.partition("'")[2].partition("'")[0]
        return f"'{given}' is no setting: settings are given as key=value, such as task=... or run_dir=..."
    if "override_grammar" in message:
        said = message.partition(" See https")[0].removeprefix("LexerNoViableAltException: ").rstrip(" ^.")
        return (
            f"An argument can't be read ({said}): a value with =, commas, brackets, spaces or letters beyond a to z stands in "
            "quotes, as in \"run_dir='a=ä'\"."
        )
    if "Could not find" in message:  # a choice of a group that there is not
        found, _, options = message.partition(" Config search path:")[0].partition(" Available options in ")
        choice = found.rpartition("Could not find ")[2].strip("'").removesuffix("'")
        group, _, name = choice.rpartition("/")
        known = options.partition(":")[2].split()
        listed = f"The options are {', '.join(known)}." if len(known) <= 12 else f"'{group}=?' lists all."
        near = did_you_mean(name, known)
        return f"There is no '{choice}'. {near if near.startswith('Did') else ''} {listed}".replace("  ", " ")
    return message.removesuffix(".") + "."


OPEN = (
    "adapter.config",
    "adapter.ratios",
    "adapter.size",
    "optimizer.config",
    "optimizer.matrices",
    "optimizer.others",
    "weights",
)
"""Sections that take any name."""


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """All settings of an entry point, nested ones with dots."""
    names: list[str] = []
    for name, hint in get_type_hints(schema).items():
        names.append(prefix + name)
        for section in filter(is_dataclass, (hint, *get_args(hint))):
            names += setting_names(section, f"{prefix}{name}.")
    return names


def _folder_in_grid(config: FinetuneConfig) -> Path:
    """`runs/grid/<adapter>/<task>-<seed>-<digest>`, the digest being that of all that decides the run's result.

    An optimiser other than AdamW follows the adapter's name: `<adapter>-<optimizer>`.
    """
    digest = hashlib.sha256(json.dumps(protocol(config), sort_keys=True, allow_nan=False).encode()).hexdigest()
    name = "-".join([config.adapter.name, *([] if config.optimizer == ADAMW else [config.optimizer.name])])
    return Path(HydraConfig.get().sweep.dir, name, f"{config.task}-{config.seed}-{digest[:8]}")


def run_folder(run_dir: str | None, what: str = "run", how: str | None = None) -> Path:
    """Where a run writes: `run_dir`, or `runs/<what>/<how>-<date>`, as TensorBoard then names it (in a multirun a folder for each job)."""
    if run_dir is not None:
        folder = Path(run_dir)
    elif HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        folder = Path(HydraConfig.get().sweep.dir) / str(HydraConfig.get().job.num)
    else:
        name = "-".join([*([] if how is None else [how]), datetime.now().strftime("%Y-%m-%d-%H-%M-%S")])
        folder = Path("runs", what.replace("/", "-"), name.replace("/", "-"))
    here = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else os.getcwd()
    return folder if here == os.getcwd() else Path(here, folder)  # Ray's processes start elsewhere


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML that its entry point reads again: `--config-dir <run> --config-name config`."""
    return OmegaConf.to_yaml(OmegaConf.create({"defaults": ["entry", "_self_"], **_plain(config)}))


FREE = frozenset(
    [
        "run_dir",
        "output",
        "resume",
        "device",
        "episodes",
        "zero_shot",
        "target_return",
        "video",
        "trust_environment",
        "max_episode_steps",
        "workers",
    ]
)
"""The settings that may change where one run continues another."""


def identity(config: Any) -> dict[str, Any]:
    """The settings that must be the same for one run to continue another."""
    settings = {name: value for name, value in _finite(_plain(config)).items() if name not in FREE}
    if config.optimizer == ADAMW:  # as in the runs of former versions
        del settings["optimizer"]
    settings["training"] = {k: v for k, v in settings["training"].items() if not k.endswith("_every")}
    return settings


def protocol(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that decide a run's result, as result.json states them."""
    settings = identity(config) | {"episodes": config.episodes, "target_return": config.target_return}
    if config.max_episode_steps is not None:  # runs of before it could be set have none
        settings["max_episode_steps"] = config.max_episode_steps
    if config.trust_environment:  # the dataset's own wrappers
        settings["trust_environment"] = True
    return json.loads(json.dumps(settings | {"evaluate_every": config.training.evaluate_every}, allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _finite(value: Any) -> Any:
    """Plain settings with infinite numbers as text, since JSON has none: training.gradient_clip=inf is a setting."""
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def instantiate(config: dict[str, Any]) -> Any:
    """The peft config or optimiser that `_target_` and its settings describe; nested ones, such as EVA's, too.

    A run's settings may be a stranger's, so that no other name in them is imported. Hydra would resolve interpolations once more, and
    what `oc.create` makes of one is called unchecked: these settings may hold none.

    Raises:
        UserError: if `_target_` names anything else, an interpolation is left, or nothing can be made of these settings.
    """
    _check_targets(config)
    if left := next((text for text in _texts(config) if "${" in text), None):
        raise UserError(
            f"{left[:200]} was given for {config.get('_target_')} where a value was expected: write it out, without ${{."
        )
    try:
        return hydra.utils.instantiate(config, _convert_="all")  # plain lists: peft writes its config as JSON
    except HydraException as error:
        cause = error.__cause__ or error
        raise UserError(
            f"{config.get('_target_')} can't be made of the given settings ({in_one_line(cause)})."
        ) from error


TARGET = re.compile(
    r"peft\.(tuners\.[a-z0-9_]+\.config\.)?[A-Za-z0-9]+Config|(torch\.optim|pytorch_optimizer)\.[A-Z]\w+|eva_rl\.training\.optimizers\.(\w+)\.\3"
)
"""What `_target_` may name: configs of peft, and optimisers."""
OF_HYDRA = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins\.\w+)\.\w+\.\w+(Launcher|Sweeper)")
"""What `_target_` may name besides in a folder of settings: Hydra's launchers and sweepers."""


def _check_targets(settings: Any, where: str = "", also: re.Pattern[str] | None = None) -> None:
    """Raise a `UserError` if these settings, however nested, name anything to be called but peft's config classes and optimisers."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key == "_target_" and not (
                isinstance(value, str) and (TARGET.fullmatch(value) or (also and also.fullmatch(value)))
            ):
                raise UserError(
                    f"_target_={value} was given{where} where a config class of peft, such as peft.LoraConfig, or an optimiser, such as torch.optim.AdamW, was expected."
                )
            _check_targets(value, where, also)
    elif isinstance(settings, list | tuple):
        for value in settings:
            _check_targets(value, where, also)


def _texts(settings: Any) -> Iterator[str]:
    """All texts among these settings, however nested."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for value in settings:
            yield from _texts(value)
    elif isinstance(settings, str):
        yield settings


REFERENCE = re.compile(r"\$\{(share:)?[\w.,\[\] -]*\}")
"""An interpolation that calls nothing: another setting's name, or our own resolver."""


def _calls(text: str) -> bool:
    """Whether a text holds interpolations that do more than refer to other settings; those within others count, too."""
    while text != (shorter := REFERENCE.sub("0", text)):
        text = shorter
    return "${" in text


STARTS = "eva_rl.adapter.starts."
"""Where functions that initialise adapters are: a run's settings name no others, the command line may."""


def _check_config_folders(words: Sequence[str]) -> None:
    """Raise a `UserError` if a folder of settings that the command line names holds any that would call something foreign.

    Hydra itself makes whatever a config names as its callback or launcher, before a run begins.
    """
    for flag, value in zip(words, [*words[1:], ""], strict=False):
        name, _, given = flag.partition("=")
        if name not in ("--config-dir", "-cd", "--config-path", "-cp"):
            continue
        for path in sorted(_settings_below(Path(given or value))):
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                raise UserError(f"The settings in '{path}' can't be read ({in_one_line(error)}): mend them.") from error
            _check_targets(settings, f" in '{path}'", OF_HYDRA)
            if called := next((text for text in _texts(settings) if _calls(text)), None):
                raise UserError(
                    f"{called[:200]} is set in '{path}' where a value was expected: write it out, or name another setting as in ${{seed}}."
                )
            _check_foreign(settings, path, words)


def _settings_below(folder: Path) -> Iterator[Path]:
    """The files of settings that Hydra would find there, those in linked folders too, each once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        yield from (Path(here, name) for name in names if name.endswith((".yaml", ".yml")))


def _check_foreign(settings: Any, path: Path, words: Sequence[str]) -> None:
    """As `_check_targets`, for a start function, for what Hydra itself makes, and for more folders of settings."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in ("hydra", "callbacks", "start") and (text := next((t for t in _texts(value) if "${" in t), None)):
            raise UserError(f"{text[:200]} is set in '{path}' for {key} where a value was expected: write it out.")
        if key == "searchpath" and value:
            raise UserError(f"hydra.searchpath={value} is set in '{path}': name that folder with --config-dir instead.")
        ours = value is None or (isinstance(value, str) and value.startswith(STARTS))
        if str(key).rpartition(".")[2] == "start" and not ours and f"adapter.start={value}" not in words:
            raise UserError(
                f"adapter.start={value} is set in '{path}' where a function of {STARTS[:-1]} was expected: add "
                f"adapter.start={value} to the command line if you trust it."
            )
        _check_foreign(value, path, words)
