"""`runs.jsonl`: finished runs as one row each, read as their folders would be."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from results import result, write_run

from eva_rl.errors import UserError
from eva_rl.run.rows import find_row, read_rows, write_rows
from eva_rl.study import compare, document, pack, read_results
from eva_rl.study.runs import to_csv


@pytest.fixture
def study(tmp_path) -> Path:
    folder = tmp_path / "study"
    for adapter, success in (("none", 0.1), ("lora", 0.5), ("eva", 0.7)):
        for seed in range(2):
            before = 0.1 if adapter == "none" else None
            write_run(folder / adapter / f"dummy/A-{seed}", result(adapter, seed=seed, success=success, before=before))
    return folder


def names(file: Path) -> list[str]:
    return [row.run for row in read_rows(file)]


def said(folder: Path) -> tuple[str, str, list[str]]:
    """All that a report of a folder has."""
    found = compare([folder])
    return document(found, [["scores"]] * len(found.studies)), to_csv(found.runs), found.amiss


def test_a_report_is_the_same_of_folders_of_rows_and_of_both(study):
    before, of_eva = said(study), said(study / "eva")
    assert pack(study) == [f"{study / 'runs.jsonl'}: 6 runs were added"]
    assert said(study) == before
    shutil.rmtree(study / "lora")
    assert said(study) == before
    shutil.rmtree(study / "eva" / "dummy")
    shutil.rmtree(study / "none")
    assert said(study) == before
    assert said(study / "eva") == of_eva  # whose rows stand above it


def test_rows_are_sorted_hold_all_of_a_result_and_stay_the_same_bytes(study):
    pack(study)
    text = (study / "runs.jsonl").read_text()
    assert names(study / "runs.jsonl") == sorted(f"{a}/dummy/A-{s}" for a in ("none", "lora", "eva") for s in (0, 1))
    first = json.loads(text.splitlines()[0])
    assert next(iter(first)) == "run"
    assert first.pop("run") == "eva/dummy/A-0"
    assert first == json.loads((study / "eva/dummy/A-0/result.json").read_text())
    assert pack(study) == []
    assert (study / "runs.jsonl").read_text() == text


def test_runs_copied_in_later_join_the_rows(study):
    pack(study)
    for adapter in ("none", "lora", "eva"):
        shutil.rmtree(study / adapter)
    write_run(study / "dora" / "dummy" / "A-0", result("dora"))
    assert len(read_results([study])[0]) == 7
    assert pack(study) == [f"{study / 'runs.jsonl'}: 1 runs were added"]
    assert names(study / "runs.jsonl")[0] == "dora/dummy/A-0"
    shutil.rmtree(study / "dora")
    assert len(read_results([study])[0]) == 7


def test_only_finished_and_whole_runs_are_packed(study):
    write_run(study / "begun", result(seed=5) | {"status": "partial"})
    write_run(study / "wrong", result(seed=6) | {"steps": 3})
    (study / "empty").mkdir()
    (study / "empty" / ".lock").touch()
    pack(study)
    assert len(names(study / "runs.jsonl")) == 6
    left_out = read_results([study])[1]
    assert [sentence.split(": ")[0] for sentence in left_out] == [str(study / n) for n in ("begun", "empty", "wrong")]


def test_a_folder_packed_above_or_below_is_not_packed_twice(study):
    pack(study / "eva")
    assert pack(study) == [f"{study / 'runs.jsonl'}: 4 runs were added"]
    write_run(study / "eva" / "late", result("eva", seed=7))
    assert pack(study) == [f"{study / 'eva' / 'runs.jsonl'}: 1 runs were added"]  # the nearest one
    assert pack(study / "lora") == []
    assert len(read_results([study])[0]) == 7


def test_a_folder_with_another_result_than_its_row_is_named_and_the_row_stays(study):
    pack(study)
    changed = study / "eva" / "dummy" / "A-0"
    (changed / "result.json").write_text(json.dumps(result("eva", success=0.9)))
    results, [sentence] = read_results([study])
    assert sentence == f"{changed}: left out, as {study / 'runs.jsonl'} has another result of it"
    assert {r.scores["success_rate"].mean for r in results if r.adapter == "eva"} == {0.7}


BROKEN = [
    "{",
    "[]",
    "3",
    "null",
    '{"task": "x"}',
    '{"run": 3}',
    '{"run": "../out"}',
    '{"run": "/out"}',
    '{"run": ""}',
    "[" * 99_999,
]


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:20])
def test_a_line_that_is_no_row_is_named_and_never_written_over(study, line):
    pack(study)
    file = study / "runs.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    kept = file.read_text()
    results, [sentence] = read_results([study])
    assert len(results) == 6
    assert sentence == f"{file}, line 2: no row of a run, or its second, left out"
    write_run(study / "late", result(seed=9))
    with pytest.raises(UserError, match="line 2, is no row of a run"):
        pack(study)
    assert file.read_text() == kept


def test_a_row_whose_result_is_malformed_is_named(study):
    write_rows(study / "runs.jsonl", {"odd": result(seed=8) | {"seconds": {}}})
    results, [sentence] = read_results([study])
    assert len(results) == 6
    assert sentence.startswith(f"{study / 'odd'}: left out, as its result.json is not as a run writes it (seconds.init")


def test_another_programs_rows_above_a_folder_are_none_of_its_business(study):
    (study.parent / "runs.jsonl").write_text('{"id": 1}\n{"run": "elsewhere", "id": 2}\nnot JSON\n')
    results, left_out = read_results([study])
    assert (len(results), left_out) == (6, [])
    assert find_row(study / "lora" / "dummy" / "A-0") is None


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), st.dictionaries(st.text(), st.floats(0, 1))
    )
)
def test_a_row_is_found_by_its_folder_alone_whatever_that_is_called(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("rows")
    whole = {name: own for name, own in contents.items() if str(Path(name)) == name != "." and name.isprintable()}
    whole = {name: own for name, own in whole.items() if ".." not in Path(name).parts and not Path(name).is_absolute()}
    rows = {name: {k: v for k, v in own.items() if k != "run"} for name, own in whole.items()}
    write_rows(folder / "runs.jsonl", rows)
    for name, own in rows.items():
        row = find_row(folder / name)
        assert row is not None
        assert (row.run, row.content) == (name, own)
    assert find_row(folder / "such a one is not there") is None
