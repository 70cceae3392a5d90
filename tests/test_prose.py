"""README and pages are written in short sentences, and the measure counts what a reader reads."""

from pathlib import Path

import pytest

from tools.prose import Prose, docstrings, measure, modules, of_docstrings, pages, sentences

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in pages()])
def test_a_page_is_written_in_short_sentences(page: str):
    assert measure(sentences((ROOT / page).read_text())).too_long() == []


@pytest.mark.parametrize("room", sorted({path.parent.relative_to(ROOT).as_posix() for path in modules()}))
def test_the_docstrings_of_a_room_are_written_in_short_sentences(room: str):
    of_modules = (of_docstrings(path) for path in modules() if path.parent == ROOT / room)
    assert sum(of_modules, Prose(0, 0, 0, 0)).too_long() == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_code_tables_headings_and_comments_are_no_prose():
    text = """---
title: front matter
---
# A heading. It counts; not.

<!-- a comment; not read. -->
One sentence with `a; code span` and a [link; kept](https://example.org/a;b). Another one,
over two lines!

```python
x = 1; y = 2
```

    indented = 1; code = 2

| a; b |
|---|

- an item
- a second item. With two sentences.
"""
    assert sentences(text) == [
        "One sentence with Code and a link; kept.",
        "Another one, over two lines!",
        "an item",
        "a second item.",
        "With two sentences.",
    ]
    assert measure(sentences(text)) == Prose(sentences=5, words=8 + 5 + 2 + 3 + 3, long=0, semicolons=1)


def test_numbers_and_dots_within_words_do_not_end_a_sentence():
    text = "The mean is 0.83 [0.79, 0.87]. `--help` lists them. See eva_rl.tasks for more; it is short."
    assert len(sentences(text)) == 3


def test_each_limit_is_named_when_it_is_exceeded():
    assert Prose(sentences=10, words=160, long=0, semicolons=0).too_long() == []
    [words] = Prose(sentences=10, words=170, long=0, semicolons=0).too_long()
    [long] = Prose(sentences=10, words=100, long=1, semicolons=0).too_long()
    [semicolons] = Prose(sentences=20, words=100, long=0, semicolons=2).too_long()
    assert Prose(sentences=20, words=100, long=0, semicolons=1).too_long() == []
    assert "17.0 words a sentence" in words
    assert "10.0 % of sentences over 35 words" in long
    assert "10.0 semicolons" in semicolons


def test_docstrings_are_those_of_modules_classes_functions_and_attributes():
    source = '"""M."""\nclass C:\n    """C."""\n    x: int\n    """X."""\n    def f(self):\n        """F."""\n        return "no"\n'
    assert sorted(docstrings(source)) == ["C.", "F.", "M.", "X."]
