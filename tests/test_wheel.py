"""The wheel, installed without the repository: it has its default base, and fine-tunes."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FINETUNE = ["-m", "eva_rl.finetune", "task=pointmaze/UMaze", "demonstrations=1", "steps=2", "training.batch_size=2"]


def output_of(*command: object, **options: object) -> str:
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_an_installed_wheel_fine_tunes_its_own_base(tmp_path: Path, datasets_root: Path):
    source, venv = tmp_path / "source", tmp_path / "venv"
    # What git has: a folder build/ of an earlier build would go into the wheel.
    output_of("git", "clone", "--quiet", "--no-hardlinks", ROOT, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    output_of(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path, source)
    [wheel] = tmp_path.glob("*.whl")
    output_of(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    output_of(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel)
    # The other packages are those of this environment, found after the wheel's; what they install in editable mode isn't.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    where = output_of(python, "-c", "import eva_rl; print(eva_rl.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(venv)
    here = ["episodes=1", "workers=0", f"run_dir={tmp_path / 'run'}"]
    output_of(python, *FINETUNE, *here, cwd=tmp_path, env=environment)

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["base"]) == ("complete", "mt40-small")
    card = (site / "eva_rl" / "checkpoints" / "mt40-small" / "README.md").read_text()
    assert card == (ROOT / "checkpoints" / "mt40-small" / "README.md").read_text()
