"""Settings: YAML and the command line -> typed dataclasses, and one sentence for every mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from eva_rl.config import (
    FinetuneConfig,
    PretrainConfig,
    entry_point,
    parse,
    protocol,
    run_folder,
    setting_names,
    to_yaml,
)
from eva_rl.errors import UserError, while_read
from eva_rl.model import ModelConfig
from eva_rl.training import TrainingConfig


@dataclass(frozen=True)
class Shape:
    width: int
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    name: str
    steps: int
    rate: float
    resume: bool
    shape: Shape
    noise: tuple[float, ...]
    target: float | None
    extra: dict[str, Any] | None
    place: str | None = "here"


GOOD = {
    "name": "run",
    "steps": 3,
    "rate": 0.5,
    "resume": False,
    "shape": {"width": 32, "tokens": ["return", "state"]},
    "noise": [0, 0.1, "1e-3"],
    "target": None,
    "extra": None,
}


def read(**changes: Any) -> Example:
    return parse(OmegaConf.create(GOOD | changes), Example)


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as error:
        read(**changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def compose(name: str, *overrides: str):
    with hydra.initialize_config_module("eva_rl.configs", version_base="1.3"):
        return hydra.compose(name, list(overrides))


# --- values


def test_values_are_converted_to_the_declared_types():
    assert read() == Example(
        name="run",
        steps=3,
        rate=0.5,
        resume=False,
        shape=Shape(32, ("return", "state")),
        noise=(0.0, 0.1, 0.001),
        target=None,
        extra=None,
        place="here",
    )


def test_one_value_is_a_list_of_one():
    assert read(noise=0.1).noise == (0.1,)
    assert read(shape={"width": 32, "tokens": "state"}).shape.tokens == ("state",)


@pytest.mark.parametrize(
    ("given", "expected"), [(1, 1.0), ("1e-3", 0.001), ("3", 3.0), (-2.5, -2.5), ("1E5", 1e5)], ids=str
)
def test_numbers_may_be_whole_or_in_scientific_notation(given, expected):
    for config in (read(rate=given).rate, read(target=given).target, read(noise=[given]).noise[0]):
        assert config == expected
        assert type(config) is float


def test_optional_values_sections_and_defaults():
    assert read(extra={"a": [1, 2]}).extra == {"a": [1, 2]}
    assert read(place=None).place is None
    assert read(place="there").place == "there"
    assert read(noise=[]).noise == ()


def test_a_number_where_text_was_expected_is_taken_as_text():
    assert read(name=7).name == "7"


def test_references_between_settings_are_resolved():
    assert read(rate="${steps}").rate == 3.0


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("steps", "many", "a whole number"),
        ("steps", 2.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", None, "a whole number"),
        ("steps", [1], "a whole number"),
        ("rate", "fast", "a number"),
        ("rate", True, "a number"),
        ("rate", None, "a number"),
        ("resume", "yes please", "true or false"),
        ("resume", 1, "true or false"),
        ("name", None, "text"),
        ("name", ["a"], "text"),
        ("noise", {"a": 0.1}, "a list"),
        ("shape", "small", "a list or section"),
        ("shape", None, "a list or section"),
        ("target", "high", "a number"),
        ("extra", 3, "a list or section"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_key_and_the_kind(key, value, kind):
    sentence = refusal(**{key: value})
    assert sentence.startswith(f"{key} must be ")
    assert kind in sentence


def test_a_wrong_value_in_a_section_or_list_is_named_with_its_path():
    assert refusal(shape={"width": "wide", "tokens": []}).startswith("shape.width must be ")
    assert refusal(noise=[0.1, "loud"]).startswith("noise must be ")


def test_an_unknown_key_is_refused_with_the_nearest_one():
    assert refusal(stepz=3) == "There is no setting 'stepz'. Did you mean 'steps'?"
    assert "'shape.witdh'" in refusal(shape={"width": 1, "tokens": [], "witdh": 2})
    assert "'width'" in refusal(shape={"width": 1, "tokens": [], "witdh": 2})


@pytest.mark.parametrize("key", ["steps", "shape", "target"])
def test_a_missing_key_is_refused_by_name(key):
    with pytest.raises(UserError, match=f"'{key}' is not set: add {key}="):
        parse(OmegaConf.create({k: v for k, v in GOOD.items() if k != key}), Example)


def test_a_value_left_open_is_refused_by_name():
    assert "'steps' is not set" in refusal(steps="???")
    assert "'shape.width' is not set" in refusal(shape={"width": "???", "tokens": []})


def test_setting_names_have_dots():
    names = setting_names(Example)
    assert names == [
        "name",
        "steps",
        "rate",
        "resume",
        "shape",
        "shape.width",
        "shape.tokens",
        "noise",
        "target",
        "extra",
        "place",
    ]


# --- the files in configs/


@pytest.mark.parametrize(
    "model", sorted(path.name.removesuffix(".yaml") for path in (files("eva_rl.configs") / "model").iterdir())
)
def test_pretraining_settings_are_complete_and_accepted_by_model_and_loop(model):
    config = parse(compose("pretrain", f"model={model}"), PretrainConfig)
    ModelConfig(**vars(config.model))
    TrainingConfig(**vars(config.training))
    assert config.task == ("metaworld/mt40",)


@pytest.mark.parametrize("adapter", ["none", "full", "lora", "eva"])
def test_fine_tuning_settings_are_complete_for_every_adapter(adapter):
    config = parse(compose("finetune", f"adapter={adapter}", "task=metaworld/hammer-v3"), FinetuneConfig)
    TrainingConfig(**vars(replace(config.training, learning_rate=config.adapter.learning_rate)))
    assert config.adapter.name == adapter


@pytest.mark.parametrize("name", ["collect", "pretrain", "finetune"])
def test_a_cluster_calls_a_job_by_its_command(name):
    with hydra.initialize_config_module("eva_rl.configs", version_base="1.3"):
        assert hydra.compose(name, return_hydra_config=True).hydra.job.name == name


@pytest.mark.parametrize("command", ["tasks", "finetune --help", "finetune 'adapter=?'", "finetune --cfg job task=a/b"])
@pytest.mark.parametrize("option", ["", pytest.param("-u", marks=pytest.mark.slow)])
def test_a_reader_that_has_seen_enough_gets_no_traceback(option, command):
    command = f"{sys.executable} {option} -m eva_rl.{command} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_a_config_written_as_yaml_reads_back_the_same():
    for config, schema in (
        (parse(compose("pretrain", "training.learning_rate=1e-5", "run_dir=a b"), PretrainConfig), PretrainConfig),
        (parse(compose("finetune", "task=minari/me/mine-v0"), FinetuneConfig), FinetuneConfig),
        (read(extra={"a": {"b": [1, None, "x"]}}), Example),
    ):
        assert is_dataclass(config)
        written = OmegaConf.create(to_yaml(config))
        assert written.pop("defaults") == ["entry", "_self_"]
        assert parse(written, schema) == config


def test_a_run_goes_where_it_is_told_or_into_a_dated_folder(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # another test's command may have left its own
    assert run_folder("some/where") == Path("some/where")
    assert run_folder(None).parts[0] == "runs"
    assert run_folder(None, "metaworld/hammer-v3", "eva-0").parts[1] == "metaworld-hammer-v3"
    assert run_folder(None, "metaworld/hammer-v3", "eva-0").name.startswith("eva-0-20")


# --- the command line


@pytest.fixture
def command(monkeypatch, capfd, tmp_path) -> Callable[..., tuple[Any, str]]:
    """A function that runs an entry point whose body is `main` here, and returns its exit status and standard error."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str, main: Callable[[PretrainConfig], None] = lambda config: None) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
        status = 0
        try:
            entry_point(PretrainConfig, "pretrain")(main)()
        except SystemExit as exit:
            status = exit.code
        return status, capfd.readouterr().err

    return call


