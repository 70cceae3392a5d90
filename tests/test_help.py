"""Entry points answer `--help` at once, because what is heavy is imported where it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from selection import by_default

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("gymnasium", "minari", "peft", "scipy", "tensorboard", "torch", "transformers")
MOST = 6.0
"""Times as long as Python needs to import Hydra. Importing torch takes more than eight."""
SIMULATORS = ("ale_py", "dm_control", "gymnasium_robotics", "metaworld", "minigrid", "mujoco")
ENTRY_POINTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "eva_rl").rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text()  # no docstring that speaks of it
)


def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A Python process in the checkout, and the processor seconds it took: unlike time on the clock, these do not grow
    much when the machine is busy with something else."""
    before = os.times()
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return process, used


def imported_by(statement: str, candidates: tuple[str, ...]) -> list[str]:
    process, _ = run("-c", f"{statement}\nimport sys\nprint(*(m for m in {candidates} if m in sys.modules))")
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.parametrize("entry_point", by_default(["eva_rl.finetune", "eva_rl.report"], ENTRY_POINTS))
def test_help_answers_in_little_more_time_than_hydra_needs(entry_point: str):
    """Half a second where that was measured; a machine may be slower, and is so for Hydra too."""
    ratios = []
    for _ in range(3):
        _, yardstick = run("-c", "import hydra")
        process, used = run("-m", entry_point, "--help")
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip()
        ratios.append(used / yardstick)
        if ratios[-1] < MOST:
            break
    assert min(ratios) < MOST


def test_no_entry_point_imports_anything_heavy_at_its_top():
    assert imported_by(f"import {', '.join(ENTRY_POINTS)}", HEAVY + SIMULATORS) == []


def test_the_config_imports_nothing_heavy():
    assert imported_by("import eva_rl.config", HEAVY + SIMULATORS) == []


def test_listing_the_tasks_imports_no_simulator_and_no_torch():
    assert imported_by("from eva_rl.envs import domains\ndomains()", ("torch", *SIMULATORS)) == []
