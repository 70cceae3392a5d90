"""The commands from end to end, in this process, on the dummy environment and a tiny base."""

import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DummyEnv
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eva_rl import settings
from eva_rl.data import load_dataset
from eva_rl.jobs.finetuning import demonstrated
from eva_rl.model import load_base, load_notes, save_base
from eva_rl.run import Stopwatch

TASK = "dummy/Steps-v0"
OWN = "minari/mine/random-v0"
QUICK = [
    "steps=4",
    "episodes=3",
    "workers=0",
    "training.batch_size=4",
    "training.checkpoint_every=2",
    "training.warmup=1",
]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def sentence(err: str) -> str:
    """The one line a mistake is answered with (progress bars and their carriage returns aside)."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("adapter", ["none", "full", "head", "lora", "eva"])
def test_finetuning_leaves_a_whole_run_whose_scores_evaluate_repeats(run, base, tmp_path, adapter):
    folder = tmp_path / adapter
    status, out, err = run(
        "finetune", f"task={TASK}", f"adapter={adapter}", f"base={base}", f"run_dir={folder}", *QUICK
    )
    assert status == 0, err
    result = result_of(folder)
    assert result["status"] == "complete"
    assert {"task", "adapter", "base", "seed", "steps", "seconds", "versions"} <= result.keys()
    assert set(result["seconds"]) == {"collect", "load", "init", "train", "rollout"}
    assert result["success_rate"] == {"mean": 1.0, "low": pytest.approx(0.4385, abs=1e-3), "high": 1.0, "n": 3}
    assert result["zero_shot"].keys() == {"success_rate", "success_at_end", "episode_return", "normalized_score"}
    assert (result["trainable_parameters"] == 0) == (adapter == "none")
    assert (folder / "config.yaml").is_file()
    assert list(folder.glob("events.out.tfevents*"))
    assert "zero-shot" in out
    assert f"tensorboard --logdir {folder}" in out

    if adapter in ("full", "head"):
        status, _, err = run(
            "evaluate", f"checkpoint={folder / 'model'}", f"task={TASK}", "episodes=3", "workers=0", "run_dir=again"
        )
    elif adapter == "none":
        status, _, err = run(
            "evaluate", f"checkpoint={base}", f"task={TASK}", "episodes=3", "workers=0", "run_dir=again"
        )
    else:
        arguments = [
            f"checkpoint={base}",
            f"adapter={folder}",
            f"task={TASK}",
            "episodes=3",
            "workers=0",
            "run_dir=again",
        ]
        status, _, err = run("evaluate", *arguments)
    assert status == 0, err
    again = result_of(Path("again"))["tasks"][TASK]
    assert again["episode_return"]["mean"] == pytest.approx(result["episode_return"]["mean"])
    assert again["target_return"] == result["target_return"]


def test_a_head_alone_leaves_the_trunk_as_it_is(run, base):
    status, _, err = run("finetune", f"task={TASK}", "adapter=head", f"base={base}", "run_dir=run", *QUICK)
    assert status == 0, err
    before, after = (load_base(str(folder)).model.state_dict() for folder in (base, "run/model"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"embedders", "heads"}


@pytest.mark.parametrize("adapter", ["pissa", "eva"])
def test_a_merged_run_is_a_checkpoint_that_scores_the_same_without_peft(run, base, tmp_path, adapter):
    assert run("finetune", f"task={TASK}", f"adapter={adapter}", f"base={base}", "run_dir=run", *QUICK)[0] == 0
    status, out, err = run("merge", "run=run", "output=merged")
    assert status == 0, err
    assert f"checkpoint=merged task={TASK}" in out
    status, _, err = run("evaluate", "checkpoint=merged", f"task={TASK}", "episodes=3", "workers=0", "run_dir=again")
    assert status == 0, err
    again, before = result_of(Path("again"))["tasks"][TASK], result_of(Path("run"))
    assert again["episode_return"]["mean"] == pytest.approx(before["episode_return"]["mean"])
    status, _, err = run("merge", "run=run", "output=merged")
    assert status == 1
    assert "is there already" in sentence(err)


@pytest.mark.parametrize("environment", [True, False])
def test_merge_ends_with_what_can_be_run(environment, run, base, make_dataset):
    changes = {} if environment else {"env": None, "eval_env": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_dataset("mine/logs-v0", **changes)
    words = ["task=minari/mine/logs-v0", f"base={base}", "adapter=lora", "steps=1", "episodes=0", "run_dir=run"]
    assert run("finetune", *words, "training.batch_size=2")[0] == 0
    status, out, err = run("merge", "run=run")
    assert status == 0, err
    last = out.strip().splitlines()[-1]
    assert ("eva_rl.evaluate checkpoint=run/model task=minari/mine/logs-v0" in last) == environment
    assert ("eva_rl.load_policy('run/model') acts with it" in last) != environment


def test_what_cannot_be_merged_is_refused(run, base):
    assert run("finetune", f"task={TASK}", "adapter=full", f"base={base}", "run_dir=run", *QUICK)[0] == 0
    status, _, err = run("merge", "run=run")
    assert status == 1
    assert "holds a whole model" in sentence(err)
    status, _, err = run("merge", "run=nowhere", "output=merged")
    assert status == 1
    sentence(err)
    assert not Path("merged").exists()


def test_a_question_mark_lists_the_choices_of_a_section(run):
    status, out, _ = run("finetune", "adapter=?")
    assert status == 0
    assert any(line.startswith("pissa ") and "2404.02948" in line for line in out.splitlines())
    status, _, err = run("finetune", "nothing=?")
    assert status == 1
    assert "no section 'nothing'" in sentence(err)


def test_any_method_of_peft_is_one_command(run, base):
    arguments = ["adapter=peft", "adapter.config._target_=peft.LoHaConfig", "+adapter.config.r=2"]
    status, _, err = run("finetune", f"task={TASK}", *arguments, f"base={base}", "run_dir=run", *QUICK)
    assert status == 0, err
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["peft_type"] == "LOHA"
    status, _, err = run("finetune", f"task={TASK}", "adapter=peft", f"base={base}", "run_dir=other", *QUICK)
    assert status == 1
    assert "adapter.config._target_=..." in sentence(err)


def test_a_run_tells_its_losses_and_its_memory(run, base):
    arguments = [f"task={TASK}", "adapter=lora", f"base={base}", "run_dir=run", *QUICK[1:], "steps=10"]
    assert run("finetune", *arguments)[0] == 0
    result = result_of(Path("run"))
    assert len(result["loss"]) == 10
    assert all(loss > 0 for loss in result["loss"])
    assert result["peak_memory_mib"] > 50


def test_scores_while_training_make_a_curve_that_a_resumed_run_goes_on_with(run, base, monkeypatch):
    arguments = [f"task={TASK}", "adapter=lora", f"base={base}", *QUICK, "training.evaluate_every=1"]
    assert run("finetune", *arguments, "run_dir=whole")[0] == 0
    whole = result_of(Path("whole"))["curve"]
    assert list(whole) == ["1", "2", "3"]
    assert all(scores["success_rate"]["n"] == 3 for scores in whole.values())
    events = EventAccumulator("whole").Reload()
    assert [e.step for e in events.Scalars("evaluation/success_rate")] == [0, 1, 2, 3, 4]

    from eva_rl.data import WindowSampler

    original = WindowSampler.batch

    def stop(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(WindowSampler, "batch", stop)
        assert run("finetune", *arguments, "run_dir=cut")[0] == 130
    assert result_of(Path("cut"))["status"] == "partial"
    assert run("finetune", *arguments, "run_dir=cut", "resume=true")[0] == 0
    assert result_of(Path("cut"))["curve"] == whole


def test_a_film_is_made_of_an_episode(run, base, monkeypatch):
    def render(self):
        return np.full((60, 90, 3), 20 * self.step_number, np.uint8)

    monkeypatch.setattr(DummyEnv, "render", render)
    arguments = [f"task={TASK}", "adapter=lora", f"base={base}", "run_dir=run", "video=true", *QUICK]
    status, _, err = run("finetune", *arguments)
    assert status == 0, err
    [film], [sheet] = Path("run/videos").glob("*.gif"), Path("run/videos").glob("*.png")
    assert Image.open(film).n_frames == 3  # at the start, at step 4, and at the end, 5 to 7
    assert Image.open(sheet).size == (6 * 90, 2 * 60)
    events = EventAccumulator("run", size_guidance={"images": 0}).Reload()
    [name] = [name for name in events.Tags()["images"] if name.startswith("video/")]
    assert events.Images(name)[0].encoded_image_string == film.read_bytes()
    arguments = ["adapter=run", f"task={TASK}", "episodes=2", "workers=0", "video=true", "run_dir=again"]
    assert run("evaluate", *arguments)[0] == 0
    assert len(list(Path("again/videos").iterdir())) == 2
    arguments[-1] = "run_dir=cut"
    assert run("evaluate", *arguments, "max_episode_steps=2")[0] == 0
    [film] = Path("cut/videos").glob("*.gif")
    assert Image.open(film).n_frames == 1  # at the start; the cut comes before step 4


def test_a_run_films_the_first_steps_unless_told_otherwise(run, base, monkeypatch, recwarn):
    monkeypatch.setattr(settings, "FILM_STEPS", 4)
    monkeypatch.setattr(settings, "FILM_EVERY", 2)
    arguments = [f"task={TASK}", "adapter=lora", f"base={base}", *QUICK]
    _, out, _ = run("finetune", *arguments, "run_dir=blind")
    assert out.count("no film: The environment of 'dummy/Steps-v0' can't be rendered") == 1
    assert result_of(Path("blind"))["status"] == "complete"
    assert not Path("blind/videos").exists()
    monkeypatch.setattr(DummyEnv, "render", lambda self: np.full((60, 90, 3), 20 * self.step_number, np.uint8))
    assert run("finetune", *arguments, "run_dir=seen")[0] == 0
    [film] = Path("seen/videos").glob("*.gif")
    assert Image.open(film).n_frames == 3  # at the start, and at steps 2 and 4
    assert not [warning for warning in recwarn if "cut there" in str(warning.message)]
    assert run("finetune", *arguments, "run_dir=off", "video=false")[0] == 0
    assert not Path("off/videos").exists()
    _, out, _ = run("finetune", "-m", *arguments, "run_dir=grid", "seed=1")
    assert not Path("grid/videos").exists()
    assert "no film" not in out


def test_an_environment_that_cannot_be_seen_is_named_and_the_scores_are_kept(run, base):
    arguments = [f"task={TASK}", "adapter=lora", f"base={base}", "run_dir=run", "video=true", *QUICK]
    status, _, err = run("finetune", *arguments)
    assert status == 1
    assert "can't be rendered" in sentence(err)
    assert result_of(Path("run"))["status"] == "complete"


def test_a_sweep_asks_for_several_returns_and_draws_what_came_of_them(run, base):
    arguments = [f"checkpoint={base}", f"task={TASK}", "episodes=3", "workers=0", "target_return=sweep", "run_dir=run"]
    status, out, err = run("evaluate", *arguments)
    assert status == 0, err
    found = result_of(Path("run"))["tasks"][TASK]
    asked = [scores["target_return"] for scores in found]
    assert len(asked) == 6
    assert asked == sorted(asked)
    assert all(scores["success_rate"]["n"] == 3 for scores in found)
    assert "asked for" in out
    assert Path("run/sweep.png").read_bytes().startswith(b"\x89PNG")
    tags = EventAccumulator("run", size_guidance={"images": 0}).Reload().Tags()
    assert tags["images"] == ["evaluation/sweep"]


def test_a_quantile_of_the_trajectories_returns_is_asked_for(run, base):
    arguments = [f"checkpoint={base}", f"task={TASK}", "episodes=3", "workers=0"]
    asked = {}
    for target in ("q0", "q0.5", "q1", "max", "2.5"):
        assert run("evaluate", *arguments, f"target_return={target}", f"run_dir={target}")[0] == 0
        asked[target] = result_of(Path(target))["tasks"][TASK]["target_return"]
    assert asked["q0"] <= asked["q0.5"] <= asked["q1"] == pytest.approx(asked["max"])
    assert asked["2.5"] == 2.5


@pytest.mark.parametrize("target", ["most", "q2", "q", "nan", "qx"])
def test_a_return_that_means_nothing_is_refused(run, base, target):
    for name, argument in (("evaluate", f"checkpoint={base}"), ("finetune", f"base={base}")):
        status, _, err = run(name, argument, f"task={TASK}", f"target_return={target}", "run_dir=run")
        assert status == 1
        assert "target_return must be " in sentence(err)
        assert not Path("run").exists()


@pytest.mark.parametrize("name", ["evaluate", "finetune"])
def test_what_cannot_be_asked_for_is_refused_before_anything_is_written(run, base, name):
    settings = json.loads((base / "config.json").read_text())
    for statistics in settings["tasks"].values():
        del statistics["return_deciles"]  # as a checkpoint of an earlier version
    (base / "config.json").write_text(json.dumps(settings))
    arguments = {
        "evaluate": [f"checkpoint={base}", "target_return=q0.5"],
        "finetune": [f"base={base}", "target_return=sweep"],
    }
    status, _, err = run(name, *arguments[name], f"task={TASK}", "workers=0", "run_dir=run")
    assert status == 1
    assert {"evaluate": "keeps no quantiles", "finetune": "sweep is for"}[name] in sentence(err)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("happens", "status", "said"),
    [
        (ValueError("the gripper is gone"), 1, "raised ValueError at step 7: the gripper is gone"),
        (KeyboardInterrupt(), 130, "Interrupted. The "),
    ],
)
def test_an_evaluation_that_breaks_off_keeps_the_episodes_that_had_ended(run, base, monkeypatch, happens, status, said):
    original = DummyEnv.step

    def step(self, action):
        if self.length == 7 and self.step_number == 6:
            raise happens
        return original(self, action)

    monkeypatch.setattr(DummyEnv, "step", step)
    arguments = [f"checkpoint={base}", f"task={TASK}", "episodes=12", "workers=0", "run_dir=run"]
    found, _, err = run("evaluate", *arguments)
    assert found == status
    assert said in err
    assert "episodes that had ended are in 'run/result.json'." in err
    result = result_of(Path("run"))
    assert result["status"] == "partial"
    assert 0 < result["tasks"][TASK]["success_rate"]["n"] < 12


def test_a_finished_run_that_is_resumed_stays_as_it_is(run, base):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=run", *QUICK]
    assert run("finetune", *arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    status, out, err = run("finetune", *arguments, "resume=true")
    assert status == 0, err
    assert "run: finished earlier" in out
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_a_run_without_checkpoints_is_not_resumed_as_another_one(run, base):
    arguments = [f"task={TASK}", f"base={base}", "run_dir=run", "adapter=none", *QUICK]
    assert run("finetune", *arguments)[0] == 0
    status, _, err = run("finetune", *arguments, "resume=true", "seed=7")
    assert status == 1
    assert "the result of a run with seed=0 (now 7)" in sentence(err)


def test_the_adapter_loads_with_peft_alone(run, base, tmp_path):
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", *QUICK)
    assert status == 0, err
    before = load_base(str(base)).model.trunk.blocks[0].attention.q.weight
    loaded = PeftModel.from_pretrained(load_base(str(base)).model, "run/adapter")
    layer = loaded.base_model.model.trunk.blocks[0].attention.q
    assert torch.equal(layer.base_layer.weight, before)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_what_eva_found_is_written_down_and_drawn(run, base):
    options = ["adapter.eva.tokens=state", "adapter.eva.method=covariance", "adapter.rank=2"]
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", "episodes=0", *QUICK[:1], *options)
    assert status == 0, err
    found = json.loads(Path("run/eva.json").read_text())
    assert found["settings"]["tokens"] == "state"
    layers = found["layers"]
    assert len(layers) == 2 * 6
    assert sum(layer["rank"] for layer in layers.values()) == 2 * len(layers)
    for layer in layers.values():
        shares = np.diff(layer["cumulative"], prepend=0)
        np.testing.assert_allclose(shares, layer["spectrum"], atol=1e-6)
        assert 0 < layer["cumulative"][-1] <= 1 + 1e-6
        assert layer["reads_the_input_of"] in layers
    assert layers["trunk.blocks.0.attention.v"]["reads_the_input_of"] == "trunk.blocks.0.attention.q"
    # As in training: of the last block, q sees states alone.
    assert layers["trunk.blocks.1.attention.v"]["reads_the_input_of"] == "trunk.blocks.1.attention.k"
    states = 32 * 5  # windows of the batch, steps of the context; padding leaves fewer
    assert layers["trunk.blocks.0.attention.q"]["rows"] <= states * layers["trunk.blocks.0.attention.q"]["batches"]
    events = EventAccumulator("run", size_guidance={"images": 0}).Reload()
    pictures = events.Tags()["images"]
    assert set(pictures) == {f"what_eva_found/{name}" for name in ("spectrum", "rank", "batches")}
    assert min(events.Tags()["scalars"]) < min(pictures)  # TensorBoard sorts cards by their names
    [told] = events.Tensors("run/text_summary")
    text = told.tensor_proto.string_val[0].decode()
    assert f"{TASK}: eva on" in text
    assert "adapter:" in text  # the settings
    assert set(events.PluginTagToContent("hparams")) >= {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    for name in pictures:
        assert events.Images(name)[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [["weighting=gradient", "center=false"], ["components=random"], ["tau=0.9"]])
def test_settings_of_eva_are_given_on_the_command_line(run, base, options):
    status, _, err = run(
        "finetune",
        f"task={TASK}",
        f"base={base}",
        "run_dir=run",
        "episodes=0",
        "steps=1",
        *(f"adapter.eva.{option}" for option in options),
    )
    assert status == 0, err
    assert result_of(Path("run"))["status"] == "complete"


@pytest.mark.parametrize("kind", ["Continuous", "Discrete"])
@pytest.mark.parametrize("adapter", ["eva", "full"])
def test_a_dataset_of_ones_own_gets_an_interface_of_its_own(run, base, make_dataset, kind, adapter):
    make_dataset("mine/random-v0", kind)
    status, _, err = run("finetune", f"task={OWN}", f"adapter={adapter}", f"base={base}", "run_dir=run", *QUICK)
    assert status == 0, err
    result = result_of(Path("run"))
    assert result["demonstrations"] == 4
    if adapter == "eva":
        weights = load_file("run/adapter/adapter_model.safetensors")
        assert any("mine_random-v0" in name for name in weights)
        assert load_notes(Path("run/adapter")).interface.name == "mine_random-v0"
        arguments = [f"checkpoint={base}", "adapter=run/adapter"]
    else:
        arguments = ["checkpoint=run/model"]
    status, _, err = run("evaluate", *arguments, f"task={OWN}", "episodes=3", "workers=0", "run_dir=again")
    assert status == 0, err
    again = result_of(Path("again"))["tasks"][OWN]
    assert again["episode_return"]["mean"] == pytest.approx(result["episode_return"]["mean"])


def test_a_fresh_embedder_and_head_are_trained(run, base, make_dataset):
    make_dataset("mine/random-v0")
    arguments = [f"task={OWN}", f"base={base}", *(a for a in QUICK if not a.startswith("steps"))]
    for steps in (0, 4):
        assert run("finetune", *arguments, f"steps={steps}", f"run_dir={steps}")[0] == 0
    before, after = (load_file(f"{steps}/adapter/adapter_model.safetensors") for steps in (0, 4))
    assert {name for name in before if not torch.equal(before[name], after[name])} == before.keys()


def test_a_base_is_not_scored_on_what_it_never_saw_unless_that_is_asked_for(run, base, make_dataset):
    make_dataset("mine/random-v0")
    arguments = [f"task={OWN}", f"base={base}", "adapter=lora", *QUICK, "run_dir=run"]
    status, out, _ = run("finetune", *arguments)
    assert status == 0
    assert "zero-shot: left out" in out
    assert result_of(Path("run"))["zero_shot"]["episode_return"] is None
    status, out, _ = run("finetune", *arguments, "resume=true")  # nothing is missing
    assert status == 0
    assert "finished earlier" in out
    status, _, err = run("finetune", *arguments, "resume=true", "zero_shot=true")
    assert status == 1
    assert "finished without zero-shot scores" in err


def test_what_was_drawn_before_changes_no_run(run, base, make_dataset):
    make_dataset("mine/random-v0")
    arguments = [f"task={OWN}", f"base={base}", "adapter=lora", *QUICK, "episodes=0"]
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert run("finetune", *arguments, f"seed={seed}", f"run_dir={name}")[0] == 0
        torch.rand(7)  # as another part of the program may
    one, two, other = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_without_episodes_nothing_is_rolled_out(run, base, make_dataset):
    make_dataset("mine/random-v0", env=None, eval_env=None)
    status, _, err = run("finetune", f"task={OWN}", f"base={base}", "run_dir=run", *QUICK, "episodes=0")
    assert status == 0, err
    assert result_of(Path("run"))["success_rate"] is None


@pytest.mark.parametrize("adapter", ["full", "eva"])
def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(run, base, monkeypatch, adapter):
    arguments = [f"task={TASK}", f"base={base}", f"adapter={adapter}", *QUICK, "steps=6"]
    assert run("finetune", *arguments, "run_dir=whole")[0] == 0
    from eva_rl.data import WindowSampler

    drawn, original = [], WindowSampler.batch

    def stop_at_the_fifth(self, number):
        drawn.append(number)
        if number == 4 and 3 in drawn:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(WindowSampler, "batch", stop_at_the_fifth)
        if adapter == "eva":  # its initialisation draws batches too
            patch.setattr(WindowSampler, "batch", original)
            patch.setattr("eva_rl.training.loop.learning_rate_at", _interrupting(5))
        status, _, err = run("finetune", *arguments, "run_dir=cut")
    assert status == 130
    assert "resume=true" in err
    assert result_of(Path("cut"))["status"] == "partial"
    status, _, err = run("finetune", *arguments, "run_dir=cut", "resume=true")
    assert status == 0, err
    file = "model/model.safetensors" if adapter == "full" else "adapter/adapter_model.safetensors"
    whole, cut = load_file(f"whole/{file}"), load_file(f"cut/{file}")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def _interrupting(at: int):
    from eva_rl.training import learning_rate_at

    def rate(step, steps, config, *rest):
        if step == at:
            raise KeyboardInterrupt
        return learning_rate_at(step, steps, config, *rest)

    return rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=dummy/Step-v0"], "Did you mean 'dummy/Steps-v0'"),
        (["task=dummy/all"], "split of 2 tasks"),
        ([], "'task' is not set"),
        (["task=minari/not/there-v0"], "can't be reached"),
        ([f"task={TASK}", "base=mt40-smal"], "no base 'mt40-smal'"),
        ([f"task={TASK}", "steps=-1"], "steps must be at least 0, got -1"),
        ([f"task={TASK}", "stepz=1"], "'steps'"),
        ([f"task={TASK}", "adapter.eva.rh=1"], "rh"),
        ([f"task={TASK}", "device=tpu"], "device must be cpu, cuda or auto, got tpu"),
        ([f"task={TASK}", "adapter=evaa"], "evaa"),
        ([f"task={TASK}", "training.precision=half"], "precision must be "),
        ([f"task={TASK}", "adapter.rank=1000"], "1000"),
        ([f"task={TASK}", "adapter.eva.rho=0"], "rho"),
        ([f"task={TASK}", "adapter.eva.tokens=word"], "tokens must be one of "),
        ([f"task={TASK}", "adapter.eva.components=minor"], "method=covariance"),
        ([f"task={TASK}", "dataset=mine/discrete-v0"], "discrete"),
        ([f"task={TASK}", "demonstrations=0"], "episodes to collect must be at least 1, got 0"),
        (
            [f"task={TASK}", "filter=0"],
            "filter must be successful, all, or a share of the demonstrations above 0 and at most 1, got 0",
        ),
        ([f"task={TASK}", "filter=10"], "at most 1, got 10"),
        ([f"task={TASK}", "filter=best"], "at most 1, got best"),
        ([f"task={TASK}", "base="], "base= was given without a value"),
        ([f"task={TASK}", "training.gradient_clip=0"], "inf clips nothing"),
        ([f"task={TASK}", "adapter=lora", "adapter.config.lora_alpha=32"], "adapter.size.lora_alpha"),
        ([f"task={TASK}", "adapter=lora", "adapter.eva.rho=2"], "what was chosen has no 'adapter.eva'"),
        ([f"task={TASK}", "adapter=lora", "adapter.ratios.lora_B=16"], "+adapter.ratios.lora_B="),
        (
            [f"task={TASK}", "adapter=lora", "adapter.config={r : 2}", "adapter.config={lora_alpha: 2}"],
            "adapter.size.r",
        ),
        (["++adapter={config: {r: 2}}", f"task={TASK}", "adapter=lora"], "adapter.size.r"),
        ([TASK], f"'{TASK}' is no setting"),
        ([f"task={TASK}", "base=" + "a" * 300], "can't be used (File name too long)"),
        ([f"task={TASK}", "dataset=mine/x=y"], "An argument can't be read"),
        ([f"task={TASK}", "seed=99999999999999999999999"], "2**63"),
        ([f"task={TASK}", "adapter.eva.rho=nan"], "rho"),
        (["task=minari/mine/discrete-v0", "dataset=mine/other-v0"], "leave out dataset=mine/other-v0"),
        ([f"task={TASK}", "episodes=-1"], "episodes must be at least 0, got -1"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence_and_leaves_nothing(run, base, make_dataset, arguments, message):
    make_dataset("mine/discrete-v0", "Discrete")
    given = arguments if any(a.startswith("base=") for a in arguments) else [*arguments, f"base={base}"]
    quick = [a for a in QUICK if a.split("=")[0] not in {b.split("=")[0] for b in given}]
    status, _, err = run("finetune", *given, *quick, "run_dir=run")
    assert status == 1
    assert any(part in sentence(err) for part in message.split("|"))
    assert not Path("run").exists()


def test_the_config_of_a_run_makes_the_same_run_again(run, base):
    assert run("finetune", f"task={TASK}", f"base={base}", "run_dir=first", *QUICK)[0] == 0
    status, _, err = run("finetune", "--config-dir", "first", "--config-name", "config", "run_dir=second")
    assert status == 0, err
    weights = [load_file(f"{folder}/adapter/adapter_model.safetensors") for folder in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not Path("outputs").exists()


def test_the_config_of_a_run_of_a_former_version_still_makes_it(run, base):
    assert run("finetune", f"task={TASK}", f"base={base}", "run_dir=first", *QUICK)[0] == 0
    lines = Path("first/config.yaml").read_text().splitlines()
    former = [line for line in lines if not line.startswith(("filter:", "mirror:", "tracker:"))]
    assert len(former) == len(lines) - 3
    Path("first/config.yaml").write_text("\n".join(former))
    status, _, err = run("finetune", "--config-dir", "first", "--config-name", "config", "run_dir=second")
    assert status == 0, err
    assert not {"filter", "mirror"} & result_of(Path("second"))["settings"].keys()


def test_a_run_may_learn_from_the_best_demonstrations_alone(run, base):
    arguments = ["finetune", f"task={TASK}", f"base={base}", "adapter=bc", "demonstrations=6", *QUICK]
    found = {}
    for share in ("all", "0.2"):
        status, _, err = run(*arguments, f"filter={share}", f"run_dir=best-{share}")
        assert status == 0, err
        found[share] = result_of(Path(f"best-{share}"))
    assert [found[share]["demonstrations"] for share in found] == [6, 6]  # what there was to choose from
    assert found["0.2"]["settings"]["filter"] == "0.2"
    assert found["0.2"]["target_return"] > found["all"]["target_return"]  # that of the best one, and the median


def test_episodes_are_given_up_by_the_longest_demonstration_not_the_longest_of_the_best(dummy_domain):
    config = SimpleNamespace(task=TASK, dataset=None, trust_environment=False, demonstrations=6, seed=0, filter="0.2")
    found = demonstrated(SimpleNamespace(config=config), Stopwatch("collect", "load"))
    lengths = load_dataset(found.dataset_id, TASK, 6).lengths
    assert found.longest == lengths.max()
    assert len(found.trajectories.lengths) < len(lengths) == found.demonstrations


def test_a_run_folder_that_cannot_be_written_to_is_refused(run, base, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=file/run", *QUICK)
    assert status == 1
    assert "can't be written to" in sentence(err)


def test_a_used_run_folder_is_not_overwritten(run, base):
    assert run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", *QUICK)[0] == 0
    before = Path("run/result.json").read_bytes()
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", *QUICK, "seed=1")
    assert status == 1
    assert "resume=true" in sentence(err)
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", *QUICK, "seed=1", "resume=true")
    assert status == 1
    assert "seed=0" in sentence(err)
    assert Path("run/result.json").read_bytes() == before


def test_a_folder_with_anothers_adapter_is_not_written_to(run, base):
    Path("run/adapter").mkdir(parents=True)
    Path("run/adapter/mine.txt").write_text("mine")
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", *QUICK)
    assert status == 1
    assert "holds what an earlier run left, 'adapter'" in sentence(err)
    assert [path.name for path in Path("run").rglob("*.*")] == ["mine.txt"]


def test_to_resume_takes_a_run_folder(run, base):
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", *QUICK, "resume=true")
    assert status == 1
    assert "without run_dir=" in sentence(err)
    assert not Path("runs").exists()


@pytest.mark.parametrize("output", ["mine", "file", "link", ".", "run", "run/checkpoints", "run/checkpoints/model"])
def test_pretraining_replaces_a_model_at_most(run, dummy_domain, output):
    Path("mine").mkdir()
    Path("mine/other.txt").write_text("mine")
    Path("mine/model.safetensors").touch()
    Path("file").write_text("mine")
    Path("link").symlink_to("empty")
    Path("empty").mkdir()
    arguments = ["model=tiny", "task=dummy/all", "demonstrations=4", "steps=2", "training.batch_size=4", "run_dir=run"]
    status, _, err = run("pretrain", *arguments, f"output={output}")
    assert status == 1
    assert "name another" in sentence(err)
    assert not Path("run").exists()
    assert Path("mine/other.txt").read_text() == Path("file").read_text() == "mine"


def test_an_adapter_finds_its_base_from_another_folder(run, base, monkeypatch):
    Path("near").symlink_to(base)
    assert run("finetune", f"task={TASK}", "base=near", "run_dir=run", *QUICK)[0] == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    arguments = ["adapter=../run", f"task={TASK}", "episodes=2", "workers=0"]
    for further in (["run_dir=a"], ["run_dir=b", f"checkpoint={base}"]):
        status, _, err = run("evaluate", *arguments, *further)
        assert status == 0, err


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_result_says_what_it_was_computed_in(run, base, precision):
    tuning = [f"task={TASK}", f"base={base}", "adapter=lora", f"training.precision={precision}", "run_dir=run", *QUICK]
    scoring = [
        f"task={TASK}",
        f"checkpoint={base}",
        f"precision={precision}",
        "episodes=1",
        "workers=0",
        "run_dir=scored",
    ]
    for command, *arguments in (("finetune", *tuning), ("evaluate", *scoring)):
        status, _, err = run(command, *arguments)
        assert status == 0, err
    for folder in ("run", "scored"):
        assert (result_of(Path(folder))["device"], result_of(Path(folder))["precision"]) == ("cpu", precision)


def test_a_base_that_was_moved_is_named_anew(run, base):
    first = Path(shutil.copytree(base, "first"))
    assert run("finetune", f"task={TASK}", f"base={first}", "adapter=lora", "run_dir=run", *QUICK)[0] == 0
    loaded = load_base(str(base))
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1e-3)
    save_base(Path("other"), loaded.model, loaded.tasks)
    evaluate, merge = ["adapter=run", f"task={TASK}", "episodes=2", "workers=0"], ["run=run", "output=merged"]
    moved = first.rename("moved")
    for command, *arguments in (("evaluate", *evaluate, "checkpoint=other"), ("merge", *merge, "base=other")):
        status, _, err = run(command, *arguments)
        assert status == 1
        assert "'other' holds other weights" in sentence(err)
    assert "if it was moved, base=... names it" in sentence(run("merge", *merge)[2])
    assert "if it was moved, checkpoint=... names it" in sentence(run("evaluate", *evaluate)[2])
    for command, *arguments in (("evaluate", *evaluate, f"checkpoint={moved}"), ("merge", *merge, f"base={moved}")):
        status, _, err = run(command, *arguments)
        assert status == 0, err


def test_what_is_no_model_says_where_one_is(run, base):
    assert run("finetune", f"task={TASK}", f"base={base}", "adapter=full", "run_dir=whole", *QUICK)[0] == 0
    assert run("finetune", f"task={TASK}", f"base={base}", "adapter=lora", "run_dir=lora", *QUICK)[0] == 0
    for arguments, message in (
        (["checkpoint=whole"], "name its model, 'whole/model'"),
        (["checkpoint=lora"], "eva_rl.merge run=lora"),
        (["adapter=nowhere"], "'nowhere' holds no adapter"),
    ):
        status, _, err = run("evaluate", *arguments, f"task={TASK}", "workers=0")
        assert status == 1
        assert message in sentence(err)


def test_others_may_read_what_a_run_leaves(run, base):
    assert run("finetune", f"task={TASK}", f"base={base}", "adapter=lora", "run_dir=run", *QUICK)[0] == 0
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o777 for path in files if path.name != ".lock"} == {0o666 & ~mask}


def test_a_truncated_base_is_named(run, base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", "run_dir=run", *QUICK)
    assert status == 1
    assert "model.safetensors" in sentence(err)


def test_evaluation_of_a_split_ends_in_one_table(run, base):
    status, out, err = run("evaluate", f"checkpoint={base}", "task=dummy/all", "episodes=2", "workers=0", "run_dir=run")
    assert status == 0, err
    assert "dummy/Steps-v0" in out
    assert "mean success rate over 2 tasks: 1.000" in out
    assert result_of(Path("run"))["status"] == "complete"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=dummy/Steps-v0", "episodes=0"], "episodes must be at least 1, got 0"),
        (["task=minari/mine/random-v0"], "knows no interface"),
        (["task=dummy/Steps-v0", "adapter=nowhere"], "nowhere"),
    ],
)
def test_evaluation_answers_mistakes_in_one_sentence(run, base, make_dataset, arguments, message):
    make_dataset("mine/random-v0")
    status, _, err = run("evaluate", f"checkpoint={base}", *arguments, "workers=0", "run_dir=run")
    assert status == 1
    assert message in sentence(err)
    assert not Path("run").exists()


def test_collecting_prints_the_dataset_and_its_success(run, dummy_domain):
    status, out, err = run("collect", f"task={TASK}", "episodes=3")
    assert status == 0, err
    assert "dummy/Steps-v0/expert-3-seed0-v0" in out
    assert "1.00" in out


def test_tasks_are_listed_by_domain(run, dummy_domain):
    status, out, _ = run("tasks")
    assert status == 0
    assert "dummy/all (2 tasks)" in out
    assert "dummy/Steps-v0" in out
    status, _, err = run("tasks", "domain=dumy")
    assert status == 1
    assert "'dummy'" in sentence(err)


def without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, name: without(tensors, name), "lacks 1 tensors, such as"),
        (lambda tensors, name: dict(list(tensors.items())[::2]), "lacks"),
        (
            lambda tensors, name: tensors | {"base_model.model.elsewhere.lora_A.weight": tensors[name].clone()},
            "holds, beyond",
        ),
        (lambda tensors, name: tensors | {name: tensors[name] * float("nan")}, "holds NaN or infinite numbers in"),
    ],
    ids=["one missing", "half missing", "foreign", "nan"],
)
def test_only_a_whole_adapter_of_finite_numbers_is_loaded(run, base, change, said):
    assert run("finetune", f"task={TASK}", "adapter=lora", f"base={base}", "run_dir=run", *QUICK)[0] == 0
    path = Path("run/adapter/adapter_model.safetensors")
    tensors = load_file(path)
    save_file(change(tensors, min(tensors)), path)
    status, _, err = run("evaluate", "adapter=run", f"task={TASK}", "episodes=1", "workers=0", "run_dir=again")
    assert status == 1
    assert said in sentence(err)
    assert not Path("again").exists()


def test_an_adapter_without_safetensors_is_not_looked_for_elsewhere(run, base):
    assert run("finetune", f"task={TASK}", "adapter=lora", f"base={base}", "run_dir=run", *QUICK)[0] == 0
    Path("run/adapter/adapter_model.safetensors").rename("run/adapter/adapter_model.bin")
    status, _, err = run("evaluate", "adapter=run", f"task={TASK}", "episodes=1", "workers=0", "run_dir=again")
    assert status == 1
    assert "holds no adapter_model.safetensors" in sentence(err)


def test_a_base_with_a_number_that_is_not_finite_is_refused_by_the_tensors_name(run, base):
    weights = load_file(base / "model.safetensors")
    weights["trunk.norm.weight"][0] = float("inf")
    save_file(weights, base / "model.safetensors")
    status, _, err = run("evaluate", f"checkpoint={base}", f"task={TASK}", "episodes=1", "workers=0", "run_dir=again")
    assert status == 1
    assert "holds NaN or infinite numbers in 'trunk.norm.weight'" in sentence(err)
