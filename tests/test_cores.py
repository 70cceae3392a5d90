"""The cores that a process may use."""

import os
from pathlib import Path

import pytest

from eva_rl import cores
from eva_rl.cores import available_cores, cgroup_quota


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize(("text", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("nonsense", None)])
def test_the_quota_of_version_2_is_read(tmp_path, text, quota):
    write(tmp_path / "own", "0::/box/inner")
    write(tmp_path / "fs/box/inner/cpu.max", text)
    assert cgroup_quota(tmp_path / "fs", tmp_path / "own") == quota


def test_the_tightest_of_the_groups_a_process_is_in_counts(tmp_path):
    write(tmp_path / "own", "0::/box/inner")
    write(tmp_path / "fs/box/inner/cpu.max", "400000 100000")
    write(tmp_path / "fs/box/cpu.max", "200000 100000")
    assert cgroup_quota(tmp_path / "fs", tmp_path / "own") == 2.0


@pytest.mark.parametrize(("microseconds", "quota"), [("250000", 2.5), ("-1", None)])
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_version_1_is_read(tmp_path, microseconds, quota, folder):
    write(tmp_path / "own", "4:memory:/other\n3:cpu,cpuacct:/docker/abc\n0::/")
    for name, text in (("quota", microseconds), ("period", "100000")):
        write(tmp_path / "fs" / folder / "docker/abc" / f"cpu.cfs_{name}_us", text)
    assert cgroup_quota(tmp_path / "fs", tmp_path / "own") == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cgroup_quota(tmp_path / "fs", tmp_path / "own") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.9, 2), (0.5, 1), (64.0, 8)])
def test_cores_beyond_the_quota_do_not_count(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
    assert available_cores() == expected
