"""Tasks one after the other: the measures, the methods, and going on after an interruption."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import make_run
from safetensors.torch import load_file
from torch import nn

from eva_rl.batch import Batch
from eva_rl.continual import learners
from eva_rl.continual.elastic import Elastic
from eva_rl.continual.learners import METHODS, joined
from eva_rl.continual.measures import area, average_performance, forgetting, forward_transfer
from eva_rl.training import TrainingConfig

QUICK = [
    "tasks=[dummy/Steps-v0,dummy/Broken-v0]",
    "demonstrations=4",
    "steps=4",
    "evaluations=2",
    "episodes=2",
    "workers=0",
    "training.batch_size=4",
    "training.warmup=1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("made")) / "base"


@pytest.fixture
def base(made, dummy_domain) -> Path:
    """A tiny checkpoint that knows the dummy domain, without its pretraining."""
    return made


def result_of(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def test_the_measures_are_those_of_a_sequence_worked_out_by_hand():
    matrix = np.array([[0.8, 0.1], [0.3, 0.6]])
    assert average_performance(matrix) == pytest.approx(0.45)
    assert forgetting(matrix) == pytest.approx((0.5 + 0.0) / 2)
    alone, own = [(0, 0.0), (10, 0.5), (20, 1.0)], [(0, 0.5), (10, 0.75), (20, 1.0)]
    assert area(alone) == pytest.approx(0.5)
    assert area(own) == pytest.approx(0.75)
    assert forward_transfer([own], [alone]) == pytest.approx(0.5)
    assert forward_transfer([alone], [own]) == pytest.approx(-1.0)
    assert forward_transfer([own], [[(0, 1.0), (1, 1.0)]]) is None


def test_uneven_steps_weigh_by_their_width():
    assert area([(0, 0.0), (1, 1.0), (10, 1.0)]) == pytest.approx(0.95)


def test_the_penalty_is_a_quadratic_about_the_last_weights_with_the_fisher_information_of_a_known_model():
    """y ~ N(w x, 1): the Fisher information of w is the mean of x^2."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.tensor([1.5]))
    elastic = Elastic({"w": weight}, 3.0)
    x = torch.linspace(-2, 2, 64)

    def log_likelihood(n: int) -> torch.Tensor:
        mean = weight * x[n]
        return -(mean - (mean.detach() + torch.randn(1))).square().sum() / 2

    for _ in range(200):  # tasks alike, whose information adds up
        elastic.consolidate(log_likelihood)
    information = float(x.square().mean())
    assert float(elastic.fisher["w"]) / 200 == pytest.approx(information, rel=0.05)
    assert float(elastic.penalty()) == 0.0
    with torch.no_grad():
        weight += 2.0
    assert float(elastic.penalty()) == pytest.approx(3.0 / 2 * float(elastic.fisher["w"]) * 4.0)
    other = Elastic({"w": weight}, 3.0)
    other.load_state_dict(elastic.state_dict())
    assert float(other.penalty()) == float(elastic.penalty())


def test_joined_batches_hold_the_windows_of_both():
    def batch(n: int, value: float) -> Batch:
        filled = torch.full((n, 3), value)
        return Batch(filled[..., None], filled[..., None], filled, filled, torch.ones(n, 3, dtype=torch.bool), "i")

    both = joined(batch(2, 0.0), batch(1, 1.0))
    assert both.rewards.mean(1).tolist() == [0.0, 0.0, 1.0]
    assert both.mask.shape == (3, 3)
    assert both.labels is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_sequence_and_leaves_its_result(run, base, method):
    status, out, err = run("continual.__main__", *QUICK, f"base={base}", f"method={method}", "run_dir=run")
    assert status == 0, err
    result = result_of("run")
    assert result["status"] == "complete"
    assert result["tasks"] == ["dummy/Steps-v0", "dummy/Broken-v0"]
    assert np.array(result["matrix"]).shape == (2, 2)
    assert [step for step, _ in result["curves"][0]] == [0, 2, 4]
    assert result["average_performance"] == pytest.approx(np.mean(result["matrix"][-1]))
    assert result["forward_transfer"] is None
    assert "average performance" in out
    assert Path("run/matrix.png").is_file()


@pytest.mark.parametrize("method", ["ewc", "lora", "found"])
def test_a_sequence_on_a_base_with_vectors_of_tasks_begins_with_the_nearest_and_trains_it(
    run, dummy_domain, tmp_path, method
):
    base = make_run(tmp_path / "made", vectors=True) / "base"
    status, _, err = run("continual.__main__", *QUICK, f"base={base}", f"method={method}", "run_dir=run")
    assert status == 0, err
    assert result_of("run")["status"] == "complete"
    files = [Path("run/learned-1.safetensors"), *Path("run").glob("library/adapters/*/adapter_model.safetensors")]
    [*learned] = [load_file(file) for file in files if file.is_file()]
    assert len(learned) == (2 if method == "found" else 1)
    for tensors in learned:
        assert any("embedders.dummy.task" in name and tensor.any() for name, tensor in tensors.items())


