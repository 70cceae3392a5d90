"""Many adapters at once: as each of them merged, whoever acts beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import TASK, make_run
from peft import LoraConfig
from safetensors.torch import load_file

import eva_rl
from eva_rl.adapter import attach, load_adapter
from eva_rl.adapter.combine import COMBINATIONS, start_from
from eva_rl.errors import UserError
from eva_rl.library.serve import Adapters, MixedDecoder
from eva_rl.model import Decoder, load_base
from eva_rl.policy import ActingPolicy

RANKS = {"a": 4, "b": 2, "c": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["", "vectors"])
def library(request, tmp_path_factory) -> eva_rl.Library:
    """On a base without vectors of tasks, and on one with them."""
    folder = tmp_path_factory.mktemp("served")
    made = eva_rl.Library(folder / "lib")
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_run(folder, name, seed, rank, vectors=request.param)
        made.add(folder / name, name, sketch=False)
    return made


def merged(library: eva_rl.Library, name: str):
    return load_adapter(load_base(str(library.folder.parent / "base")).model, library.path(name))


def act(decoder: Decoder, observations: torch.Tensor) -> torch.Tensor:
    """The actions (T, n, act) of steps of observations (T, n, obs)."""
    actions = []
    for row in observations:
        actions.append(decoder.act(row, torch.zeros(len(row))))
        decoder.record(actions[-1], torch.zeros(len(row)))
    return torch.stack(actions)


@pytest.fixture
def observations() -> torch.Tensor:
    """More steps than a window has, of six episodes."""
    return torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alone", [False, True])
def test_a_mixed_batch_acts_as_each_merged_model(library, observations, alone):
    adapters = Adapters.load(library, list(RANKS))
    rows = [0, 1, 2, 1, 0, 2]
    mixed = act(MixedDecoder(adapters, rows, alone), observations)
    plain = act(Decoder(load_base(str(library.folder.parent / "base")).model, "dummy", 6, alone), observations)
    for number, name in enumerate(RANKS):
        own = [i for i, row in enumerate(rows) if row == number]
        expected = act(Decoder(merged(library, name), "dummy", len(own), alone), observations[:, own])
        assert torch.allclose(mixed[:, own], expected, atol=1e-4)
        assert not torch.allclose(plain[:, own], expected, atol=1e-2)  # the adapters do something


def test_episodes_that_go_on_keep_their_adapters(library, observations):
    adapters = Adapters.load(library, list(RANKS))
    decoder = MixedDecoder(adapters, [0, 1, 2, 1, 0, 2])
    act(decoder, observations[:4])
    decoder.keep(torch.tensor([1, 5]))
    rest = act(decoder, observations[4:, [1, 5]])
    alone = act(Decoder(merged(library, "b"), "dummy", 1), observations[:, [1]])
    assert torch.allclose(rest[:, :1], alone[4:], atol=1e-4)


def test_an_episodes_actions_are_the_same_bits_whatever_adapters_act_beside_it(library, observations):
    adapters = Adapters.load(library, list(RANKS))
    one = act(MixedDecoder(adapters, [0] * 6), observations)
    other = act(MixedDecoder(adapters, [0, 1, 2, 1, 2, 1]), observations)
    assert torch.equal(one[:, 0], other[:, 0])


def test_after_the_tenth_adapter_the_firsts_actions_are_the_same_bits(tmp_path, observations):
    library = eva_rl.Library(tmp_path / "lib")
    make_run(tmp_path, "run0", 0)
    library.add(tmp_path / "run0", "first", sketch=False)
    before = act(MixedDecoder(Adapters.load(library, ["first"]), [0] * 6), observations)
    for seed in range(1, 10):
        make_run(tmp_path, f"run{seed}", seed)
        library.add(tmp_path / f"run{seed}", f"other{seed}", sketch=False)
    names = [entry.name for entry in library.entries]
    assert len(names) == 10
    adapters = Adapters.load(library, names)
    rows = adapters.numbers(["first", *names[1:6]])
    assert torch.equal(act(MixedDecoder(adapters, rows), observations)[:, 0], before[:, 0])


def test_act_takes_an_adapters_name(library):
    policy = library.policy()
    seen = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    for name in RANKS:
        expected = eva_rl.load_policy(library.path(name))
        policy.reset(adapter=name)
        for row in seen:
            assert policy.act(row) == pytest.approx(expected.act(row), abs=1e-4)


def test_a_swap_within_an_episode_goes_on_as_if_the_new_adapter_had_seen_it_all(library):
    policy, expected = library.policy(), eva_rl.load_policy(library.path("c"))
    seen = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    for row in seen[:11]:
        policy.act(row, adapter="a")
        expected.act(row)
    for row in seen[11:]:
        assert policy.act(row, adapter="c") == pytest.approx(expected.act(row), abs=1e-4)


def test_episodes_of_one_batch_take_a_name_each(library):
    policy = library.policy()
    seen = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    both = policy.act_batch(seen, adapter=["c", "a"])
    for row, name, action in zip(seen, ("c", "a"), both, strict=True):
        assert eva_rl.load_policy(library.path(name)).act(row) == pytest.approx(action, abs=1e-4)
    policy.keep([1])
    assert policy.act_batch(seen[1:]).shape == (1, 2)


def test_each_adapter_asks_for_its_own_tasks_return_whatever_was_before(library):
    policy = library.policy(["a", "b", "c"])
    returns = [1.0, 2.0, 3.0]
    policy._typical = lambda number: returns[number]
    asked, reset = [], ActingPolicy.reset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActingPolicy, "reset", lambda self, wanted=None: (asked.append(wanted), reset(self, wanted)))
        policy.reset(adapter=["a", "c"])
        policy.reset()  # the next batch of the same two
        policy.act_batch(np.zeros((2, 3), np.float32))
        policy.keep([1])
    assert asked == [[1.0, 3.0], [1.0, 3.0]]
    assert policy.task == library.entries[2].task
    assert policy.statistics is policy.adapters.statistics[2]
    policy.reset(adapter="c")
    assert policy.statistics is policy.adapters.statistics[2]


def test_as_many_adapters_as_episodes_are_running_or_one(library):
    policy = library.policy()
    seen = np.zeros((3, 3), np.float32)
    policy.act_batch(seen, adapter=["a", "b", "a"])
    with pytest.raises(UserError, match="one name, or one for each of 3 episodes, got 2"):
        policy.act_batch(seen, adapter=["b", "b"])
    policy.keep([2])  # nothing had changed
    policy.act_batch(seen[:1])


@pytest.mark.parametrize("name", ["d", []])
def test_an_unknown_name_is_refused(library, name):
    with pytest.raises(UserError, match="adapter"):
        library.policy().act_batch(np.zeros((1, 3), np.float32), adapter=name)


def test_an_adapter_that_is_more_than_lora_is_refused(library, tmp_path):
    make_run(tmp_path, "run")
    path = tmp_path / "run/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    other = eva_rl.Library(tmp_path / "lib")
    other.add(tmp_path / "run", "dora", sketch=False)
    with pytest.raises(UserError, match="not LoRA alone"):
        other.policy()


def test_a_rollout_with_each_tasks_adapter_scores_as_each_run_does(run, library, dummy_domain):
    status, _, err = run(
        "evaluate", f"library={library.folder}", f"task={TASK}", "episodes=3", "workers=0", "run_dir=all"
    )
    assert status == 0, err
    found = json.loads(Path("all/result.json").read_text())["tasks"][TASK]
    settings = [f"task={TASK}", "episodes=3", "workers=0", "run_dir=one"]
    status, _, err = run("evaluate", f"adapter={library.path('c')}", *settings)  # all score the same: the last by name
    assert status == 0, err
    expected = json.loads(Path("one/result.json").read_text())["tasks"][TASK]
    assert found["episode_return"] == pytest.approx(expected["episode_return"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["library=nowhere"], "is no library"),
        (["task=dummy/all"], "holds no adapter for 'dummy/Broken-v0'"),
        (["adapter=x"], "name one of them"),
    ],
)
def test_a_library_that_cannot_be_evaluated_is_refused(run, library, dummy_domain, words, said):
    status, _, err = run("evaluate", f"library={library.folder}", f"task={TASK}", "run_dir=x", *words)
    assert status == 1
    assert said in err
    assert not Path("x").exists()


def factors_of(folder: Path, layer: str) -> torch.Tensor:
    """s B A of a saved adapter of rank r and alpha 8."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.{part}.weight"] for part in ("lora_A", "lora_B"))
    return 8 / len(a) * b @ a


