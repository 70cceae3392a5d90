"""docs/methods.md says what there is: the same as the files of configs/."""

import re
from pathlib import Path

import pytest

from eva_rl.config import choices

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("group", ["adapter", "allocator", "optimizer"])
def test_the_page_has_the_line_of_every_choice_and_no_other(group):
    _, _, section = PAGE.partition(f"| `{group}=` |")
    told = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n\n")[0], re.M))
    lines = (line.partition(" ") for line in choices(group, "finetune").splitlines())
    assert told == {name: line.strip() for name, _, line in lines}


def test_what_is_left_out_has_a_reason_and_is_not_there():
    rows = re.findall(r"^\| ([^|`]+) \| ([^|]+) \|$", PAGE.partition("## Left out")[2], re.M)
    left_out = dict(rows[1:])
    assert len(left_out) > 20
    assert all(len(reason.split()) > 1 for reason in left_out.values())
    there = {
        line.split()[0]
        for group in ("adapter", "allocator", "optimizer")
        for line in choices(group, "finetune").splitlines()
    }
    names = {name.strip().lower().replace("-", "_") for name in ", ".join(left_out).split(",")}
    assert not names & there
