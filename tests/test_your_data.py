"""What docs/your_data.md tells a user to type works as it stands, and so does the example."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from eva_rl.convert.formats import formats
from eva_rl.data import load_dataset

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "your_data.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def test_every_command_of_the_page_runs_in_its_order(run, base, tmp_path):
    (tmp_path / "logs").mkdir()
    header, *rows = blocks("text")[0].splitlines()
    for number in range(3):
        (tmp_path / f"logs/{number}.csv").write_text("\n".join([header, *rows * 4]) + "\n")
    (tmp_path / "columns.yaml").write_text(blocks("yaml")[0])
    commands = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    assert len(commands) == 3
    quick = {"finetune": [f"base={base}", "adapter=lora", "steps=1", "training.batch_size=2"], "convert": []}
    for command in commands:
        _, _, module, *words = shlex.split(command)
        name = module.removeprefix("eva_rl.")
        status, out, err = run({"convert": "convert.__main__"}.get(name, name), *words, *quick[name])
        assert status == 0, err
        assert name != "convert" or "| episodes" in out


def test_every_python_block_of_the_page_runs():
    [block] = blocks("python")
    exec(block, {})
    assert load_dataset("mine/arrays-v0", "mine").lengths.tolist() == [20] * 5


def test_every_format_has_its_line_on_the_page():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(formats())


def test_the_example_writes_a_dataset_in_at_most_forty_lines(monkeypatch, capsys):
    path = ROOT / "examples" / "own_dataset.py"
    assert len(path.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path), "mine/example-v0"])
    runpy.run_path(str(path), run_name="__main__")
    assert "episodes=8" in capsys.readouterr().out
    assert load_dataset("mine/example-v0", "mine").lengths.tolist() == [30] * 8


@pytest.mark.parametrize("word", ["trust_environment", "max_episode_steps"])
def test_the_settings_that_the_page_names_are_there(word):
    from eva_rl import config

    assert word in PAGE
    assert all(word in config.setting_names(schema) for schema in (config.FinetuneConfig, config.EvaluateConfig))
