"""Grids of fine-tuning runs: through Hydra's multirun and its launchers, from several processes, killed and begun again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from eva_rl.config import FinetuneConfig, choices, parse, run_folder
from eva_rl.errors import UserError
from eva_rl.files import InUseError, alone_in
from eva_rl.study import pack

TASK = "dummy/Steps-v0"
QUICK = ["steps=2", "episodes=2", "workers=0", "training.batch_size=4", "training.warmup=1", "resume=true"]
FOLDERS = "run_dir=grid/${adapter.name}-${seed}"


def finished(folder: Path) -> dict[str, dict]:
    """The results below a folder, by the names of their runs."""
    found = {
        path.parent.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("result.json")
    }
    return {name: result for name, result in found.items() if result["status"] == "complete"}


def without_times(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in ("seconds", "peak_memory_mib")}


def test_a_grid_has_a_run_for_each_combination_and_finished_ones_are_not_run_again(run, base):
    arguments = ["-m", f"task={TASK}", f"base={base}", "adapter=eva,lora", "seed=0,1", FOLDERS, *QUICK]
    status, _, err = run("finetune", *arguments)
    assert status == 0, err
    assert set(finished(Path("grid"))) == {"eva-0", "eva-1", "lora-0", "lora-1"}
    before = {path: path.stat().st_mtime_ns for path in Path("grid").rglob("result.json")}
    status, out, err = run("finetune", *arguments)
    assert status == 0, err
    assert out.count("finished earlier") == 4
    assert {path: path.stat().st_mtime_ns for path in Path("grid").rglob("result.json")} == before


def test_a_run_that_stands_in_a_row_is_finished_and_refused_where_it_differs(run, base):
    arguments = ["-m", f"task={TASK}", f"base={base}", "adapter=lora", "seed=0,1", FOLDERS, *QUICK]
    status, _, err = run("finetune", *arguments)
    assert status == 0, err
    assert pack(Path("grid")) == ["grid/runs.jsonl: 2 runs were added"]
    shutil.rmtree("grid/lora-0")
    shutil.rmtree("grid/lora-1")
    status, out, err = run("finetune", *arguments)
    assert status == 0, err
    assert out.count("finished earlier") == 2
    assert [path.name for path in Path("grid").iterdir()] == ["runs.jsonl"]
    status, _, err = run("finetune", *arguments, "training.batch_size=3")
    assert status == 1
    assert "grid/runs.jsonl', in the row of 'lora-0', is the result of a run with training.batch_size=4 (now 3)" in err
    alone = [f"task={TASK}", f"base={base}", "adapter=lora", "run_dir=grid/lora-0", *QUICK, "resume=false"]
    status, _, err = run("finetune", *alone)
    assert status == 1
    assert "grid/runs.jsonl' has the result of 'lora-0': set another run_dir, or resume=true." in err
    assert [path.name for path in Path("grid").iterdir()] == ["runs.jsonl"]


def test_the_study_of_adapters_has_every_adapter_that_works_on_a_base():
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        config = compose("finetune", ["study=adapters"], return_hydra_config=True)
    known = {line.split()[0] for line in choices("adapter", "finetune").splitlines()}
    assert set(config.hydra.sweeper.params.adapter.split(",")) == known - {"bc", "peft", "scratch"}


def test_a_run_that_fails_is_named_and_the_others_go_on(run, base):
    grid = [f"task={TASK}", f"base={base}", "adapter=eva,lora", "demonstrations=4,-1", FOLDERS + "-${demonstrations}"]
    status, _, err = run("finetune", "-m", *grid, *QUICK)
    assert status == 1
    assert "Traceback" not in err
    assert err.count("error: episodes to collect must be at least 1, got -1") == 2
    assert f"(task={TASK} base={base} adapter=eva demonstrations=-1" in err
    assert "error: Not all runs of the grid ended well" in err
    assert set(finished(Path("grid"))) == {"eva-0-4", "lora-0-4"}


def test_the_same_grid_again_goes_on_where_its_settings_say_and_another_begins_anew(run, base):
    grid = ["-m", f"task={TASK}", f"base={base}", "adapter=lora", "seed=0,1", *QUICK[:-1]]
    for _ in range(2):
        status, out, err = run("finetune", *grid)
        assert status == 0, err
    assert out.count("finished earlier") == 2
    status, _, err = run("finetune", *grid, "resume=false")
    assert status == 1
    assert err.count("of an earlier run: set resume=true") == 2
    assert run("finetune", *grid, "episodes=3")[0] == 0
    names = [path.parent.name for path in Path("runs/grid/lora/dummy").rglob("result.json")]
    assert sorted(name[:11] for name in names) == ["Steps-v0-0-"] * 2 + ["Steps-v0-1-"] * 2


@pytest.mark.parametrize("task", ["task=dummy/all", f"++task='dummy/all', {TASK}", "task=choice('dummy/all')"])
def test_a_grid_has_a_run_for_each_task_of_a_split(run, base, task):
    arguments = [f"base={base}", "adapter=none", "demonstrations=4", "episodes=0", *QUICK[2:-1]]
    status, _, err = run("finetune", "-m", task, *arguments)
    assert status == 0, err
    assert {result["task"] for result in finished(Path("runs/grid")).values()} == {TASK, "dummy/Broken-v0"}
    status, _, err = run("finetune", "task=dummy/all", *arguments)
    assert status == 1
    assert "'dummy/all' is a split of " in err
    assert "with -m" in err


def test_a_grid_of_evaluations_has_a_numbered_folder_for_each(run, base):
    grid = [f"task={TASK}", f"checkpoint={base}", "episodes=2", "workers=0", "seed=0,1", "hydra.sweep.dir=sweep"]
    status, _, err = run("evaluate", "-m", *grid)
    assert status == 0, err
    assert set(finished(Path("sweep"))) == {"0", "1"}


def test_a_finished_run_on_a_base_that_was_made_anew_is_not_taken_for_one_on_the_base_there_is(run, base):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=run", *QUICK]
    assert run("finetune", *arguments)[0] == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, base / "model.safetensors")
    status, _, err = run("finetune", *arguments)
    assert status == 1
    assert "on other weights of base=" in err
    Path("run/result.json").unlink()  # not enough: the training state is of the other weights, too
    status, _, err = run("finetune", *arguments)
    assert status == 1
    assert "was trained with base_sha256=" in err


def test_a_runs_folder_is_that_of_the_launchers_working_directory(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"runtime": {"cwd": "/home/mine"}}}))
    assert run_folder("grid/lora") == Path("/home/mine/grid/lora")
    assert run_folder("/elsewhere/lora") == Path("/elsewhere/lora")


@pytest.mark.parametrize("folder", ["a" * 300, "file/x"])
def test_a_folder_for_a_grid_that_cannot_be_is_one_sentence(run, base, folder):
    Path("file").touch()
    status, _, err = run("finetune", "-m", f"task={TASK}", f"base={base}", f"hydra.sweep.dir={folder}", *QUICK)
    assert status == 1
    assert "can't be used" in err
    assert "Traceback" not in err


def test_a_bug_in_one_run_shows_its_traceback_and_the_others_go_on(run, base, monkeypatch):
    from eva_rl.jobs import finetuning

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(finetuning, "attach", broken)
    status, _, err = run("finetune", "-m", f"task={TASK}", f"base={base}", "adapter=lora,full", FOLDERS, *QUICK)
    assert status == 1
    assert "in broken\n" in err
    assert "RuntimeError: out of memory, say" in err
    assert set(finished(Path("grid"))) == {"full-0"}


def test_a_run_finished_without_zero_shot_scores_does_not_pass_for_one_with_them(run, base):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=run", *QUICK]
    assert run("finetune", *arguments, "zero_shot=false")[0] == 0
    assert run("finetune", *arguments)[0] == 0  # the result stays
    status, _, err = run("finetune", *arguments, "zero_shot=true")
    assert status == 1
    assert "finished without zero-shot scores" in err
    assert run("finetune", *arguments, "zero_shot=false")[0] == 0


def test_a_learning_curve_that_was_lost_is_not_begun_in_the_middle(run, base):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=run", *QUICK, "training.evaluate_every=1"]
    assert run("finetune", *arguments)[0] == 0
    Path("run/result.json").unlink()
    status, _, err = run("finetune", *arguments)
    assert status == 1
    assert "no result.json with the learning curve up to there: remove the folder" in err
    assert not Path("run/result.json").exists()


def test_a_study_is_one_word(run, base, monkeypatch):
    status, out, _ = run("finetune", "study=?")
    assert status == 0
    assert out.startswith("adapters ")
    assert "\ncw10 " in out
    grid = [f"task={TASK}", f"base={base}", "study=cw10", "hydra.sweeper.params={adapter: 'none,lora', seed: '0,1'}"]
    status, _, err = run("finetune", *grid, FOLDERS, *QUICK, "training.evaluate_every=1", "demonstrations=4")
    assert status == 0, err
    found = finished(Path("grid"))
    assert set(found) == {"none-0", "none-1", "lora-0", "lora-1"}
    assert found["lora-0"]["zero_shot"]["success_rate"] is None
    assert found["none-0"]["success_rate"]["n"] == 2
    assert list(found["lora-0"]["curve"]) == ["1"]


STUDIES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize(
    "study", [pytest.param(name, marks=[] if name == "cw10_base" else [pytest.mark.slow]) for name in STUDIES]
)
def test_every_value_of_a_shipped_study_can_be_composed_and_has_a_folder_of_its_own(study):
    """The first run, and all that differ from it in one setting."""
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        params = compose("finetune", [f"study={study}"], return_hydra_config=True).hydra.sweeper.params
        words = [f"{name}={values}" for name, values in params.items()]
        axes = [
            BasicSweeper.split_arguments([word], None)[0] for word in OverridesParser.create().parse_overrides(words)
        ]
        first = [axis[0] for axis in axes]
        cells = [first, *([*first[:i], value, *first[i + 1 :]] for i, axis in enumerate(axes) for value in axis[1:])]
        configs = [parse(compose("finetune", [f"study={study}", *chain(*cell)]), FinetuneConfig) for cell in cells]
    assert len(configs) > 2
    assert len({config.run_dir for config in configs}) == len(configs)
    assert all(Path(config.run_dir).parts[:3] == ("benchmarks", "results", study) for config in configs)
    if configs[0].training.evaluate_every and not configs[0].zero_shot:
        assert "none" in params.adapter.split(","), "a learning curve begins with the base as it is"


def test_a_run_that_another_process_is_at_is_left_to_it(run, base):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=busy", *QUICK]
    with alone_in(Path("busy")):
        status, out, err = run("finetune", *arguments)
        assert status == 0, err
        assert "busy: left to another process" in out
        status, _, err = run("finetune", *arguments, "resume=false")
        assert status == 1
        assert "Another process works in 'busy'" in err
        assert not Path("busy/result.json").exists()
    assert run("finetune", *arguments)[0] == 0
    assert set(finished(Path("busy"))) == {"."}


def test_a_folder_in_which_nothing_came_about_goes(tmp_path):
    with pytest.raises(UserError, match="a mistake"), alone_in(tmp_path / "run"):
        raise UserError("a mistake")
    assert not (tmp_path / "run").exists()
    with alone_in(tmp_path / "run"):
        (tmp_path / "run" / "result.json").write_text("{}")
        with pytest.raises(InUseError, match="Another process works"), alone_in(tmp_path / "run"):
            pass
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize("setting", ["seed=7", "episodes=5", "training.learning_rate=0.5", "adapter.rank=3"])
def test_a_finished_run_is_not_taken_for_one_of_other_settings(run, base, setting):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=run", *QUICK]
    assert run("finetune", *arguments)[0] == 0
    for checkpoint in Path("run/checkpoints").iterdir():
        checkpoint.unlink()
    status, _, err = run("finetune", *arguments, setting)
    assert status == 1
    assert "is the result of a run with " in err
    assert f"{setting.partition('=')[0]}=" in err


GRID = ["-m", "-m", "eva_rl.finetune", "-m", "task=gym/CartPole-v1", "demonstrations=2", "adapter=none,lora,eva"]
GRID += ["seed=0,1", "zero_shot=false", "training.checkpoint_every=1", "training.evaluate_every=2", "steps=4"]
GRID += ["episodes=2", "workers=0", "training.batch_size=2", "training.warmup=1", "resume=true"]


def launch(folder: Path, *options: str) -> subprocess.Popen:
    arguments = [*GRID[1:], f"run_dir={folder}/${{adapter.name}}-${{seed}}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_launcher_runs_a_grid_in_several_processes(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    grid = launch(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "adapter=none,lora", "seed=0")
    _, err = grid.communicate(timeout=300)
    assert grid.returncode == 0, err.decode()
    assert set(finished(tmp_path)) == {"none-0", "lora-0"}


def test_a_launcher_that_gives_up_says_so_in_one_sentence(run, base, monkeypatch):
    core = pytest.importorskip("hydra_plugins.hydra_joblib_launcher._core")

    def unreachable(*_, **__):
        raise RuntimeError("sbatch: error:\nno controller")

    monkeypatch.setattr(core, "Parallel", unreachable)
    status, _, err = run("finetune", "-m", f"task={TASK}", f"base={base}", "seed=0,1", *QUICK, "hydra/launcher=joblib")
    assert status == 1
    assert "Traceback" not in err
    assert "error: Hydra's plugin hydra_joblib_launcher failed (RuntimeError: sbatch: error: no controller)." in err


@pytest.mark.slow
def test_two_launchers_on_one_folder_share_the_work(tmp_path):
    grids = [launch(tmp_path / "grid") for _ in range(2)]
    said = [grid.communicate(timeout=600) for grid in grids]
    assert [grid.returncode for grid in grids] == [0, 0], said
    begun = [out.decode().count("run folder:") for out, _ in said]
    assert sum(begun) == 6
    assert min(begun) > 0
    alone = launch(tmp_path / "alone")
    alone.communicate(timeout=600)
    one, two = finished(tmp_path / "grid"), finished(tmp_path / "alone")
    assert {n: without_times(r) for n, r in one.items()} == {n: without_times(r) for n, r in two.items()}
    assert len(one) == 6


@pytest.mark.slow
def test_a_grid_killed_ten_times_ends_as_one_that_never_was(tmp_path):
    whole = launch(tmp_path / "whole")
    begun = time.monotonic()
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err.decode()
    length, rng = time.monotonic() - begun, random.Random(0)
    interrupted = 0
    for number in range(10):
        grid = launch(tmp_path / "killed")
        time.sleep(rng.uniform(0.2, 0.45) * length)  # the start takes about a third
        interrupted += grid.poll() is None and len(finished(tmp_path / "killed")) < 6
        if grid.returncode is None:  # one that found all runs finished may have ended by itself
            os.killpg(grid.pid, signal.SIGKILL)
        grid.communicate()
        print(f"kill {number}: {len(finished(tmp_path / 'killed'))} of 6 finished")
    assert interrupted >= 3
    last = launch(tmp_path / "killed")
    _, err = last.communicate(timeout=600)
    assert last.returncode == 0, err.decode()
    one, two = finished(tmp_path / "whole"), finished(tmp_path / "killed")
    assert len(one) == 6
    assert {n: without_times(r) for n, r in one.items()} == {n: without_times(r) for n, r in two.items()}
