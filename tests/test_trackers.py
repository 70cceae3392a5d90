"""Trackers are told what TensorBoard is told."""

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eva_rl.run import trackers

QUICK = [
    "task=dummy/Steps-v0",
    "adapter=eva",
    "adapter.rank=2",
    "steps=3",
    "episodes=2",
    "demonstrations=2",
    "workers=0",
]


class Recorder:
    """Stands in for a class of accelerate's; its instances are kept."""

    name = "wandb"
    made: list = []  # noqa: RUF012

    def __init__(self, **given):
        self.given, self.scalars, self.images, self.settings, self.finished = given, [], {}, None, False
        self.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None):
        self.scalars += [(name, step, value) for name, value in values.items()]

    def log_images(self, values, step=None):
        self.images |= values

    def finish(self):
        self.finished = True


@pytest.fixture
def recorder(monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


def scalars_of(folder: str) -> set[tuple[str, int, float]]:
    events = EventAccumulator(folder)
    events.Reload()
    tags = events.Tags()["scalars"]
    return {(tag, event.step, np.float32(event.value)) for tag in tags for event in events.Scalars(tag)}


def test_a_tracker_gets_the_scalars_pictures_and_settings_that_tensorboard_gets(run, base, recorder):
    status, _, err = run(
        "finetune", f"base={base}", *QUICK, "tracker=wandb", "run_dir=kept/run", "training.log_every=1"
    )
    assert status == 0, err
    [tracker] = recorder.made
    told = {(name, step, np.float32(value)) for name, step, value in tracker.scalars}
    shown = scalars_of("kept/run")
    assert shown <= told
    assert len(shown) > 10
    assert {name for name, _, _ in told - shown} <= {n for n, _, _ in told if n.startswith(("result/", "seconds/"))} | {
        "trainable_parameters"
    }
    assert len(tracker.images) == 3  # EVA's spectrum, ranks and batches
    for [picture] in tracker.images.values():
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert picture.std() > 0
    assert tracker.settings["seed"] == 0
    assert tracker.settings["adapter.name"] == "eva"
    assert tracker.given["name"] == "kept/run"
    assert tracker.finished


def test_pretraining_and_evaluation_are_tracked_too(run, base, recorder):
    arguments = ["model=tiny", "task=dummy/all", "demonstrations=2", "steps=2", "training.log_every=1", "tracker=wandb"]
    status, _, err = run("pretrain", *arguments, "run_dir=pre", "training.batch_size=2")
    assert status == 0, err
    arguments = [f"checkpoint={base}", "task=dummy/Steps-v0", "episodes=1", "workers=0", "tracker=wandb"]
    status, _, err = run("evaluate", *arguments, "run_dir=ev")
    assert status == 0, err
    trained, evaluated = recorder.made
    assert {name for name, _, _ in trained.scalars} >= {"train/loss"}
    assert evaluated.scalars
    assert all(tracker.finished for tracker in recorder.made)


def test_the_tracker_may_change_when_a_run_goes_on(run, base, recorder):
    arguments = [f"base={base}", *QUICK, "run_dir=run", "resume=true"]
    assert run("finetune", *arguments)[0] == 0
    status, out, err = run("finetune", *arguments, "tracker=wandb")
    assert status == 0, err
    assert "finished earlier" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandbb", "tracker=wandbb must be one of tensorboard, wandb, mlflow, trackio. Did you mean 'wandb'"),
        ("trackio", "tracker=trackio needs the package trackio: run `pip install trackio`"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_anything_is_written(name, said, run, base, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    status, _, err = run("finetune", f"base={base}", *QUICK, f"tracker={name}", "run_dir=run")
    assert status == 1
    assert said in err
    assert not Path("run").exists()


def test_a_tracker_that_cannot_start_is_one_sentence(run, base, recorder, monkeypatch):
    def fails(self):
        raise RuntimeError("no key")

    monkeypatch.setattr(Recorder, "start", fails)
    status, _, err = run("finetune", f"base={base}", *QUICK, "tracker=wandb", "run_dir=run")
    assert status == 1
    assert "tracker=wandb can't start (no key)" in err
    assert not Path("run").exists()  # so that the same command works when the tracker does
