"""peft's two functions for EVA and ours of the same names: one import line apart."""

from collections import defaultdict
from types import MappingProxyType
from typing import NamedTuple

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from eva_rl.adapter import eva
from eva_rl.adapter.eva.drop_in import _moved
from eva_rl.adapter.eva.moments import principal_angle
from eva_rl.batch import Batch
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model import DecisionTransformer, ModelConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped after:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*low_cpu_mem_usage:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

TARGETS = ["c_attn", "c_fc", "c_proj"]


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def sentences(count: int = 96, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Token ids with a skewed distribution, right padding of various lengths, and prompts that labels leave out."""
    generator = torch.Generator().manual_seed(0)
    ids = (40 * torch.rand(count, length, generator=generator) ** 3).long()
    steps = torch.arange(length)
    mask = steps < torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    labels = torch.where(mask & (steps > 4), ids, -100)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": label}
        for i, m, label in zip(ids, mask, labels, strict=True)
    ]


def lora(**options) -> LoraConfig:
    settings = {"rho": 1.0, "tau": 0.999} | options
    return LoraConfig(
        r=4, target_modules=TARGETS, fan_in_fan_out=True, init_lora_weights="eva", eva_config=EvaConfig(**settings)
    )


def loader() -> DataLoader:
    return DataLoader(sentences(), batch_size=32)


def captured(model: nn.Module, state: dict[str, torch.Tensor], run, masks: list[torch.Tensor]) -> dict[str, float]:
    """For each layer the variance its rows hold of all rows read, as a share of what the best subspace holds."""
    inputs = {name: [] for name in state}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].detach()))
        for name in state
    ]
    model.eval()  # peft leaves it in training mode
    run()
    for handle in handles:
        handle.remove()
    shares = {}
    for name, a in state.items():
        x = torch.cat([x[mask] for x, mask in zip(inputs[name], masks, strict=True)]).double()
        x = x - x.mean(0)
        shares[name] = float((x @ a.double().T).square().sum() / torch.linalg.svdvals(x)[: len(a)].square().sum())
    return shares


def assert_as_good(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Where values are nearly equal the subspaces may differ; what they hold may not."""
    assert ours.keys() == theirs.keys()
    for name, share in theirs.items():
        assert ours[name] > share - 0.002
        assert ours[name] > 0.99


@pytest.mark.parametrize("wrapped", [True, False])
def test_on_a_language_model_the_state_dict_is_pefts(wrapped):
    model = get_peft_model(gpt2(), lora()) if wrapped else gpt2()
    config = None if wrapped else lora()
    theirs = peft.get_eva_state_dict(model, loader(), config, show_progress_bar=False)
    ours = eva.get_eva_state_dict(model, loader(), config, show_progress_bar=False)
    assert {name: rows.shape for name, rows in ours.items()} == {name: rows.shape for name, rows in theirs.items()}
    masks = [batch["labels"] != -100 for batch in loader()]
    own, other = (
        captured(model, state, lambda: [model(**batch) for batch in loader()], masks) for state in (ours, theirs)
    )
    assert_as_good(own, other)


def test_on_a_decision_transformer_the_state_dict_is_pefts():
    torch.manual_seed(0)
    size = 6
    interface = Interface(
        name="dummy",
        observation_size=size,
        action_kind="continuous",
        action_size=2,
        observation_mean=(0.0,) * size,
        observation_std=(1.0,) * size,
        action_mean=(0.0,) * 2,
        action_scale=(1.0,) * 2,
        return_scale=1.0,
        reward_scale=1.0,
    )
    model = DecisionTransformer(ModelConfig(2, 2, 32, 8, 0.1), [interface]).eval()
    batches = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        observations = torch.randn(40, 8, size, generator=generator) * 0.6 ** torch.arange(size)
        mask = torch.arange(8) < torch.randint(3, 9, (40, 1), generator=generator)
        actions = torch.randn(40, 8, 2, generator=generator)
        returns = torch.rand(40, 8, generator=generator)
        batches.append(Batch(observations, actions, returns, torch.zeros(40, 8), mask, "dummy"))
    config = LoraConfig(
        r=4,
        target_modules=["q", "k", "v", "o", "up", "down"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.999),
    )
    options = {
        "forward_fn": lambda model, batch: model(batch),
        "prepare_model_inputs_fn": lambda batch, config: model.token_mask(batch),
        "prepare_layer_inputs_fn": lambda inputs, mask, name: inputs[0][mask],
        "show_progress_bar": False,
    }
    theirs = peft.get_eva_state_dict(model, batches, config, **options)
    ours = eva.get_eva_state_dict(model, batches, config, **options)
    assert {name: rows.shape for name, rows in ours.items()} == {name: rows.shape for name, rows in theirs.items()}
    masks = [model.token_mask(batch) for batch in batches]
    own, other = (
        captured(model, state, lambda: [model(batch) for batch in batches], masks) for state in (ours, theirs)
    )
    assert_as_good(own, other)


def test_a_config_that_says_nothing_of_eva_gets_pefts_defaults():
    bare = LoraConfig(r=4, target_modules=TARGETS, fan_in_fan_out=True)
    ours = eva.get_eva_state_dict(gpt2(), loader(), bare, show_progress_bar=False)
    told = lora(**vars(EvaConfig()))
    theirs = eva.get_eva_state_dict(gpt2(), loader(), told, show_progress_bar=False)
    assert ours.keys() == theirs.keys()
    for name, rows in theirs.items():
        torch.testing.assert_close(ours[name], rows, rtol=0, atol=0)


def test_ranks_are_shared_out_as_pefts_are():
    model = get_peft_model(gpt2(), lora(rho=2.0))
    theirs = peft.get_eva_state_dict(model, loader(), show_progress_bar=False)
    ours = eva.get_eva_state_dict(model, loader(), show_progress_bar=False)
    ranks = {name: (len(ours[name]), len(theirs[name])) for name in theirs}
    assert sum(own for own, _ in ranks.values()) == sum(other for _, other in ranks.values()) == 4 * 8
    assert max(abs(own - other) for own, other in ranks.values()) <= 1


def test_whitening_is_pefts():
    config = lora(whiten=True)
    theirs = peft.get_eva_state_dict(gpt2(), loader(), config, show_progress_bar=False)
    ours = eva.get_eva_state_dict(gpt2(), loader(), config, show_progress_bar=False)
    for name, rows in theirs.items():
        # the scale is that of the root of the number of rows seen, which differs with the batches until convergence
        ratio = ours[name].norm(dim=1) / rows.float().norm(dim=1)
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=0.05, atol=0)