def test_the_body_receives_the_typed_settings(command):
    received = []
    assert command("steps=7", "model=tiny", "training.learning_rate=1e-3", main=received.append) == (0, "")
    assert isinstance(received[0], PretrainConfig)
    assert (received[0].steps, received[0].model.width, received[0].training.learning_rate) == (7, 32, 1e-3)


@pytest.mark.parametrize(
    ("argument", "mentioned"),
    [
        ("stepz=3", ["'stepz'", "'steps'"]),
        ("training.batch_sise=3", ["batch_sise'", "'training.batch_size'"]),
        ("training.lr=3", ["'training.lr'"]),
        ("model=huge", ["huge", "tiny", "small", "paper"]),
        ("+foo=1", ["'foo'"]),
        ("+training.foo=1", ["'training.foo'"]),
        ("steps=abc", ["steps must be a whole number, got abc"]),
        ("steps=", ["steps", "a whole number"]),
        ("steps=???", ["'steps' is not set"]),
        ("~steps", ["'steps' is not set"]),
        ("steps", ["steps"]),
        ("task=[1", ["[1"]),
        ("training=3", ["training"]),
        ("model=3", ["model"]),
        ("optimizer=[1,2]", ["must be one name"]),
        ("run_dir=${nope}", ["nope"]),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_with_one_sentence(command, argument, mentioned):
    status, stderr = command(argument)
    assert isinstance(status, str), status  # sys.exit prints the sentence and exits with 1
    assert status.startswith("error: ")
    assert "\n" not in status
    for part in mentioned:
        assert part in status
    assert stderr == ""


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_hydras_own_switch_for_tracebacks_changes_no_answer(command, monkeypatch, value):
    monkeypatch.setenv("HYDRA_FULL_ERROR", value)
    status, stderr = command("model=huge")
    assert status.startswith("error: There is no 'model/huge'.")
    assert stderr == ""


def test_a_users_mistake_met_later_is_one_sentence_too(command):
    def main(config: PretrainConfig) -> None:
        raise UserError("The folder is full: empty it.")

    assert command(main=main) == ("error: The folder is full: empty it.", "")
    assert list(Path().iterdir()) == []


def test_ctrl_c_ends_with_status_130_and_no_traceback(command):
    def main(config: PretrainConfig) -> None:
        raise KeyboardInterrupt

    status, stderr = command(main=main)
    assert status == 130
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr


def test_a_bug_keeps_its_traceback(command):
    def main(config: PretrainConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command(main=main)


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "eva_rl.pretrain", *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_a_misspelt_setting_ends_the_process_with_one_line_on_standard_error(tmp_path):
    (tmp_path / "here").mkdir()
    process = shell(tmp_path / "here", "stepz=3")
    assert process.returncode == 1
    assert process.stderr == "error: There is no setting 'stepz'. Did you mean 'steps'?\n"
    assert list((tmp_path / "here").iterdir()) == []


def test_a_wrong_value_ends_the_process_with_one_line_on_standard_error(tmp_path):
    (tmp_path / "here").mkdir()
    process = shell(tmp_path / "here", "steps=many")
    assert process.returncode == 1
    assert process.stderr == "error: steps must be a whole number, got many.\n"
    assert list((tmp_path / "here").iterdir()) == []


def test_help_names_the_settings_and_writes_nothing(tmp_path):
    (tmp_path / "here").mkdir()
    process = shell(tmp_path / "here", "--help")
    assert process.returncode == 0
    assert process.stderr == ""
    assert "demonstrations" in process.stdout
    assert list((tmp_path / "here").iterdir()) == []


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_a_reader_that_has_seen_enough():
    with pytest.raises(BrokenPipeError, match="a simulator"), while_read():
        raise BrokenPipeError("a simulator")


def test_an_infinite_setting_is_no_infinite_number_in_a_run_s_json():
    config = parse(compose("finetune", "task=gym/Pendulum-v1", "training.gradient_clip=inf"), FinetuneConfig)
    assert config.training.gradient_clip == float("inf")
    assert json.loads(json.dumps(protocol(config), allow_nan=False))["training"]["gradient_clip"] == "inf"
