"""Where things are: the top level, the packages, the wheel; and what no file may contain."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import eva_rl

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FILES = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
FOLDERS = {"benchmarks", "checkpoints", "configs", "docs", "envs", "eva_rl", "examples", "tests", "tools"}
COMES_WITH_ITS_FIRST_FILE = {"benchmarks", "examples"}

PICKLE_MODULES = {"cloudpickle", "dill", "joblib", "pickle", "shelve"}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files under version control, relative to the root."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_holds_what_the_design_names_and_nothing_else(tracked: list[Path]):
    top_level = {path.parts[0] for path in tracked if not path.parts[0].startswith(".")}
    assert top_level - FILES - FOLDERS == set()
    assert (FILES | FOLDERS) - top_level - COMES_WITH_ITS_FIRST_FILE == set()
    assert Path(".ci/run") in tracked


def test_the_package_list_names_every_package():
    setuptools = PYPROJECT["tool"]["setuptools"]
    existing = set()
    for package, folder in setuptools["package-dir"].items():
        for module in (ROOT / folder).rglob("*.py"):
            existing.add(".".join([package, *module.relative_to(ROOT / folder).parent.parts]))
    assert sorted(existing) == setuptools["packages"]


def test_the_version_is_the_same_wherever_it_is_written():
    assert eva_rl.__version__ == PYPROJECT["project"]["version"]
    assert f"## {eva_rl.__version__} " in (ROOT / "CHANGELOG.md").read_text()


FROM_A_FOREIGN_FOLDER = """
import importlib.resources, json, sys
import envs
import eva_rl.envs
from eva_rl.envs.domain import Domain
configs = importlib.resources.files("eva_rl.configs")
yaml = [str(path.relative_to(configs)) for path in configs.rglob("*.yaml")]
print(json.dumps({"foreign": envs.__file__, "eva_rl": eva_rl.__file__, "envs": eva_rl.envs.__file__,
                  "domains": sorted(eva_rl.envs.domains()), "yaml": sorted(yaml)}))
"""


def test_a_wheel_finds_its_tasks_and_configs_beside_a_foreign_envs(tmp_path: Path):
    source, target, foreign = tmp_path / "source", tmp_path / "site", tmp_path / "project"
    for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore, dirs_exist_ok=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    (foreign / "envs").mkdir(parents=True)
    (foreign / "envs" / "__init__.py").write_text("")

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", target, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, "-c", FROM_A_FOREIGN_FOLDER]
    run = subprocess.run(command, cwd=foreign, env=environment, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert Path(found["foreign"]) == foreign / "envs" / "__init__.py"
    assert Path(found["eva_rl"]) == target / "eva_rl" / "__init__.py"
    assert Path(found["envs"]) == target / "eva_rl" / "envs" / "__init__.py"
    assert "metaworld" in found["domains"]
    configs = ROOT / "configs"
    assert found["yaml"] == sorted(str(path.relative_to(configs)) for path in configs.rglob("*.yaml"))
    for data in (ROOT / "envs").glob("*.json"):
        assert (target / "eva_rl" / "envs" / data.name).is_file()


def test_a_checkout_has_nothing_in_the_package_but_what_a_wheel_has():
    for name in ("envs.domain", "configs.evaluate", "checkpoints"):
        assert importlib.util.find_spec(f"eva_rl.{name}") is not None
    for name in ("tests", "benchmarks", "tools", "docs", "eva_rl"):
        assert importlib.util.find_spec(f"eva_rl.{name}") is None


def unsafe_lines(source: str) -> list[int]:
    """The lines that read or write pickles, or that catch every exception without naming one.

    Only `pickle.loads(pickle.dumps(...))` passes: it shows that an object can cross into another process.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            unsafe = any(alias.name in PICKLE_MODULES and alias.asname for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            unsafe = node.module in PICKLE_MODULES
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            module, _, function = name.rpartition(".")
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            round_trip = bool(node.args) and ast.unparse(node.args[0]).startswith(f"{module}.dumps(")
            unsafe = (
                (module in PICKLE_MODULES and function != "dumps" and not round_trip)
                or (name == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle") == "True"
            )
        else:
            unsafe = isinstance(node, ast.ExceptHandler) and node.type is None
        if unsafe:
            lines.append(node.lineno)
    return lines


def test_no_file_is_or_loads_a_pickle_and_no_except_is_bare(tracked: list[Path]):
    assert [str(path) for path in tracked if path.suffix in PICKLE_SUFFIXES] == []
    found = {str(path): unsafe_lines((ROOT / path).read_text()) for path in tracked if path.suffix == ".py"}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\ntorch.load('x')", [2]),
        ("torch.load('x', weights_only=False)", [1]),
        ("torch.load('x', weights_only=True)", []),
        ("import pickle\npickle.load(file)", [2]),
        ("pickle.loads(path.read_bytes())", [1]),
        ("pickle.dump(model, file)", [1]),
        ("pickle.loads(pickle.dumps(error))", []),
        ("import pickle as p", [1]),
        ("def f():\n    from cloudpickle import loads", [2]),
        ("np.load('x', allow_pickle=True)", [1]),
        ("np.load('x', allow_pickle=False)", []),
        ("try:\n    f()\nexcept:\n    pass", [3]),
        ("try:\n    f()\nexcept ValueError:\n    'pickle.load'", []),
    ],
)
def test_pickles_and_bare_excepts_are_found(source: str, lines: list[int]):
    assert unsafe_lines(source) == lines