def test_an_interrupted_sequence_goes_on_and_ends_as_an_uninterrupted_one(run, base, monkeypatch):
    settings = [*QUICK, f"base={base}", "method=ewc"]
    status, _, err = run("continual.__main__", *settings, "run_dir=whole")
    assert status == 0, err
    learn = learners.Shared.learn

    def stopped(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return learn(self, number)

    monkeypatch.setattr(learners.Shared, "learn", stopped)
    assert run("continual.__main__", *settings, "run_dir=cut")[0] == 130
    assert result_of("cut")["status"] == "partial"
    for other in ("max_episode_steps=3", "filter=all"):
        status, _, err = run("continual.__main__", *settings, "run_dir=cut", "resume=true", other)
        assert status == 1
        assert "holds a run of other settings" in err
    monkeypatch.setattr(learners.Shared, "learn", learn)
    status, _, err = run("continual.__main__", *settings, "run_dir=cut", "resume=true")
    assert status == 0, err
    one, other = (Path(name, "learned-1.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other
    assert result_of("cut")["matrix"] == result_of("whole")["matrix"]


@pytest.mark.parametrize(("share", "old"), [(0.01, 1), (0.5, 4), (0.99, 7)])
def test_a_batch_with_replay_has_windows_of_both_and_no_more_than_asked_for(share, old):
    drawn = []

    class Lessons:
        replay_share = share
        training = TrainingConfig(batch_size=8)

        def sampler(self, *numbers, batch_size=None):
            drawn.append((numbers, batch_size))
            return types.SimpleNamespace(batch=lambda n: None)

    learner = types.SimpleNamespace(lessons=Lessons())
    learners.Shared._replayed(learner, 2)
    assert drawn == [((2,), 8 - old), ((0, 1), old)]


def test_forward_transfer_is_measured_against_a_run_of_each_task_alone(run, base):
    settings = [*QUICK, f"base={base}", "training.gradient_clip=inf"]
    assert run("continual.__main__", *settings, "method=alone", "run_dir=alone")[0] == 0
    # the dummy environment is always solved: pretend it was not, as a reference that is perfect can't be beaten
    result = result_of("alone")
    result["curves"] = [[[0, 0.0], [4, 1.0]], [[0, 0.0], [4, 1.0]]]
    Path("alone/result.json").write_text(json.dumps(result))
    status, _, err = run("continual.__main__", *settings, "method=told", "reference=alone", "run_dir=other", "seed=7")
    assert status == 1
    assert "reference=alone has seed=0, but this run has 7" in err
    for word, own in (
        {"max_episode_steps=3": "None", "training.batch_size=3": "4", "filter=all": "successful"}
    ).items():
        status, _, err = run("continual.__main__", *settings, "method=told", "reference=alone", "run_dir=other", word)
        assert status == 1
        assert f"={own}, but this run has {word.partition('=')[2]}" in err
    Path("alone/result.json").write_text(json.dumps(result | {"base_sha256": "other"}))
    status, _, err = run("continual.__main__", *settings, "method=told", "reference=alone", "run_dir=other")
    assert status == 1
    assert "reference=alone has base_sha256=other" in err
    Path("alone/result.json").write_text(json.dumps(result))
    status, _, err = run("continual.__main__", *settings, "method=told", "reference=alone", "run_dir=run")
    assert status == 0, err
    assert result_of("run")["forward_transfer"] == pytest.approx(1.0)
    assert result_of("run")["forgetting"] == 0.0
    perfect = [[[0, 1.0], [4, 1.0]], [[0, 0.0], [4, 1.0]]]
    Path("alone/result.json").write_text(json.dumps(result | {"curves": perfect}))
    with pytest.warns(UserWarning, match="There is no forward transfer to measure: trained alone, 'dummy/"):
        status, _, err = run(
            "continual.__main__", *settings, "method=told", "reference=alone", "run_dir=run", "resume=true"
        )
    assert status == 0, err
    assert result_of("run")["forward_transfer"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=tol"], "Did you mean 'told'"),
        (["tasks=dummy/Steps-v0"], "tasks must be at least two"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["replay_share=1"], "replay_share must be between 0 and 1, got 1.0"),
        (["method=ewc", "ewc_strength=inf"], "ewc_strength must be a number of at least 0, got inf"),
        (["filter=some"], "filter must be successful, all, or a share"),
        (["adapter=full"], "adapter must be LoRA"),
        (["reference=nowhere"], "does not exist"),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(run, dummy_domain, words, said):
    given = [word for word in QUICK if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    method = [] if words[0].startswith("method") else ["method=told"]
    status, _, err = run("continual.__main__", *given, *method, "run_dir=run", *words)
    assert status == 1
    assert said in err
    assert "Traceback" not in err
    assert not Path("run").exists()
