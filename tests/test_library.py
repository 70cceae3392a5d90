"""A library of adapters: the folder, and which adapter is for which observations."""

import json
import multiprocessing
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import TASK, episodes, make_run
from peft import AdaLoraConfig, HiraConfig, KasaConfig, LoraConfig
from safetensors.torch import load_file, save_file

import eva_rl
from eva_rl import load_policy
from eva_rl.adapter.factors import plain_lora
from eva_rl.data import pack
from eva_rl.errors import UserError
from eva_rl.library.index import Entry
from eva_rl.library.sketch import make_sketch
from eva_rl.library.which import Distances, distances, threshold_between
from eva_rl.model import (
    load_base,
)
from eva_rl.spaces import spaces_from_text

QUICK = ["steps=2", "episodes=2", "workers=0", "training.batch_size=4", "training.warmup=1", "zero_shot=false"]


def sentence(err: str) -> str:
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny base and a run's folder `tuned` as finetune leaves it, but for the training."""
    folder = tmp_path_factory.mktemp("made")
    return make_run(folder)


@pytest.fixture
def tuned(made, tmp_path, monkeypatch) -> Path:
    """The same, this test's own, in the working folder."""
    shutil.copytree(made / "tuned", tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    return Path("tuned")


MEANS = {"left": np.array([-2.0, 0, 0]), "right": np.array([2.0, 0, 0]), "up": np.array([0, 2.0, 1.0])}


@pytest.fixture
def library(made, tuned) -> eva_rl.Library:
    """Three adapters of tasks whose observations lie apart."""
    if not (made / "lib").exists():
        first = eva_rl.Library(made / "lib")
        for name, mean in MEANS.items():
            first.add(tuned, name, episodes(name, mean))
    shutil.copytree(made / "lib", "lib")
    return eva_rl.Library("lib")


def test_a_run_is_added_listed_found_and_removed_by_its_commands(run, base):
    settings = [f"task={TASK}", "adapter=eva", f"base={base}", "run_dir=tuned", "demonstrations=5"]
    status, _, err = run("finetune", *settings, *QUICK)
    assert status == 0, err
    tuned = Path("tuned")

    status, out, err = run("library.__main__", "add", "library=lib", f"run={tuned}")
    assert status == 0, err
    assert "Steps-v0: dummy/Steps-v0, added" in out
    result = json.loads((tuned / "result.json").read_text())
    [entry] = eva_rl.Library("lib").entries
    assert (entry.task, entry.method, entry.demonstrations) == (TASK, "eva", 5)
    assert entry.episode_return.mean == result["episode_return"]["mean"]

    status, out, err = run("library.__main__", "list", "library=lib")
    assert status == 0, err
    assert "Steps-v0" in out.splitlines()[2]

    status, out, err = run("library.__main__", "which", "library=lib", f"task={TASK}", "demonstrations=5")
    assert status == 0, err
    name, share, *_ = out.splitlines()[0].split()
    assert name == "Steps-v0"
    assert 0.5 < float(share) <= 1

    status, _, err = run("library.__main__", "remove", "library=lib", "name=Steps-v0")
    assert status == 0, err
    assert len(eva_rl.Library("lib")) == 0
    assert not Path("lib/adapters/Steps-v0").exists()


@pytest.mark.parametrize("vectors", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_new_adapter_begins_as_the_nearest_one_of_a_library_where_that_is_better(run, dummy_domain, vectors):
    words = ["model=tiny", "task=dummy/all", "demonstrations=4", "steps=40", "training.batch_size=4", "run_dir=base"]
    status, _, err = run("pretrain", *words, f"task_vectors={str(vectors).lower()}")
    assert status == 0, err
    common = [f"task={TASK}", "base=base/model", "demonstrations=5", "episodes=0", "workers=0", "training.batch_size=4"]
    status, _, err = run(
        "finetune", *common, "adapter=lora", "steps=60", "training.learning_rate=0.01", "run_dir=first"
    )
    assert status == 0, err
    status, _, err = run("library.__main__", "add", "library=lib", "run=first", "name=first")
    assert status == 0, err

    still = ["steps=1", "training.learning_rate=0", "fresh_learning_rate=0", "training.weight_decay=0"]
    Path("second").mkdir()  # what a run that stopped at once left there
    Path("second/start.json").write_text('{"library": "lib", "adapter": null}')
    status, out, err = run("finetune", *common, "adapter=eva", *still, "start_from=lib", "run_dir=second")
    assert status == 0, err
    assert "nearest adapter is first" in out
    assert "begins as that one" in out
    first, second = (load_policy(own).model for own in ("first", "second"))
    for (name, expected), found in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=name)

    library = eva_rl.Library("lib")
    file = library.path("first") / "adapter_model.safetensors"
    save_file({n: 99 * torch.randn_like(t) for n, t in load_file(file).items()}, file)  # now it is of no use
    status, out, err = run("finetune", *common, "adapter=eva", *still, "start_from=lib", "run_dir=third")
    assert status == 0, err
    assert "begins as it does without a library" in out
    state = Path("third/start.json").read_bytes()
    library.remove("first")  # a run goes on as it began, whatever the library holds by now
    shutil.rmtree("third/checkpoints")
    Path("third/result.json").unlink()
    status, _, err = run(
        "finetune", *common, "adapter=eva", *still, "start_from=lib", "run_dir=third", "resume=true", "episodes=1"
    )
    assert status == 0, err
    assert Path("third/start.json").read_bytes() == state
    Path("third/start.json").write_text("{}")
    Path("third/result.json").unlink()
    again = ["start_from=lib", "run_dir=third", "resume=true", "episodes=1"]
    status, _, err = run("finetune", *common, "adapter=eva", *still, *again)
    assert status == 1
    assert "start.json' is damaged" in err


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(total_step=10, target_modules=["q"]),
        LoraConfig(target_modules=["q"], kasa_config=KasaConfig()),
        LoraConfig(target_modules=["q"], use_dora=True),
        HiraConfig(target_modules=["q"]),
    ],
)
def test_what_is_more_than_loras_two_factors_is_no_start(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert plain_lora(tmp_path) is None
    LoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    assert plain_lora(tmp_path) is not None


def test_only_adapters_of_the_interface_that_is_asked_for_are_ranked(library):
    data = episodes("dummy/new", np.array([1.0, 0, 0]))
    assert library.which(data, interface="dummy").matches == library.which(data).matches
    with pytest.raises(UserError, match="no adapter that acts through the interface 'other'"):
        library.which(data, interface="other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=full", "start_from=lib"], "adapter=full is otherwise"),
        (["adapter=eva_dora", "start_from=lib"], "adapter=eva_dora is otherwise"),
        (["adapter=mica", "start_from=lib"], "adapter=mica is otherwise"),
        (["allocator=sora", "start_from=lib"], "allocator=sora decides them itself"),
        (["start_from=nowhere"], "start_from=nowhere must be a library"),
    ],
)
def test_a_library_that_a_method_cannot_begin_from_is_refused(run, base, words, said):
    status, _, err = run("finetune", f"task={TASK}", f"base={base}", *words, *QUICK)
    assert status == 1
    assert said in err
    assert not Path("runs").exists()


