"""Who may import whom. The tables are the rule; the rest reads the imports of every module and compares."""

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every module of the project belongs to one place: a leaf, config (a package, too), a room (a package) or an entry point.
LEAVES = {"batch", "cores", "errors", "files", "interface", "prepared", "seeding", "settings", "spaces", "table"}
SMALL_ROOMS = {"baselines"}  # of one file
ROOMS = {
    "adapter",
    "configs",
    "continual",
    "convert",
    "data",
    "envs",
    "jobs",
    "library",
    "model",
    "policy",
    "rollout",
    "run",
    "study",
    "training",
} | SMALL_ROOMS
ENTRY_POINTS = {
    "collect",
    "evaluate",
    "export",
    "finetune",
    "merge",
    "pretrain",
    "publish",
    "tasks",
    "report",
    "continual.__main__",
    "library.__main__",
    "convert.__main__",
}

MAY_NOT_IMPORT = {
    # place        places                                                       because
    "adapter":  {"data", "envs", "model", "rollout", "training"},             # any module, any iterable of batches
    "training": {"rollout"},                                                  # it is handed an `evaluate` function
    "rollout":  {"training"},
    "convert":  {"adapter", "envs", "model", "rollout", "run", "study", "training"},  # files -> a dataset
    "envs":     (ROOMS - {"envs"}) | (LEAVES - {"errors"}),                   # numpy, gymnasium and its simulator
    "baselines": {"adapter", "envs", "rollout", "run", "study", "training"},  # trajectories -> an untrained network
    "run":      ROOMS - {"run"},                                              # plain values, arrays and figures
    "study":    ROOMS - {"run", "study"},                                     # results -> tables; no run, no model
    "policy":   {"baselines", "data"},                                        # acts without datasets
    "config":   ROOMS,                                                        # --help answers before anything heavy
    **dict.fromkeys(LEAVES, ROOMS),                                           # everyone imports them
    "continual": {"baselines", "convert", "envs", "policy"},                  # tasks in sequence
    "library":  {"baselines", "convert", "envs"},                             # adapters that are there
    "eva_rl":   ROOMS - {"adapter", "jobs", "library", "policy"},             # but for the Python API
}  # fmt: skip
ONLY_FOR_ENTRY_POINTS_AND = {
    "config": {"jobs", "settings"},  # other rooms receive plain values; what settings name is made there, when it is asked for
    "jobs":   {"eva_rl"},            # at the end of the street: nothing but the Python API builds on it
}  # fmt: skip
NO_PLACE_MAY_IMPORT = ENTRY_POINTS

ONLY_IMPORTED_BY = {
    # package                places
    "hydra":                 {"config"},
    "omegaconf":             {"config"},
    "peft":                  {"adapter"},
    "minari":                {"data", "collect"},
    "tensorboard":           {"run"},
    "torch.utils.tensorboard": {"run"},
    "envs":                  set(),  # it is `eva_rl.envs`: a user's own folder may be called envs
    "configs":               set(),
}  # fmt: skip

# Besides the standard library and the simulators in pyproject.toml; the last two come with gymnasium[box2d].
PACKAGES_OF_ENVS = {"eva_rl", "gymnasium", "numpy", "safetensors", "Box2D", "pygame"}
EXTRAS_WITHOUT_SIMULATOR = {"all", "arrow", "dev", "docs", "domains", "joblib", "onnx", "optimizers", "ray", "slurm"}


