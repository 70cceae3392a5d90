"""What the chaos tool looks for, on a small program of its own."""

import json
import signal
import time

import numpy as np
import pytest

from tools import chaos

WRITES = """
import time
from pathlib import Path
from eva_rl.files import alone_in, write_json
with alone_in(Path("run")):
    for number in range({count}):
        write_json(Path("run/result.json"), {{"number": number, "much": list(range(2000))}})
        time.sleep(0.001)
"""


@pytest.mark.parametrize("name", sorted(chaos.SIGNALS))
def test_a_program_that_a_signal_ends_leaves_whole_files_and_can_run_again(tmp_path, name):
    endless = chaos.start(["-c", WRITES.format(count=100_000)], tmp_path)
    while not (tmp_path / "run" / "result.json").exists():
        assert endless.poll() is None, chaos.said(tmp_path)
        time.sleep(0.02)
    after = float(np.random.default_rng(sum(map(ord, name))).uniform(0, 0.2))
    assert chaos.interrupt(endless, after, chaos.SIGNALS[name])
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())["much"]) == 2000
    again = chaos.start(["-c", WRITES.format(count=2)], tmp_path)
    assert again.wait() == 0, chaos.said(tmp_path)
    assert chaos.left_over(again.pid, tmp_path) == []
    assert json.loads((tmp_path / "run" / "result.json").read_text())["number"] == 1


def test_a_process_and_a_lock_that_are_left_are_found(tmp_path, monkeypatch):
    process = chaos.start(["-c", "import time; time.sleep(60)"], tmp_path)
    (tmp_path / ".lock").touch()
    monkeypatch.setattr(chaos, "LINGER", 0.5)
    found = chaos.left_over(process.pid, tmp_path)
    assert found == [f"process {process.pid}", "file .lock"]
    assert chaos.interrupt(process, 0.0, [signal.SIGKILL])
    assert chaos.left_over(process.pid, tmp_path) == ["file .lock"]


def test_times_tell_no_files_apart_and_numbers_do(tmp_path):
    digests = []
    for number, (seconds, loss) in enumerate(((1.0, 0.5), (2.0, 0.5), (1.0, 0.6))):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "result.json").write_text(json.dumps({"seconds": {"train": seconds}, "loss": loss}))
        digests.append(chaos.contents(place))
    assert digests[0] == digests[1] != digests[2]


POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from eva_rl.cores import end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), end_with_parent)
    pool.submit(time.sleep, 0).result()
    Path("begun").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_workers_of_a_process_that_is_killed_end_with_it(tmp_path, number):
    (tmp_path / "pool.py").write_text(POOL)
    process = chaos.start(["pool.py"], tmp_path)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, chaos.said(tmp_path)
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    assert chaos.left_over(process.pid, tmp_path) == []