def test_an_adapter_of_a_library_is_one_that_evaluate_and_load_policy_take(library):
    policy = eva_rl.load_policy(library.path("left"))
    assert policy.act(np.zeros(3, np.float32)).shape == (2,)


def test_a_sketch_of_the_default_base_is_a_few_hundred_kilobytes():
    base = load_base("mt40-small")
    rng, spec = np.random.default_rng(0), base.model.interfaces["metaworld"]
    spaces = spaces_from_text(spec.spaces)
    made = {"actions": np.zeros((300, 4)), "rewards": np.zeros(300), "success": None}
    own = [made | {"observations": rng.standard_normal((300, 39))} for _ in range(4)]
    sketch = make_sketch(base.model, "metaworld", pack("metaworld/x", own, *spaces))
    assert 200_000 < sum(tensor.numel() * tensor.element_size() for tensor in sketch.tensors().values()) < 300_000


def test_an_emptied_library_takes_adapters_of_another_base(library, tuned, tmp_path):
    for name in MEANS:
        library.remove(name)
    make_run(tmp_path / "elsewhere", base_seed=1)
    library.add(tmp_path / "elsewhere" / "tuned", "other", episodes("other", MEANS["up"]))
    assert library.which(episodes("other", MEANS["up"])).best.name == "other"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Known are 'add', 'list', 'remove', 'which'."),
        (["ad"], "Did you mean 'add'"),
        (["list", "library=nowhere"], "is no library"),
        (["add", "library=lib"], "'run' is not set"),
        (["add", "library=lib", "run=nowhere"], "holds no adapter"),
        (["remove", "library=lib", "name=lef"], "Did you mean 'left'"),
        (["which", "library=lib", f"task={TASK}", "transitions=0"], "transitions must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(run, library, words, said):
    status, _, err = run("library.__main__", *words)
    assert status == 1
    assert said in sentence(err)


def test_a_name_is_taken_once_and_must_be_a_plain_one(library, tuned):
    with pytest.raises(UserError, match="holds an adapter 'left' already"):
        library.add(tuned, "left")
    for name in ("../left", ".left", "a/b", ""):
        with pytest.raises(UserError, match="letters, digits"):
            library.add(tuned, name)
    assert len(library) == 3


def test_an_adapter_of_another_base_is_refused(library, tuned, tmp_path):
    other = tmp_path / "other" / "adapter"
    shutil.copytree(tuned / "adapter", other)
    notes = json.loads((other / "eva_rl.json").read_text())
    (other / "eva_rl.json").write_text(json.dumps(notes | {"base_sha256": "0" * 64}))
    with pytest.raises(UserError, match="belongs to the base"):
        library.add(other, "other", episodes("other", MEANS["up"]))
    assert not (library.folder / "adapters" / "other").exists()


def test_a_run_that_has_not_ended_is_refused(tuned):
    result = json.loads((tuned / "result.json").read_text())
    (tuned / "result.json").write_text(json.dumps(result | {"status": "partial"}))
    with pytest.raises(UserError, match="has not ended"):
        eva_rl.Library("lib").add(tuned)
    assert not Path("lib").exists()


def test_what_a_killed_process_left_is_ignored_and_written_over(library, tuned):
    # killed while files were copied, and between the folder's renaming and the index
    (library.folder / "adapters" / ".half-x1" / "half").mkdir(parents=True)
    shutil.copytree(library.path("left"), library.folder / "adapters" / "half")
    (library.folder / "adapters" / "half" / "adapter_model.safetensors").write_bytes(b"cut")
    again = eva_rl.Library("lib")
    assert [entry.name for entry in again.entries] == ["left", "right", "up"]
    again.add(tuned, "half", episodes("half", MEANS["up"]))
    assert load_file(again.path("half") / "adapter_model.safetensors")


def _add(name: str) -> None:
    eva_rl.Library("lib").add("tuned", name, sketch=False)


def test_a_library_that_another_process_begins_is_not_taken_for_a_foreign_folder(tmp_path):
    (tmp_path / ".library.json-x1").mkdir()  # about to become the index
    (tmp_path / "adapters").mkdir()
    assert len(eva_rl.Library(tmp_path)) == 0


def test_a_file_is_no_library(tmp_path):
    (tmp_path / "lib").write_text("")
    with pytest.raises(UserError, match="must be a folder, got the file"):
        eva_rl.Library(tmp_path / "lib")


def test_processes_that_add_at_once_lose_nothing(tuned):
    names = [f"a{i}" for i in range(4)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(name,)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [entry.name for entry in eva_rl.Library("lib").entries] == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "can't be read as JSON"),
        ('{"format": 3}', "no index of a library"),
        ('{"format": "x", "base": "b", "base_sha256": "s", "entries": []}', "got 'x'"),
    ],
)
def test_a_damaged_index_is_refused(library, text, said):
    (library.folder / "library.json").write_text(text)
    with pytest.raises(UserError, match=said):
        eva_rl.Library("lib")


