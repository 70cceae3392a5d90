"""The Python API: what `eva_rl` promises, and that it does what the commands do."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import eva_rl
from eva_rl.config.words import completed, words_of
from eva_rl.model import DecisionTransformer, ModelConfig, save_base
from eva_rl.settings import EvaluateConfig, EvaOptions, FinetuneConfig, PretrainConfig, TrainingConfig

TASK = "minari/toy/steps-v0"
TINY = {"batch_size": 2, "precision": "float32"}


@pytest.fixture
def base(tmp_path, make_dataset) -> str:
    """A model that knows no task, and a dataset it can be adapted to; the working folder is empty."""
    make_dataset("toy/steps-v0")
    save_base(tmp_path / "base", DecisionTransformer(ModelConfig(1, 2, 16, 4, 0.0), []), {})
    return str(tmp_path / "base")


def tiny(base: str, folder: Path, **changes) -> FinetuneConfig:
    settings = {"task": TASK, "base": base, "steps": 2, "episodes": 2, "workers": 0, "run_dir": str(folder)}
    return eva_rl.Finetune(**(settings | {"training": TINY} | changes))


# --- the promise


def test_all_names_what_there_is_and_nothing_else():
    assert sorted(eva_rl.__all__) == eva_rl.__all__
    assert all(getattr(eva_rl, name) is not None for name in eva_rl.__all__)
    assert set(eva_rl.__all__) <= set(dir(eva_rl))
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        eva_rl.fine_tune  # noqa: B018


def test_describing_a_job_needs_no_torch_and_importing_the_package_no_hydra():
    code = """
import sys, time
began = time.process_time()
import eva_rl
print(time.process_time() - began < 0.3, "hydra" in sys.modules, "torch" in sys.modules)
eva_rl.Finetune(task="a/b"), eva_rl.Evaluate(task="a/b"), eva_rl.EvaSettings(), eva_rl.execute, eva_rl.compare
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]


def test_a_command_of_the_same_name_does_not_take_a_jobs_place():
    import eva_rl.evaluate
    import eva_rl.finetune
    import eva_rl.pretrain

    assert (eva_rl.Finetune, eva_rl.Pretrain, eva_rl.Evaluate) == (FinetuneConfig, PretrainConfig, EvaluateConfig)


# --- one set of defaults


@pytest.mark.parametrize("schema", [FinetuneConfig, PretrainConfig, EvaluateConfig])
def test_a_default_in_python_is_the_one_in_the_commands_file(schema):
    job = schema(task=("a/b",) if schema is PretrainConfig else "a/b")
    found = completed(job)
    left_open = {"adapter", "model", "training", "steps"} if schema is not EvaluateConfig else set()
    left_open -= {"steps"} if schema is PretrainConfig else set()
    for name in {f.name for f in fields(schema)} - left_open:
        assert getattr(found, name) == getattr(job, name), name


def test_the_files_of_settings_override_few_of_the_defaults_that_engines_share():
    found = completed(eva_rl.Finetune(task="a/b"))
    assert found.training == TrainingConfig(learning_rate=None)
    assert found.adapter.eva == EvaOptions(rho=1.0, budget="weights")
    changed = {"batch_size": 64, "learning_rate": 8e-4, "warmup": 200, "checkpoint_every": 250, "log_every": 20}
    assert completed(eva_rl.Pretrain(task=("a/b",))).training == TrainingConfig(**changed)
    assert {f.name for f in fields(eva_rl.EvaSettings)} - {f.name for f in fields(EvaOptions)} == {"seed"}


def test_the_words_of_a_job_say_what_it_changes():
    job = eva_rl.Finetune(task="a/b", adapter="lora", training={"warmup": 3}, run_dir="it's é\\", seed=1, video=True)
    words = words_of(job)
    assert words == [
        "task=a/b",
        "adapter=lora",
        "training.warmup=3",
        "seed=1",
        "video=true",
        "run_dir='it\\'s é\\\\'",
    ]
    found = completed(job, ["adapter.rank=3"])
    assert (found.run_dir, found.adapter.rank, found.training.warmup) == ("it's é\\", 3, 3)
    assert found.steps == found.adapter.steps  # left to the adapter
    assert completed(found) is found


