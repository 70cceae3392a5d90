"""The scripts in `examples/` run, and are short."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import InlineExecutor

from eva_rl import envs
from eva_rl.data import collection, load_dataset

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Run an example with these arguments, in a folder of its own: what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_forty_lines_and_says_how_it_is_run(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert f"`python examples/{path.name}" in path.read_text()


def test_eva_finds_directions_for_every_layer_of_a_hugging_face_model(script):
    *layers, last = script("eva_on_hugging_face.py").splitlines()
    assert len(layers) == 4
    ranks = [int(re.search(r": rank (\d+), ", line)[1]) for line in layers]
    assert sum(ranks) == 4 * len(ranks)  # shared out
    assert max(ranks) > 4
    assert float(last.rpartition(" ")[2]) < 5.5  # log(256) = 5.55, before it learned anything


@pytest.mark.slow
def test_a_grid_is_run_and_compared(script):
    quick = ["demonstrations=2", "steps=2", "episodes=2", "training.batch_size=2", "workers=0"]
    out = script("grid_and_report.py", *quick)
    assert len(re.findall(r"^ *(bc|lora|eva): success rate .* over 2 runs$", out, re.MULTILINE)) == 3
    assert re.search(r"^best: (bc|lora|eva), seed [01], in runs/example/", out, re.MULTILINE)


def test_the_expert_of_a_new_domain_solves_its_task(script):
    assert script("new_domain.py") == "solved\n"


def test_a_new_domain_is_one_file_in_the_folder_of_domains(monkeypatch, tmp_path, run):
    shutil.copy(EXAMPLES / "new_domain.py", tmp_path / "corridor.py")
    monkeypatch.setattr(envs, "__path__", [*envs.__path__, str(tmp_path)])
    monkeypatch.setattr(collection, "ProcessPoolExecutor", InlineExecutor)
    for cache in (envs.domains, collection._environment):
        cache.cache_clear()
    try:
        status, _, err = run("collect", "task=corridor/train", "episodes=3", "noise=0")
        assert status == 0, err
        [dataset] = collection.collect([collection.Recipe("corridor/Walk", 3, (0.0,))])
        assert load_dataset(dataset, "corridor/Walk").statistics().success_rate == 1.0
    finally:
        for cache in (envs.domains, collection._environment):
            cache.cache_clear()
        sys.modules.pop("eva_rl.envs.corridor", None)
