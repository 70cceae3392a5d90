"""A model on disk: whole or not at all, the same after a round trip, refused in one sentence when it is not ours."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open

import eva_rl.model.checkpoint as checkpoint
from eva_rl.batch import Batch
from eva_rl.errors import UserError
from eva_rl.files import write_json
from eva_rl.interface import Interface, TaskStatistics
from eva_rl.model import AdapterNotes, DecisionTransformer, ModelConfig, load_base, load_notes, save_base
from eva_rl.model.checkpoint import NOTES, find_base

ARM = Interface("arm", 3, "continuous", 2, (1.0, 2.0, 0.1), (0.5, 1.5, 0.2), (0.1, 0.0), (2.0, 3.0), 50.0, 4.0)
GAME = Interface("game", 4, "discrete", 5, (0.0,) * 4, (1.0,) * 4, (), (), 10.0, 1.0)
TASKS = {
    "toy/reach": TaskStatistics(episodes=40, return_max=123.456, return_mean=0.1, success_rate=0.95),
    "toy/game": TaskStatistics(episodes=7, return_max=1.0, return_mean=-1.0, success_rate=None),
}


def make_model(layers: int = 1, width: int = 16, seed: int = 0) -> DecisionTransformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        layers=layers, heads=2, width=width, context=4, dropout=0.1, tokens=("return", "state", "action")
    )
    return DecisionTransformer(config, [ARM, GAME])


def make_batch(interface: Interface) -> Batch:
    generator = torch.Generator().manual_seed(0)
    discrete = interface.action_kind == "discrete"
    return Batch(
        observations=torch.randn(2, 4, interface.observation_size, generator=generator),
        actions=torch.randint(interface.action_size, (2, 4), generator=generator)
        if discrete
        else torch.randn(2, 4, interface.action_size, generator=generator),
        returns_to_go=torch.randn(2, 4, generator=generator),
        rewards=torch.zeros(2, 4),
        mask=torch.ones(2, 4, dtype=torch.bool),
        interface=interface.name,
    )


def refusal(folder: Path | str) -> str:
    """The sentence that loading `folder` is refused with."""
    with pytest.raises(UserError) as error:
        load_base(str(folder))
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_base(tmp_path / "models" / "base", make_model(), TASKS)
    return tmp_path / "models" / "base"


@torch.no_grad()
def test_a_round_trip_gives_identical_outputs_interfaces_and_statistics(saved):
    base, original = load_base(str(saved)), make_model().eval()
    assert base.model.config == original.config
    assert base.model.interfaces == {"arm": ARM, "game": GAME}
    assert base.tasks == TASKS
    assert base.path == saved
    assert not base.model.training
    for interface in (ARM, GAME):
        assert torch.equal(base.model(make_batch(interface)), original(make_batch(interface)))


def test_a_second_round_trip_writes_the_same_bytes(saved, tmp_path):
    base = load_base(str(saved))
    save_base(tmp_path / "again", base.model, base.tasks)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_base_is_safetensors_and_json_and_nothing_else(saved):
    assert {path.name for path in saved.iterdir()} == {"model.safetensors", "config.json"}
    assert {path.name for path in saved.parent.iterdir()} == {"base"}
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(make_model().state_dict())
    json.loads((saved / "config.json").read_text())


@torch.no_grad()
def test_the_model_card_is_kept_when_a_base_is_overwritten(saved):
    (saved / "README.md").write_text("# How it was made\n")
    save_base(saved, make_model(seed=1), TASKS)
    assert (saved / "README.md").read_text() == "# How it was made\n"
    assert torch.equal(load_base(str(saved)).model(make_batch(ARM)), make_model(seed=1).eval()(make_batch(ARM)))


def test_an_interrupted_save_leaves_the_old_base_whole(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_base(saved, make_model(seed=1), TASKS)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["base"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="can't be written"):
        save_base(tmp_path / "file" / "base", make_model(), TASKS)


# --- damage


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights_are_refused(saved, share):
    weights = saved / "model.safetensors"
    os.truncate(weights, int(share * weights.stat().st_size))
    assert "model.safetensors" in refusal(saved)


def test_missing_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(saved)


@pytest.mark.parametrize("other", [{"width": 32}, {"layers": 2}], ids=str)
def test_weights_of_another_architecture_are_refused(saved, tmp_path, other):
    save_base(tmp_path / "other", make_model(**other), TASKS)
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert "another architecture" in refusal(saved)


def test_a_missing_config_is_refused(saved):
    (saved / "config.json").unlink()
    assert "config.json" in refusal(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "gpt2"}', '{"model_type": "gpt2"}'])
def test_a_config_of_another_format_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    assert "config.json" in refusal(saved)


def test_a_config_of_bytes_that_are_not_text_is_refused(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json" in refusal(saved)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("architecture", None),
        ("interfaces", None),
        ("tasks", None),
        ("architecture", {"layers": 1, "depth": 2}),
        ("architecture", {"layers": "one"}),
        ("architecture", "GPT-2"),
        ("interfaces", [{"name": "arm"}]),
        ("interfaces", ["arm"]),
        ("tasks", ["toy/reach"]),
    ],
    ids=str,
)
def test_an_incomplete_config_is_refused(saved, part, value):
    config = json.loads((saved / "config.json").read_text())
    del config[part]
    (saved / "config.json").write_text(json.dumps(config if value is None else config | {part: value}))
    assert "config.json" in refusal(saved)


DAMAGE = [
    ("tasks", "toy/reach", "return_max", None),
    ("tasks", "toy/reach", "return_mean", "high"),
    ("tasks", "toy/reach", "episodes", 1.5),
    ("tasks", "toy/reach", "return_deciles", [0.0, None]),
    ("tasks", "toy/reach", "return_max", float("nan")),
    ("interfaces", 0, "observation_mean", [0.0, None, 0.0]),
    ("interfaces", 0, "observation_mean", [0.0, "x", 0.0]),
    ("interfaces", 0, "observation_mean", [0.0]),  # broadcasting would fit it
    ("interfaces", 0, "observation_std", [1.0, 0.0, 1.0]),
    ("interfaces", 0, "action_scale", None),
    ("interfaces", 0, "return_scale", 0.0),
    ("interfaces", 0, "action_kind", "analog"),
    ("interfaces", 0, "observation_size", 10**12),
    ("interfaces", 0, "parts", [{"kind": "vector", "shape": 3}]),
    ("interfaces", 0, "name", 7),
    ("interfaces", 0, "name", "a.b"),
    ("architecture", "layers", 10**9),
    ("architecture", "width", True),
    ("architecture", "tokens", "state"),
    ("architecture", "dropout", None),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_value_of_another_type_or_size_in_a_config_is_refused(saved, damage):
    *place, value = damage
    config = json.loads((saved / "config.json").read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (saved / "config.json").write_text(json.dumps(config))
    assert "config.json" in refusal(saved)


# --- names


def test_a_base_is_found_by_its_path_and_by_its_name_in_checkpoints(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINTS", saved.parent)
    assert find_base(str(saved)) == saved
    assert find_base("base") == saved


def test_an_unknown_name_is_refused_with_the_nearest_one(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINTS", saved.parent)
    sentence = refusal("bass")
    assert "'bass'" in sentence
    assert "Did you mean 'base'?" in sentence


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/base", "a/b/c", ""])
def test_a_name_that_can_be_no_repository_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(checkpoint, "CHECKPOINTS", tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    refusal(name)


@pytest.mark.parametrize("error", [OSError("no route to host"), ConnectionError("offline"), ValueError("bad name")])
def test_a_hub_name_is_refused_in_one_sentence_when_the_hub_cannot_be_reached(error, monkeypatch):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sentence = refusal("someone/model")
    assert "'someone/model'" in sentence
    assert "internet" in sentence


def test_a_hub_name_loads_what_the_hub_gives(saved, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append(name)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_base("someone/model").tasks == TASKS
    assert asked == ["someone/model"]


# --- the notes beside an adapter


def test_the_notes_of_an_adapter_survive_a_round_trip(tmp_path):
    for interface in (ARM, GAME):
        notes = AdapterNotes("base", "1f3c", "toy/reach", interface, TASKS["toy/reach"])
        write_json(tmp_path / NOTES, asdict(notes))
        assert load_notes(tmp_path) == notes


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", "null", '{"base": "base", "task": "toy/reach"}'])
def test_notes_that_are_missing_or_damaged_are_refused(tmp_path, text):
    if text is not None:
        (tmp_path / NOTES).write_text(text)
    with pytest.raises(UserError) as error:
        load_notes(tmp_path)
    assert NOTES in str(error.value)
    assert "\n" not in str(error.value)