def test_sections_lists_and_numbers_by_name_survive_the_way():
    job = eva_rl.Pretrain(task=("a/b", "c/d"), model=ModelConfig(1, 2, 16, 4, 0.0), weights={"a": 2.0}, training=TINY)
    found = completed(job)
    assert (found.task, found.model, found.weights) == (job.task, job.model, job.weights)
    assert (found.training.batch_size, found.training.warmup) == (2, 200)
    assert completed(eva_rl.Pretrain(task="a/b", model="tiny")).model.layers == 2


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (eva_rl.Finetune(task="a/b", adapter="loar"), "There is no 'adapter/loar'. Did you mean 'lora'"),
        (eva_rl.Finetune(task="a/b", training={"warmpu": 3}), "There is no setting 'training.warmpu'. Did you mean"),
        (eva_rl.Finetune(task="a/b", resume=True), "resume=true was given without run_dir"),
        (eva_rl.Finetune(task="a/b", steps="many"), "steps must be a whole number, got many"),
        (eva_rl.Evaluate(task="a/b", seed=-1), "seed must be"),
    ],
)
def test_a_mistake_is_answered_with_the_commands_sentence(job, sentence):
    with pytest.raises(eva_rl.UserError) as error:
        eva_rl.execute(job)
    assert str(error.value).startswith(sentence)


# --- execute and compare


def test_a_run_in_python_is_the_commands_run(run, base, tmp_path):
    by_python = eva_rl.execute(tiny(base, tmp_path / "python", adapter="lora"), "adapter.rank=2")
    words = [f"training.{name}={value}" for name, value in TINY.items()]
    words += [f"task={TASK}", f"base={base}", "steps=2", "episodes=2", "workers=0", "adapter=lora", "adapter.rank=2"]
    assert run("finetune", *words, "run_dir=command")[0] == 0
    assert by_python.folder == tmp_path / "python"
    weights = "adapter/adapter_model.safetensors"
    assert (by_python.folder / weights).read_bytes() == (tmp_path / "command" / weights).read_bytes()
    assert by_python.result["settings"] == eva_rl.Run(tmp_path / "command").result["settings"]
    assert by_python.result["status"] == "complete"


def test_what_a_run_trained_acts_and_is_evaluated(base, tmp_path):
    run = eva_rl.execute(tiny(base, tmp_path / "run", adapter="head"))
    policy = run.policy()
    policy.reset()
    assert policy.action_space.contains(policy.act(policy.observation_space.sample()))
    checkpoint = str(run.folder / "model")
    job = eva_rl.Evaluate(task=TASK, checkpoint=checkpoint, episodes=2, workers=0, run_dir=str(tmp_path / "scores"))
    assert eva_rl.execute(job).result["tasks"][TASK]["success_rate"]["n"] == 2


def test_runs_are_compared_as_the_report_compares_them(base, tmp_path):
    runs = [eva_rl.execute(tiny(base, tmp_path / "runs" / name, adapter=name)) for name in ("none", "lora")]
    rows = eva_rl.compare(tmp_path / "runs")
    assert [(row.method, row.runs) for row in rows] == [(row.method, row.runs) for row in eva_rl.compare(runs)]
    assert {row.method for row in rows} == {"none", "lora"}
    assert {row.score for row in rows} == {"success_rate"}
    by_method = {row.method: row for row in rows}
    assert by_method["none"].trainable_parameters == 0 < by_method["lora"].trainable_parameters
    assert by_method["lora"].mean == runs[1].result["success_rate"]["mean"]
    with pytest.raises(eva_rl.UserError, match="no complete fine-tuning run"):
        eva_rl.compare(tmp_path / "base")
