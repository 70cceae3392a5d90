"""The library in a user's own script: processes and the line that keeps them from running it once more."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eva_rl.cores import refuse_while_imported
from eva_rl.data import Recipe, collect
from eva_rl.rollout import Simulators

WITHOUT_GUARD = """
from eva_rl.data import find_source
print("at work")
find_source("pointmaze/UMaze", None).dataset(2, 0)
"""


def test_a_script_without_the_guard_that_collects_ends_with_what_to_do(tmp_path: Path, datasets_root: Path):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_GUARD)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert 'put what a script runs below `if __name__ == "__main__":`' in run.stderr.splitlines()[-1]
    assert not (datasets_root / "pointmaze").exists()


@pytest.mark.parametrize("work", [lambda: collect([Recipe("pointmaze/UMaze", 1)]), Simulators, refuse_while_imported])
def test_a_worker_that_imports_the_script_does_not_do_its_work(work, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="if __name__ =="):
        work()
