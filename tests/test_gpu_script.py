"""The script for a machine with a GPU, in small on the CPU."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import language_model
from eva_rl.model import load_base

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_in_small_each_part_is_done_and_what_comes_back_is_whole(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh"],
        cwd=ROOT,
        env=os.environ | {"SMOKE": "1", "OUT": str(out), "WORK": str(work), "LIMIT": "1200", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    log = (out / "log.txt").read_text()
    assert run.returncode == 0, log
    for part in ("init-llama-tiny", "collect", "pretrain", "training", "rollout"):
        assert f"{part}: done" in log, log
    tables = (out / "tables.md").read_text()
    for command in ("language_model --model llama-tiny", "training", "rollout"):
        assert f"python -m benchmarks.{command}" in tables
    parts = sorted(out.glob("mt40-paper.tar.*"))
    whole = tmp_path / "whole.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as archive:
        archive.extractall(tmp_path, filter="data")
    assert load_base(str(tmp_path / "mt40-paper"), torch.device("cpu")).model


def test_the_best_subspace_of_a_wide_layer_is_found_by_iteration(monkeypatch):
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    scatter = basis * 0.8 ** torch.arange(60) @ basis.T
    monkeypatch.setattr(language_model, "EXACT", 50)
    torch.testing.assert_close(language_model.best(scatter, 4), (0.8 ** torch.arange(4)).double(), rtol=1e-6, atol=0)


def test_peft_is_stopped_where_its_time_is_up():
    case = language_model.Case("llama-tiny", 2, 1.0, 2, "cpu", cap=0.0)
    found, passes = language_model.initialise("peft", case, *language_model.load(case))
    assert found is None
    assert passes == 0
