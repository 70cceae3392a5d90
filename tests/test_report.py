import json
import subprocess
import sys
from pathlib import Path

import pytest

from eva_rl.errors import UserError
from eva_rl.report import Stopwatch, markdown
from eva_rl.report.runs import read_results, table


def write_run(folder: Path, **changes: object) -> Path:
    rate = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 20}
    result = {
        "task": "dummy/Steps-v0",
        "adapter": "eva",
        "base": "tiny",
        "demonstrations": 4,
        "steps": 10,
        "learning_rate": 1e-3,
        "seed": 0,
        "success_rate": rate,
        "normalized_score": None,
        "zero_shot": {"success_rate": {**rate, "mean": 0.0}},
        "seconds": {"init": 1.2, "train": 30.4},
        "status": "complete",
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "result.json").write_text(json.dumps(result | changes))
    return folder


def test_the_table_has_a_row_a_run_and_the_mean(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", task="dummy/Other-v0", success_rate={"mean": 1.0, "low": 0.8, "high": 1.0, "n": 20})
    results, left_out = read_results([tmp_path])
    assert left_out == []
    lines = table(results).splitlines()
    assert len(lines) == 2 + 2 + 1
    assert "0.50 [0.25, 0.75]" in lines[3]
    assert "mean of 2 runs" in lines[4]
    assert "0.750" in lines[4]


def test_runs_of_other_settings_are_not_averaged_together(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", learning_rate=1e-2)
    means = [line for line in table(read_results([tmp_path])[0]).splitlines() if "mean of" in line]
    assert ["mean of 1 runs" in line for line in means] == [True, True]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "partial"}'])
def test_runs_that_are_not_complete_are_named_and_left_out(tmp_path, content):
    write_run(tmp_path / "whole")
    broken = write_run(tmp_path / "broken")
    (broken / "result.json").write_text(content)
    results, left_out = read_results([tmp_path])
    assert len(results) == 1
    assert [str(broken) in sentence for sentence in left_out] == [True]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_results([tmp_path / "nowhere"])


def test_the_command_answers_an_empty_folder_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "eva_rl.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: There is no complete fine-tuning run in these folders.\n"


def test_columns_of_a_markdown_table_are_aligned():
    lines = markdown(["a", "long header"], [("x", None), ("longer", 1)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[2].strip() == "–"


def test_a_phase_within_another_does_not_count_twice(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Stopwatch("train", "rollout")
    with clock("train"), clock("rollout"):
        pass
    assert clock.seconds == {"train": 7.0, "rollout": 3.0}
