"""How long the sentences are that a user reads: `python -m tools.prose [FILE ...]`.

By default these are README, docs and docstrings. Only prose is counted: no code blocks, tables, headings or comments. A
code span counts as one word, and an item of a list as a sentence where it has no full stop.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = 35
"""Words. A sentence of more is hard to read."""


@dataclass(frozen=True)
class Prose:
    """What was counted in a text."""

    sentences: int
    words: int
    long: int
    """Sentences of more than `LONG` words."""
    semicolons: int

    @property
    def words_a_sentence(self) -> float:
        return self.words / max(self.sentences, 1)

    @property
    def share_long(self) -> float:
        return self.long / max(self.sentences, 1)

    @property
    def semicolons_a_hundred(self) -> float:
        return 100 * self.semicolons / max(self.sentences, 1)

    def __add__(self, other: Prose) -> Prose:
        return Prose(
            self.sentences + other.sentences,
            self.words + other.words,
            self.long + other.long,
            self.semicolons + other.semicolons,
        )

    def too_long(self) -> list[str]:
        """The limits that this text exceeds, each as a sentence. One semicolon is no habit, on the shortest page."""
        limits = [
            ("words a sentence", self.words_a_sentence, 16.0),
            (f"% of sentences over {LONG} words", 100 * self.share_long, 3.0),
            ("semicolons a hundred sentences", self.semicolons_a_hundred * (self.semicolons > 1), 3.0),
        ]
        return [f"{value:.1f} {what}, at most {most:.0f} wanted" for what, value, most in limits if value > most]


def sentences(markdown: str) -> list[str]:
    """The sentences of a Markdown text, without what is no prose."""
    text = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)  # front matter
    text = re.sub(r"^( *)(```+|~~~+).*?^ *\2 *$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^    .*$", "\n", text, flags=re.MULTILINE)  # indented code
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ {0,3}(#.*|\|.*|\(\S+\)=|:::.*)$", "\n", text, flags=re.MULTILINE)  # headings, tables, labels
    text = re.sub(r"^ *([-*+]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)  # an item is a paragraph of its own
    text = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "Code", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)  # images
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)  # links
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.replace("*", "").split())
        parts = re.split(r"(?<=[.!?])[\"')\]]* (?=[\"'(\[]*[A-Z0-9])", joined)
        found += [part for part in parts if re.search(r"[A-Za-z]", part)]
    return found


def measure(texts: Iterable[str]) -> Prose:
    """The prose of these sentences."""
    counts = [(len([w for w in text.split() if re.search(r"\w", w)]), text.count(";")) for text in texts]
    return Prose(
        len(counts),
        sum(words for words, _ in counts),
        sum(words > LONG for words, _ in counts),
        sum(semicolons for _, semicolons in counts),
    )


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module and of all within it, those of attributes too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines = [line.strip() for line in node.value.value.splitlines()]
            yield "\n".join("" if line in {"Args:", "Returns:", "Raises:", "Yields:"} else line for line in lines)


def of_docstrings(module: Path) -> Prose:
    """The prose of a module's docstrings."""
    return measure(sentence for text in docstrings(module.read_text()) for sentence in sentences(text))


def modules() -> list[Path]:
    """What is documented by its docstrings."""
    return [path for folder in ("eva_rl", "envs") for path in sorted((ROOT / folder).rglob("*.py"))]


def pages() -> list[Path]:
    """README, CONTRIBUTING and the pages of the documentation."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    given = [Path(name) for name in sys.argv[1:]]
    files = given or pages()
    rows = [(path.name, measure(sentences(path.read_text()))) for path in files]
    if not given:
        rows.append(("README and docs", sum((prose for _, prose in rows), Prose(0, 0, 0, 0))))
        rows.append(("docstrings", sum((of_docstrings(path) for path in modules()), Prose(0, 0, 0, 0))))
    width = max(len(name) for name, _ in rows)
    print(f"{'':<{width}}  sentences  words each  over {LONG}  semicolons a hundred")
    for name, prose in rows:
        figures = f"{prose.sentences:>9}  {prose.words_a_sentence:>10.1f}  {prose.share_long:>7.1%}"
        print(f"{name:<{width}}  {figures}  {prose.semicolons_a_hundred:>20.1f}")


if __name__ == "__main__":
    main()