@pytest.mark.parametrize("given", ["dataloader", "state dict"])
def test_initialised_by_either_argument_the_adapter_has_these_rows_and_the_model_its_function(given):
    model = gpt2()
    batch = next(iter(loader()))
    expected = model(**batch).logits.detach()
    wrapped = get_peft_model(model, lora(rho=2.0))
    state = eva.get_eva_state_dict(wrapped, loader(), show_progress_bar=False)
    if given == "dataloader":
        result = eva.initialize_lora_eva_weights(wrapped, loader(), show_progress_bar=False)
    else:
        result = eva.initialize_lora_eva_weights(wrapped, eva_state_dict=state)
        assert all(len(rows) == len(state[name]) for name, rows in state.items())  # the argument is not consumed
    assert result is None  # as peft's
    layers = {name: module for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    assert layers.keys() == {name for name, rows in state.items() if len(rows)}
    for name, layer in layers.items():
        torch.testing.assert_close(layer.lora_A["default"].weight, state[name], rtol=0, atol=1e-5)
        assert layer.lora_A["default"].weight.requires_grad
        assert layer.scaling["default"] == pytest.approx(8 / 4)  # alpha / r, whatever the rank
    torch.testing.assert_close(wrapped.eval()(**batch).logits, expected, rtol=0, atol=1e-5)


def test_labels_and_attention_mask_choose_the_rows():
    model, seen = gpt2(), []

    def prepare(inputs, mask, name):
        rows = eva.drop_in.prepare_layer_inputs_fn_language_modeling(inputs, mask, name)
        seen.append(len(rows))
        return rows

    batch = [torch.stack([s[key] for s in sentences()]) for key in ("input_ids", "attention_mask", "labels")]
    data = [dict(zip(("input_ids", "attention_mask", "labels"), batch, strict=True))]
    eva.get_eva_state_dict(model, data, lora(), prepare_layer_inputs_fn=prepare, show_progress_bar=False)
    assert set(seen) == {int((batch[2] != -100).sum())}


def test_each_layer_may_have_a_function_of_its_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    generator = torch.Generator().manual_seed(0)
    left, right = torch.eye(8)[:4], torch.eye(8)[4:]
    halves = [torch.randn(64, 4, generator=generator) @ half for half in (left, right)]
    batches = [torch.stack(halves)]  # (2, 64, 8)
    config = LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    found = eva.get_eva_state_dict(
        Two(),
        batches,
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn={"a": lambda x, _, name: x[0][0], "b": lambda x, _, name: x[0][1]},
        show_progress_bar=False,
    )
    assert found["a"][:, 4:].abs().max() < 1e-4
    assert found["b"][:, :4].abs().max() < 1e-4
    with pytest.raises(ValueError, match="nowhere"):
        eva.get_eva_state_dict(Two(), batches, config, prepare_layer_inputs_fn={"nowhere": lambda x, _, name: x[0]})


def test_what_peft_refuses_is_refused():
    model = gpt2()
    with pytest.raises(ValueError, match="empty"):
        eva.get_eva_state_dict(model, [], lora())
    with pytest.raises(ValueError, match="peft_config is required"):
        eva.get_eva_state_dict(model, loader())
    with pytest.raises(ValueError, match="must be a PeftModel"):
        eva.initialize_lora_eva_weights(model, loader())
    wrapped = get_peft_model(model, lora())
    with pytest.raises(ValueError, match="dataloader is required"):
        eva.initialize_lora_eva_weights(wrapped)
    wrapped.add_adapter("second", lora())
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"single active adapter.*second"):
        eva.initialize_lora_eva_weights(wrapped, loader())
    plain = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=TARGETS, fan_in_fan_out=True))
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        eva.initialize_lora_eva_weights(plain, loader())