def test_an_index_cannot_name_a_folder_elsewhere(library):
    index = json.loads((library.folder / "library.json").read_text())
    index["entries"][0]["name"] = "../../tuned"
    (library.folder / "library.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no name of one"):
        eva_rl.Library("lib")


def test_a_folder_of_other_things_is_no_library(tuned):
    with pytest.raises(UserError, match="name the folder of a library"):
        eva_rl.Library(tuned)


@pytest.mark.parametrize("damage", ["cut", "lacks", "nan", "shape"])
def test_a_damaged_sketch_is_refused(library, damage):
    path = library.path("left") / "sketch.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if name.startswith("means."))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        changed = {"lacks": None, "nan": tensors[first] * torch.nan, "shape": tensors[first][:-1].clone()}[damage]
        kept = {name: tensor for name, tensor in tensors.items() if name != first}
        save_file(kept if changed is None else kept | {first: changed}, path)
    with pytest.raises(UserError, match="add the adapter again"):
        library.which(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("count", [1, 20])
def test_the_task_that_observations_come_from_is_found(library, name, count):
    seen = episodes(name, MEANS[name], seed=1).observations[:count].numpy()
    with pytest.raises(UserError, match="transitions must be at least 1, got 0"):
        library.which(seen, transitions=0)
    ranking = library.which(seen)
    assert ranking.best.name == name
    assert ranking.matches[0].low < ranking.matches[0].share < ranking.matches[0].high
    assert ranking.observations == count


def test_the_interval_narrows_with_more_observations(library):
    widths = []
    for count in (1, 10, 100):
        first = library.which(episodes("left", MEANS["left"], seed=1), count).matches[0]
        widths.append(first.high - first.low)
    assert widths[0] > widths[1] > widths[2] > 0


def test_none_fits_observations_of_a_task_that_no_adapter_is_for(library):
    assert library.which(episodes("down", np.array([0, -3.0, 4.0]), seed=1)).best is None


def test_the_order_of_observations_changes_nothing(library):
    seen = episodes("left", MEANS["left"], seed=1).observations.numpy()
    one, other = library.which(seen), library.which(seen[np.random.default_rng(0).permutation(len(seen))])
    assert [match.name for match in one.matches] == [match.name for match in other.matches]
    for a, b in zip(one.matches, other.matches, strict=True):
        assert (a.share, a.low, a.high) == pytest.approx((b.share, b.low, b.high), abs=1e-6)
    assert one.threshold == other.threshold


@pytest.mark.parametrize(
    "given", [np.zeros((1, 2)), np.zeros(3), np.zeros((0, 3)), np.full((1, 3), np.nan), "text", None]
)
def test_what_is_no_observation_is_refused(library, given):
    with pytest.raises(UserError, match="Observations"):
        library.which(given)


def test_a_library_without_sketches_finds_nothing(tuned):
    library = eva_rl.Library("lib")
    library.add(tuned, sketch=False)
    with pytest.raises(UserError, match="no adapter with a sketch"):
        library.which(np.zeros((1, 3), np.float32))


def test_a_sketch_has_the_moments_of_what_the_layer_reads(made):
    """Against the closed form: mean and singular vectors of the rows that a hook sees."""
    model = load_base(str(made / "base")).model
    trajectories = episodes("left", MEANS["left"], count=3, length=16)
    [name] = model.interfaces
    sketch = make_sketch(model, name, trajectories)
    rows = []
    layer = "trunk.blocks.0.attention.q"
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    used = trajectories.observations[torch.arange(48) % 4 != 3]
    with torch.no_grad():
        embedded = model.embedders[name].state(model.embedders[name].normalize_observations(used[:, None]))
        model.trunk(model.embedders[name].norm(embedded), tokens=("state",))
    handle.remove()
    x = rows[0][:, 0].double()
    _, values, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert torch.allclose(sketch.means[layer].double(), x.mean(0), atol=1e-5)
    assert torch.allclose(sketch.values[layer][:2].double(), values[:2] ** 2 / len(x), rtol=1e-3)
    cosines = (sketch.components[layer][:2].double() * vectors[:2]).sum(-1).abs()
    assert torch.allclose(cosines, torch.ones(2).double(), atol=1e-3)
    assert float(sketch.totals[layer]) == pytest.approx(float((values**2).sum() / len(x)), rel=1e-3)


def test_the_share_is_one_within_the_subspace_and_falls_with_the_distance_from_it():
    errors = torch.tensor([[[0.0, 0.0]], [[1.0, 3.0]]]).double()  # (2 tasks, 1 layer, 2 observations)
    found = Distances(errors, torch.tensor([[4.0, 4.0]]).double())
    assert found.shares().tolist() == [1.0, 0.5]


def test_distances_are_those_of_least_squares(made):
    model = load_base(str(made / "base")).model
    [name] = model.interfaces
    sketch = make_sketch(model, name, episodes("left", MEANS["left"]))
    layer = next(iter(sketch.means))
    x = torch.randn(5, len(sketch.means[layer]), generator=torch.Generator().manual_seed(0)).double()
    basis = sketch.components[layer].double().T  # (d, k)
    centred = (x - sketch.means[layer].double()).T
    expected = (centred - basis @ torch.linalg.lstsq(basis, centred).solution).square().sum(0)
    assert torch.allclose(distances([sketch], {layer: x}).errors[0, 0], expected, rtol=1e-5)


def test_the_threshold_separates_what_fits_from_what_does_not():
    assert threshold_between(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == pytest.approx(0.5)
    assert threshold_between(np.array([0.8, 0.9, 1.0]), np.array([])) == pytest.approx(0.81)
    mixed = threshold_between(np.array([0.3, 0.8, 0.9, 1.0]), np.array([0.1, 0.2, 0.5]))
    assert 0.5 < mixed <= 0.8


def test_an_entry_goes_through_json():
    from eva_rl.files import from_json

    entry = Entry("a", "b/c", "eva", 5, True)
    assert from_json(Entry, json.loads(json.dumps(asdict(entry)))) == entry
