"""Every command and Python block of README and documentation works; a comment before a block says how much of it is run.

    <!-- test: run steps=2 ... -->    a console block's commands are run, with these settings added
    <!-- test: slow steps=2 ... -->   the same, under `pytest -m slow`
    <!-- test: names -->              a Python block is compiled and its imports are made, no more

A console block without a comment is read: each command composes and checks its settings, and runs nothing. A Python block
without one is run. Blocks of a page that run do so in their order, in one folder, with one set of datasets and of Python's names.
"""

import argparse
import ast
import contextlib
import importlib.util
import re
import runpy
import shlex
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.plugins.sweeper import Sweeper

from eva_rl.config import command
from tools.prose import pages

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {"console", "python", "text", "yaml"}
BLOCK = re.compile(
    r"(?:^ *<!-- test: (?P<how>.*?) -->\n)?^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    line: int
    language: str
    text: str
    how: str
    """`run`, `slow`, `names` or nothing."""
    settings: tuple[str, ...]
    """What the test adds to the settings of a command."""

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line that begins with a prompt."""
        lines = [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]
        return [shlex.split(line, comments=True) for line in lines]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, markdown: str) -> Iterator[Block]:
    """The blocks of a page in their order, but for Sphinx's directives."""
    for found in BLOCK.finditer(markdown):
        if not found["language"].startswith("{"):
            how, *settings = shlex.split(found["how"] or "") or [""]
            line = markdown.count("\n", 0, found.start("text"))
            yield Block(page, line, found["language"], textwrap.dedent(found["text"]), how, tuple(settings))


PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in pages()}
BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
INLINE = [
    Block(page, text.count("\n", 0, found.start()) + 1, "console", f"$ {found[1]}", "", ())
    for page, text in PAGES.items()
    for found in re.finditer(r"(?<!`)`(python -m (?:eva_rl|benchmarks)\.[^`]+)`", text)
    if "=" in found[1] and not any(sign in found[1] for sign in "$…<")
]
"""Commands within a sentence or a table."""


