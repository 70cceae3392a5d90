"""A sample of the fuzzer's inputs, and that it finds what there is to find."""

import time
from collections import Counter

import numpy as np
import pytest

from eva_rl.errors import UserError
from tools import fuzz
from tools.fuzz_targets import TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_damaged_inputs_are_used_or_refused_in_a_sentence(tmp_path, target):
    TARGETS[target].make(tmp_path / "whole")
    found = [(number, *fuzz.run_input(target, tmp_path / "whole", number, seed=1)) for number in range(12)]
    assert [one for one in found if one[-1] not in ("used", "refused")] == []
    assert Counter(one[-1] for one in found)["refused"] > 0


@pytest.mark.parametrize("target", sorted(name for name in TARGETS if TARGETS[name].words is None))
def test_a_whole_input_is_used(tmp_path, target):
    TARGETS[target].make(tmp_path / "whole")
    assert fuzz.outcome(lambda: TARGETS[target].use(tmp_path / "whole")) == "used"


def test_a_traceback_and_a_hang_and_an_answer_of_two_lines_are_found(monkeypatch):
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert "KeyError: 'x'" in fuzz.outcome(lambda: fail(KeyError("x")))
    assert fuzz.outcome(lambda: time.sleep(5)) == "hang"
    assert fuzz.outcome(lambda: fail(UserError("one sentence"))) == "refused"
    assert fuzz.outcome(lambda: fail(UserError("one\ntwo"))).startswith("several lines")


def test_an_input_is_the_same_whenever_it_is_made(tmp_path):
    contents = []
    for name in ("one", "two"):
        TARGETS["run"].make(tmp_path / name)
        rng = np.random.default_rng(5)
        what = [fuzz.damaged(tmp_path / name, rng) for _ in range(4)]
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append((what, [path.read_bytes() for path in files]))
    assert contents[0] == contents[1]
