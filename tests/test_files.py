"""Files and folders appear whole or not at all."""

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from eva_rl.errors import UserError, refused_path
from eva_rl.files import check_space, from_json, make_folder, read_json, replacing, write_json, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_with_its_content_and_nothing_else_beside_it(tmp_path):
    with replacing(tmp_path / "a" / "b" / "result.txt") as path:
        path.write_text("done")
        assert not (tmp_path / "a" / "b" / "result.txt").exists()
    assert (tmp_path / "a" / "b" / "result.txt").read_text() == "done"
    assert names(tmp_path / "a" / "b") == {"result.txt"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True])
def test_the_target_is_untouched_and_nothing_left_over_when_the_body_raises(tmp_path, folder, error):
    target = tmp_path / "target"
    inside = target / "content" if folder else target
    make_folder(inside.parent)
    inside.write_text("before")

    def write_half() -> None:
        with replacing(target) as path:
            if folder:
                path.mkdir()
            (path / "content" if folder else path).write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert inside.read_text() == "before"
    assert names(tmp_path) == {"target"}


def test_nothing_appears_where_nothing_was_when_the_body_raises(tmp_path):
    def write_half() -> None:
        with replacing(tmp_path / "target") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert names(tmp_path) == set()


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = make_folder(tmp_path / "target")
    (target / "old").write_text("old")
    with replacing(target) as path:
        path.mkdir()
        (path / "new").write_text("new")
    assert names(target) == {"new"}
    assert names(tmp_path) == {"target"}


@pytest.mark.parametrize("folder", [False, True])
def test_the_target_survives_a_body_that_writes_nothing(tmp_path, folder):
    target = tmp_path / "target"
    inside = target / "content" if folder else target
    make_folder(inside.parent)
    inside.write_text("before")
    with pytest.raises(OSError, match="target"), replacing(target):
        pass
    assert inside.read_text() == "before"
    assert names(tmp_path) == {"target"}


def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path):
    (make_folder(tmp_path / "elsewhere") / "old").write_text("old")
    target = tmp_path / "target"
    target.symlink_to(tmp_path / "elsewhere")
    with replacing(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    assert names(tmp_path / "elsewhere") == {"old"}


def write_below(path: Path) -> None:
    write_text(path / "file.txt", "text")


@pytest.mark.parametrize("write", [make_folder, write_below])
def test_a_folder_that_cannot_be_written_to_is_a_user_error_that_names_it(tmp_path, write):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(UserError, match=r"file/folder' can't be written to"):
        write(tmp_path / "file" / "folder")


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"name": "η", "scores": [0.5, None, True]}
    write_json(tmp_path / "content.json", content)
    assert read_json(tmp_path / "content.json") == content
    assert json.loads((tmp_path / "content.json").read_text()) == content


def test_content_that_is_not_json_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "content.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "content.json", {"a": object()})
    assert read_json(tmp_path / "content.json") == {"a": 1}


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe\x00"])
def test_a_missing_or_damaged_json_file_is_a_user_error_that_names_it(tmp_path, content):
    if content is not None:
        (tmp_path / "content.json").write_bytes(content)
    with pytest.raises(UserError, match=r"content\.json"):
        read_json(tmp_path / "content.json")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_refused_and_the_file_stays(tmp_path, number):
    path = tmp_path / "result.json"
    write_json(path, {"score": 1.0})
    with pytest.raises(UserError, match="NaN or infinite"):
        write_json(path, {"score": [number]})
    assert read_json(path) == {"score": 1.0}
    assert names(tmp_path) == {"result.json"}


@dataclass(frozen=True)
class Inner:
    """A section of a file."""

    size: float


@dataclass(frozen=True)
class Outer:
    """A file's content."""

    inner: Inner
    kind: Literal["a", "b"]
    rates: dict[str, float]
    names: tuple[str, ...] = ()
    many: tuple[Inner, ...] = ()
    count: int | None = None


def test_json_becomes_the_dataclass_it_came_from():
    whole = Outer(Inner(1.0), "b", {"x": 2.0}, ("n",), (Inner(0.5),), 3)
    assert from_json(Outer, json.loads(json.dumps(asdict(whole)))) == whole
    found = from_json(Outer, {"inner": {"size": 1}, "kind": "a", "rates": {}, "count": None})
    assert found == Outer(Inner(1.0), "a", {})
    assert type(found.inner.size) is float


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"inner": None}, "inner"),
        ({"inner": {"size": "1"}}, "inner.size"),
        ({"inner": {"size": True}}, "inner.size"),
        ({"inner": {"size": float("inf")}}, "inner.size"),
        ({"inner": {}}, "size"),
        ({"kind": "c"}, "kind"),
        ({"rates": {"x": None}}, "rates.x"),
        ({"names": "n"}, "names"),
        ({"names": [1]}, "names.0"),
        ({"many": [{"size": 1.0}, []]}, "many.1"),
        ({"count": 1.5}, "count"),
        ({"other": 1}, "other"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_by_its_place(change, place):
    content = {"inner": {"size": 1.0}, "kind": "a", "rates": {}} | change
    with pytest.raises(TypeError, match=place):
        from_json(Outer, content)


def test_a_full_disk_is_found_out_before_a_library_writes(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    check_space(tmp_path, 2**20)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="There is no space left for"):
        check_space(tmp_path, 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_takes_no_more_is_told_as_no_space(tmp_path, number):
    with pytest.raises(UserError, match="There is no space left for"), replacing(tmp_path / "model"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("Can't decrement id ref count (file write failed: errno = 28, error message = 'x')", True),
        (f"Error while serializing: I/O error: File too large (os error {errno.EFBIG})", True),
        ("the server said 413: File too large", False),
    ],
)
def test_a_librarys_words_for_a_full_disk_are_told_from_others(tmp_path, said, full):
    with pytest.raises(UserError if full else RuntimeError), replacing(tmp_path / "model"):
        raise RuntimeError(said)


def test_a_file_system_that_cannot_tell_its_space_is_no_full_one(tmp_path, monkeypatch):
    def unknown(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match="There is no space left for"):
        check_space(tmp_path, 2**60)


def test_a_full_disk_that_nobody_looked_for_is_a_sentence_at_the_door():
    sentence = refused_path(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "multirun.yaml"))
    assert sentence == "There is no space left for 'multirun.yaml': free some, or write elsewhere."
    assert refused_path(OSError(errno.EIO, "x", "y")) == ""
