"""Small wrong changes of the code, each of which some test should notice.

    python -m tools.mutants --mutants 20 --seed 0      # `make mutants`
    python -m tools.mutants --known                    # the ones made by hand

A mutant is the code with one change: a comparison, an operator, a constant, a condition or a returned value of a function in one of the
rooms below. It is made in a copy of the repository, and the room's tests run on it until one fails. A mutant that none notices
survives, and is printed with its line: a test is missing, or the change makes no difference (`EQUIVALENT` lists those that were
looked at, with the reason).
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900
"""After which a mutant's tests are taken to hang, which is noticed too."""
ROOMS: dict[str, tuple[str, ...]] = {
    "eva_rl/adapter": ("test_eva.py", "test_eva_moments.py", "test_eva_drop_in.py", "test_adapters.py"),
    "eva_rl/data": ("test_trajectories.py", "test_windows.py", "test_load.py", "test_mixture.py", "test_collection.py"),
    "eva_rl/rollout": ("test_rollout.py",),
    "eva_rl/training": ("test_training.py",),
    "eva_rl/run": ("test_statistics.py", "test_report.py", "test_rows.py"),
    "eva_rl/study": ("test_study.py", "test_methods.py", "test_report.py", "test_rows.py"),
    "eva_rl/files.py": ("test_files.py",),
    "eva_rl/spaces.py": ("test_spaces.py",),
    "eva_rl/cores.py": ("test_cores.py",),
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest."""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.old.strip()!r} -> {self.new.strip()!r}"


KNOWN = (
    Mutant(
        "eva_rl/training/loop.py",
        "nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)",
        "nn.utils.clip_grad_norm_(self.parameters, math.inf)",
        ("tests/test_training.py", "-k", "clipped"),
    ),
    Mutant(
        "eva_rl/adapter/starts.py",
        "c = u.shape[0] ** 0.25",
        "c = vt.shape[1] ** 0.25",
        ("tests/test_adapters.py", "-k", "fourth_root"),
    ),
    Mutant(
        "eva_rl/jobs/finetuning.py",
        "    torch.manual_seed(config.seed)\n",
        "",
        ("tests/test_entry_points.py", "-k", "drawn_before"),
    ),
    Mutant(
        "eva_rl/adapter/adalora.py",
        "return self.config.orth_reg_weight * torch",
        "return 0 * torch",
        ("tests/test_adapters.py", "-k", "orthonormal"),
    ),
    Mutant(
        "eva_rl/training/processes.py",
        "gradient.view_as(p) if somewhere else None",
        "gradient.view_as(p)",
        ("tests/test_training.py", "-k", "without_a_gradient"),
    ),
    Mutant(
        "eva_rl/rollout/simulators.py",
        "            self.board.solved[row] = 0\n",
        "            pass\n",
        ("tests/test_rollout.py", "-k", "said_once"),
    ),
)
"""Those that once survived all tests."""
EQUIVALENT: dict[tuple[str, str], str] = {}
"""(path, changed line) -> why no test can notice it."""

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node: ast.expr) -> Iterator[ast.expr]:
    """What an expression may become."""
    changed: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        changed.ops = [SWAPS[type(node.ops[0])]()]
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        changed.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        changed.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        changed.value = node.value + 1
    elif isinstance(node, ast.IfExp):
        changed.body, changed.orelse = changed.orelse, changed.body
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        changed = changed.operand
    else:
        return
    yield changed


def mutants_of(path: Path, tests: tuple[str, ...]) -> Iterator[Mutant]:
    """Every mutant of a file, within functions, but not of annotations, messages of errors and documentation."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in _within(function):
            if not isinstance(node, ast.expr) or node.lineno != node.end_lineno:
                continue
            for changed in changes(node):
                line, text = node.lineno, lines[node.lineno - 1].encode()
                new = text[: node.col_offset] + f"({ast.unparse(changed)})".encode() + text[node.end_col_offset :]
                name = path.relative_to(ROOT).as_posix()
                yield Mutant(name, text.decode(), new.decode(), tuple(f"tests/{test}" for test in tests), line)


def _within(function: ast.FunctionDef) -> Iterator[ast.AST]:
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise | ast.FunctionDef | ast.JoinedStr | ast.AnnAssign):
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))


def survives(mutant: Mutant) -> bool:
    """Whether all its tests pass on it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "code"
        kept = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results")
        shutil.copytree(ROOT, place, ignore=kept, ignore_dangling_symlinks=True)
        target = place / mutant.path
        lines = target.read_text()
        if mutant.line:
            parts = lines.splitlines(keepends=True)
            parts[mutant.line - 1] = mutant.new
            target.write_text("".join(parts))
        else:
            target.write_text(lines.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *mutant.tests,
        ]
        try:
            done = subprocess.run(
                command,
                cwd=place,
                env=os.environ | {"PYTHONPATH": str(place)},
                capture_output=True,
                check=False,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def drawn(count: int, seed: int) -> list[Mutant]:
    """So many mutants, drawn among the lines of all rooms alike."""
    found = []
    for room, tests in ROOMS.items():
        place = ROOT / room
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            found += mutants_of(path, tests)
    rng = np.random.default_rng(seed)
    return [found[i] for i in sorted(rng.choice(len(found), min(count, len(found)), replace=False))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known", action="store_true", help="those made by hand, instead")
    parser.add_argument("--list", action="store_true", help="print them and test nothing")
    a = parser.parse_args()
    chosen = list(KNOWN) if a.known else drawn(a.mutants, a.seed)
    caught, alive, equivalent = 0, 0, 0
    for mutant in chosen:
        if a.list:
            print(mutant)
        elif (mutant.path, mutant.new.strip()) in EQUIVALENT:
            equivalent += 1
        elif survives(mutant):
            alive += 1
            print(f"survives: {mutant}", flush=True)
        else:
            caught += 1
    if not a.list:
        print(f"{len(chosen)} mutants: {caught} caught, {alive} survive, {equivalent} make no difference")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