def quick(words: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The words of a command with these settings in the place of its own."""
    if (
        words[1] != "-m"
        or words[2] in ("eva_rl.tasks", "eva_rl.report")
        or not words[2].startswith("eva_rl.")
        or words[-1].endswith("=?")
    ):
        return list(words)
    if "--help" in words:
        return list(words)
    replaced = {setting.partition("=")[0] for setting in settings}
    return [word for word in words if word.partition("=")[0] not in replaced] + list(settings)


def call(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m module ...` or `python examples/script.py ...` in this process.

    Raises:
        SystemExit: as the command ends, if not well.
    """
    script = words[1] != "-m"
    assert words[0] == "python", words
    monkeypatch.setattr(sys, "argv", list(words[1 if script else 2 :]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*is set to None")  # Minari asks for an author
        try:
            if script:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            else:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise


def execute(block: Block, names: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "python":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is set to None")
            exec(compile(block.text, str(block), "exec"), names)
    for words in block.commands if block.language == "console" else ():
        call(quick(words, block.settings), monkeypatch)


def values_in_turn(words: Sequence[str]) -> list[list[str]]:
    """The words of a grid, as so many commands that every value listed is the first of one."""
    listed = {i: word.partition("=")[2].split(",") for i, word in enumerate(words) if re.search(r"=[^\[{']*,", word)}
    longest = max(map(len, listed.values()), default=1)
    return [
        [f"{w.partition('=')[0]}={listed[i][n % len(listed[i])]}" if i in listed else w for i, w in enumerate(words)]
        for n in range(longest)
    ]


class Stopped(SystemExit):
    """A command was stopped where it would have begun to work."""


def read(words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Run a command up to where it has read its settings."""
    seen, parse_args, checked = [], argparse.ArgumentParser.parse_args, command.checked

    def checked_only(settings):
        seen.append(checked(settings))
        raise Stopped  # of a grid's runs the first is enough

    def parsed_only(parser, *arguments, **options):
        found = parse_args(parser, *arguments, **options)
        if parser.description == "Hydra":
            return found
        seen.append(found)
        raise Stopped

    monkeypatch.setattr(command, "checked", checked_only)
    monkeypatch.setattr(
        Sweeper, "validate_batch_is_legal", lambda *_: None
    )  # composes every run of a study before the first
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed_only)
    words = [word for word in words if not word.startswith(("hydra/launcher=", "hydra.launcher.", "+hydra.launcher."))]
    with contextlib.suppress(SystemExit):
        call(words, monkeypatch)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert not errors, errors
    assert seen or "--help" in words or (words[-1].endswith("=?") and out), err


def check_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What can be said of a command without running it."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [name for found in re.findall(r"\[(.*?)\]", words[-1]) for name in found.split(",")]
        assert asked, words
        assert set(asked) <= extras.keys(), words
    elif words[0] == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file(), words
    elif words[:2] == ["python", "-m"]:
        spec = importlib.util.find_spec(words[2])
        assert spec is not None, words
        source = Path(spec.origin).read_text()
        if words[2].startswith("eva_rl.") or "parse_args" in source:
            for command in values_in_turn(words):
                with monkeypatch.context() as patch:
                    read(command, patch, capsys)
    else:
        assert words[0] in {"tensorboard"} or words == [".", ".venv/bin/activate"], f"{words}: how is this checked?"


def test_every_block_says_what_it_is_and_how_it_is_tested():
    amiss = [str(b) for b in BLOCKS if b.language not in LANGUAGES or b.how not in ("", "run", "slow", "names")]
    amiss += [str(b) for b in BLOCKS if b.language == "console" and not b.commands]
    amiss += [f"{page}: a comment that stands before no block" for page, text in PAGES.items() if lost_comments(text)]
    assert not amiss


def lost_comments(markdown: str) -> int:
    outside_code = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", markdown)
    return outside_code.count("<!-- test:") - sum(found["how"] is not None for found in BLOCK.finditer(markdown))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "console" and b.how != "run"] + INLINE, ids=str)
def test_a_command_takes_its_settings(block: Block, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    for words in block.commands:
        check_command(words, monkeypatch, capsys)


RUN = [b for b in BLOCKS if b.how == "run" or (b.language == "python" and not b.how)]


@pytest.mark.parametrize("page", sorted({b.page for b in RUN}))
def test_the_blocks_of_a_page_that_run_end_well(page: str, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    names: dict[str, object] = {"__name__": "__main__"}
    for block in RUN:
        if block.page == page:
            execute(block, names, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.how == "slow"], ids=str)
def test_a_long_block_ends_well_when_shortened(block: Block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    execute(block, {}, monkeypatch)


NAMES = [b for b in BLOCKS if b.how == "names"]


@pytest.mark.parametrize("block", NAMES or [Block("no page", 0, "python", "", "names", ())], ids=str)
def test_what_a_block_imports_is_there(block: Block):
    tree = ast.parse(block.text)
    exec(compile(ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []), "", "exec"), {})


# --- the machine that does this


PAGE = """
<!-- test: run steps=2 'task=a b' -->
```console
$ python -m eva_rl.finetune task=x -m  # a remark
an output
```

- in a list:

  ```python
  x = 1
  ```

```{toctree}
page
```
"""


def test_blocks_are_found_with_their_comments():
    console, python = blocks("page", PAGE)
    assert (console.how, console.settings, console.line) == ("run", ("steps=2", "task=a b"), 3)
    assert console.commands == [["python", "-m", "eva_rl.finetune", "task=x", "-m"]]
    assert (python.language, python.text, python.how) == ("python", "x = 1\n", "")
    assert quick(console.commands[0], console.settings)[2:] == ["eva_rl.finetune", "-m", "steps=2", "task=a b"]
    assert values_in_turn(["-m", "a=1,2", "b=x,y,z", "c=[1,2]"]) == [
        ["-m", "a=1", "b=x", "c=[1,2]"],
        ["-m", "a=2", "b=y", "c=[1,2]"],
        ["-m", "a=1", "b=z", "c=[1,2]"],
    ]
    assert lost_comments(PAGE) == 0
    assert lost_comments("<!-- test: run -->\n\n" + PAGE) == 1


@pytest.mark.parametrize(
    "command",
    [
        "python -m eva_rl.finetune task=metaworld/hammer-v3 stepz=2",
        "python -m eva_rl.finetune task=metaworld/hammer-v3 adapter=eve",
        "python -m eva_rl.finetune -m task=metaworld/hammer-v3 adapter=eva,lora steps=2,x",
        "python -m eva_rl.finetune study=cw11",
        "python -m eva_rl.finetune",
        "python -m eva_rl.finetunes task=metaworld/hammer-v3",
        "python -m eva_rl.report",
        "python -m benchmarks.nothing",
        "make nothing",
        "pip install 'eva_rl[nothing]'",
        "curl nothing",
    ],
)
def test_a_command_that_would_not_work_is_found(command: str, monkeypatch, capsys):
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check_command(shlex.split(command), monkeypatch, capsys)
