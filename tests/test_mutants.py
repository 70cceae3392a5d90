"""The mutants' tool makes wrong code of right code, one change at a time."""

import ast

import pytest

from tools import mutants


@pytest.mark.parametrize("mutant", mutants.KNOWN, ids=lambda mutant: mutant.path)
def test_the_line_that_a_known_mutant_changes_is_there_once(mutant):
    source = (mutants.ROOT / mutant.path).read_text()
    assert source.count(mutant.old) == 1
    ast.parse(source.replace(mutant.old, mutant.new))
    assert (mutants.ROOT / mutant.tests[0]).is_file()


def test_drawn_mutants_are_programs_that_differ_in_one_line_and_come_from_the_seed():
    found = mutants.drawn(10, seed=1)
    assert found == mutants.drawn(10, seed=1) != mutants.drawn(10, seed=2)
    for mutant in found:
        lines = (mutants.ROOT / mutant.path).read_text().splitlines(keepends=True)
        assert lines[mutant.line - 1] == mutant.old != mutant.new
        lines[mutant.line - 1] = mutant.new
        ast.parse("".join(lines))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", "a <= b"),
        ("a + b", "a - b"),
        ("a and b", "a or b"),
        ("not a", "a"),
        ("True", "False"),
        ("3", "4"),
        ("a if b else c", "c if b else a"),
    ],
)
def test_a_change_is_small(source, expected):
    [changed] = mutants.changes(ast.parse(source, mode="eval").body)
    assert ast.unparse(changed) == expected


def test_strings_and_calls_are_left_alone():
    for source in ("'a'", "f(x)", "x"):
        assert list(mutants.changes(ast.parse(source, mode="eval").body)) == []