def modules() -> dict[str, Path]:
    """Every module that is shipped, by the name it is imported under."""
    found = {}
    for folder, package in (("eva_rl", "eva_rl"), ("envs", "eva_rl.envs"), ("configs", "eva_rl.configs")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def simulators() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirements = [r for extra, group in extras.items() if extra not in EXTRAS_WITHOUT_SIMULATOR for r in group]
    return {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements}


def place_of(name: str) -> str | None:
    """Where a module, or a name in one, belongs; None if that is outside the project."""
    top, *inner = name.split(".")
    if top != "eva_rl":
        return None
    if ".".join(inner[:2]) in ENTRY_POINTS:
        return ".".join(inner[:2])
    return inner[0] if inner and inner[0] in LEAVES | ROOMS | ENTRY_POINTS | {"config"} else "eva_rl"


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """The line and absolute name of everything a module imports, at its top, in a function, or by a literal name."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if function in {"import_module", "__import__", "require"} and isinstance(name, str):
                yield node.lineno, name


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    place, found = place_of(module), []
    for line, name in imports_of(source, module, is_package):
        target, package = place_of(name), name.partition(".")[0]
        forbidden = (
            target in MAY_NOT_IMPORT.get(place, set())
            or (target in NO_PLACE_MAY_IMPORT and target != place)
            or place not in ENTRY_POINTS | {target} | ONLY_FOR_ENTRY_POINTS_AND.get(target, {place})
            or any(f"{name}.".startswith(f"{p}.") and place not in places for p, places in ONLY_IMPORTED_BY.items())
            or (place == "envs" and package not in sys.stdlib_module_names | PACKAGES_OF_ENVS | simulators())
        )
        if forbidden:
            found.append(f"{module}, line {line}: '{place}' may not import {name}")
    return found


def test_no_module_imports_through_a_wall():
    found = [
        sentence
        for module, path in modules().items()
        for sentence in violations(path.read_text(), module, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_module_has_a_place_in_the_tables():
    beside_the_rooms = {path.stem for path in (ROOT / "eva_rl").glob("*.py")} - {"__init__"}
    in_the_tables = LEAVES | SMALL_ROOMS | ENTRY_POINTS
    assert beside_the_rooms <= in_the_tables
    assert {p.parent.name for p in (ROOT / "eva_rl").glob("*/*.py")} | {"configs", "envs"} <= ROOMS | {"config"}


def test_exactly_the_entry_points_can_be_run():
    runnable = {name for name, path in modules().items() if '\nif __name__ == "__main__":' in path.read_text()}
    assert runnable <= {f"eva_rl.{entry}" for entry in ENTRY_POINTS}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("eva_rl.training.loop", "from eva_rl.rollout import rollout"),
        ("eva_rl.training.loop", "def f():\n    import eva_rl.rollout.rollout"),
        ("eva_rl.training.loop", "from eva_rl import rollout"),
        ("eva_rl.training.loop", "from ..rollout import rollout"),
        ("eva_rl.rollout.rollout", "if TYPE_CHECKING:\n    from eva_rl.training import TrainingConfig"),
        ("eva_rl.adapter.eva.engine", "from eva_rl.model import DecisionTransformer"),
        ("eva_rl.adapter.eva.engine", "from ...data.windows import WindowSampler"),
        ("eva_rl.adapter.attach", "import importlib\nimportlib.import_module('eva_rl.envs')"),
        ("eva_rl.envs.metaworld", "import torch"),
        ("eva_rl.envs.metaworld", "from eva_rl.interface import Interface"),
        ("eva_rl.envs.metaworld", "class D:\n    def make(self):\n        self.require('torch')"),
        ("eva_rl.data.load", "from omegaconf import DictConfig"),
        ("eva_rl.data.load", "from eva_rl.config import CollectConfig"),
        ("eva_rl.model.checkpoint", "import peft.tuners"),
        ("eva_rl.rollout.rollout", "import minari"),
        ("eva_rl.training.loop", "from torch.utils.tensorboard import SummaryWriter"),
        ("eva_rl.training.loop", "from torch.utils import tensorboard"),
        ("eva_rl.finetune", "from eva_rl.collect import main"),
        ("eva_rl.finetune", "from eva_rl import pretrain"),
        ("eva_rl.evaluate", "from eva_rl.report import main"),
        ("eva_rl.run.result", "from eva_rl.study import compare"),
        ("eva_rl.study.compare", "from torch.utils.tensorboard import SummaryWriter"),
        ("eva_rl.finetune", "import peft"),
        ("eva_rl.jobs.finetuning", "import peft"),
        ("eva_rl.jobs.finetuning", "import hydra"),
        ("eva_rl.jobs.finetuning", "from eva_rl.finetune import main"),
        ("eva_rl.policy.load", "from eva_rl.jobs.finetuning import finetune"),
        ("eva_rl.study.runs", "from eva_rl import jobs"),
        ("eva_rl.finetune", "import hydra"),
        ("eva_rl.finetune", "from envs.metaworld import MT40"),
        ("eva_rl.config.parse", "from eva_rl.model import ModelConfig"),
        ("eva_rl.settings", "from eva_rl.model import ModelConfig"),
        ("eva_rl.settings", "import hydra"),
        ("eva_rl.model.decision_transformer", "from eva_rl.config import plan"),
        ("eva_rl.seeding", "from eva_rl.data import collect"),
    ],
)
def test_an_import_through_a_wall_is_found(module: str, source: str):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("eva_rl.finetune", "from eva_rl.config import entry_point\nfrom eva_rl.training import train"),
        ("eva_rl.jobs.finetuning", "from eva_rl.config import plan\nfrom eva_rl.jobs.playing import Stage"),
        ("eva_rl.collect", "import minari"),
        ("eva_rl.data.load", "from eva_rl.envs import find_task\nfrom .windows import WindowSampler"),
        ("eva_rl.data.load", "from eva_rl.files import replacing\nimport minarium, hydraulics"),
        ("eva_rl.envs.dmc", "import dm_control, gymnasium.spaces, json\nfrom eva_rl.errors import UserError"),
        ("eva_rl.envs.atari", "from .domain import Domain\ndef f(d):\n    d.require('ale_py')"),
        ("eva_rl.adapter.attach", "import eva_rl, peft\nfrom eva_rl.batch import Batch"),
    ],
)
def test_an_import_within_the_walls_passes(module: str, source: str):
    assert violations(source, module) == []