def test_layers_that_are_not_linear_are_left_out_with_a_warning():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    wrapped.peft_config["default"].eva_config = EvaConfig(rho=1.0)
    with pytest.warns(UserWarning, match=r"usual initialisation.*base_model\.model\.0"):
        found = eva.get_eva_state_dict(
            wrapped,
            [torch.arange(10)],
            forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    assert list(found) == ["base_model.model.1"]


def test_own_settings_stop_earlier_than_pefts_rule_at_nearly_the_same_variance():
    passes = []

    def forward(model, batch):
        passes.append(1)
        return model(**batch)

    data = loader()
    options = {"forward_fn": forward, "show_progress_bar": False}
    pefts_rule = eva.get_eva_state_dict(gpt2(), data, lora(tau=0.999), **options)
    count = len(passes)
    passes.clear()
    own = eva.get_eva_state_dict(gpt2(), data, lora(), settings=eva.EvaSettings(rho=1.0), **options)
    assert len(passes) < count
    assert {n: x.shape for n, x in own.items()} == {n: x.shape for n, x in pefts_rule.items()}


def test_layers_that_read_the_same_tensor_may_be_given_other_rows_by_their_names():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.q = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.k(x) + self.q(x)

    torch.manual_seed(0)
    batches = [torch.cat([torch.randn(30, 3) * 3, torch.randn(30, 3)], 1) for _ in range(4)]
    batches = [torch.cat([x, x.flip(1)]) for x in batches]  # the first rows vary in other directions than the last
    config = LoraConfig(r=3, target_modules=["k", "q"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    options = {
        "forward_fn": lambda model, batch: model(batch),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": lambda inputs, _, name: inputs[0][:30] if name == "k" else inputs[0][30:],
        "show_progress_bar": False,
    }
    theirs = peft.get_eva_state_dict(Twins(), batches, config, **options)
    ours = eva.get_eva_state_dict(Twins(), batches, config, **options)
    for name, rows in theirs.items():
        assert principal_angle(ours[name], rows.float()) < 10
    assert principal_angle(ours["k"], ours["q"]) > 60


class Pair(NamedTuple):
    """A batch by its fields' names."""

    first: torch.Tensor
    second: torch.Tensor


def test_batches_of_any_container_are_moved_with_their_kind():
    x = torch.ones(2)
    meta = torch.device("meta")
    moved = _moved(Pair(x, x), meta)
    assert type(moved) is Pair
    assert moved.second.device == meta
    ordered = defaultdict(list, {"x": [x, {"y": (x,)}]})
    found = _moved(ordered, meta)
    assert type(found) is defaultdict
    assert found["x"][1]["y"][0].device == meta
    assert found["not there"] == []
    assert ordered["x"][0].device == x.device  # the batch itself stays as it was
    assert _moved(MappingProxyType({"x": x}), meta)["x"].device == meta
    assert _moved({"text": "as it is", "number": 1}, meta) == {"text": "as it is", "number": 1}


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_batch_that_holds_a_generator_is_refused_plainly(device):
    with pytest.raises(UserError, match="holds a generator, which can be gone through once"):
        _moved({"x": (value for value in [torch.ones(2)])}, device)