@pytest.mark.parametrize(("names", "weights"), [(["a"], [1.0]), (["a", "b"], [0.7, 0.3])])
def test_an_adapter_that_starts_from_others_adds_their_weighted_sum(library, names, weights):
    model = load_base(str(library.folder.parent / "base")).model
    config = LoraConfig(r=6, lora_alpha=3, target_modules=["q", "up"])
    adapter = attach(model, config, start=start_from([library.path(name) for name in names], weights))
    for layer in ("trunk.blocks.0.attention.q", "trunk.blocks.1.feed_forward.up"):
        found = model.get_submodule(layer).get_delta_weight("default")
        expected = sum(w * factors_of(library.path(n), layer) for n, w in zip(names, weights, strict=True))
        assert torch.allclose(found, expected, atol=1e-4)
    trainable = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)


def test_a_start_that_is_none_is_refused(library):
    with pytest.raises(UserError, match="a weight for each of the 1 adapters, got 2"):
        start_from([library.path("a")], [0.5, 0.5])
    with pytest.raises(UserError, match="one of cat"):
        start_from([library.path("a")], [1.0], "sum")


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_of_adapters_of_one_rank_gives_a_start(library, combination):
    model = load_base(str(library.folder.parent / "base")).model
    start = start_from([library.path("a"), library.path("c")], [0.5, 0.5], combination)
    attach(model, LoraConfig(r=4, target_modules=["q"]), start=start)
    assert model.get_submodule("trunk.blocks.0.attention.q").get_delta_weight("default").abs().sum() > 0
