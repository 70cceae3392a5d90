"""What users of peft's EVA reported: each as it was, on a tiny model."""

import traceback

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import nn

from eva_rl.adapter import attach
from eva_rl.adapter.eva import EvaSettings, eva_init, get_eva_state_dict, initialize_lora_eva_weights
from eva_rl.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped after:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*low_cpu_mem_usage:UserWarning"),
]
WIDTH = 12


def config(*targets: str, rho: float = 1.0, **changes) -> LoraConfig:
    options = {"r": 3, "target_modules": list(targets), "init_lora_weights": "eva", "eva_config": EvaConfig(rho=rho)}
    return LoraConfig(**(options | changes))


def rows(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) * 0.6 ** torch.arange(WIDTH)


def assert_leading(components: torch.Tensor, read: torch.Tensor) -> None:
    """These rows hold what the leading right-singular vectors of all rows read hold."""
    read = read.double() - read.double().mean(0)
    best = torch.linalg.svdvals(read)[: len(components)].square().sum()
    assert float((read @ components.double().T).square().sum() / best) > 0.995


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.step, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(h + x[:, t]))
        return self.out(h)


@pytest.mark.parametrize("lengths", [(3, 5, 2, 6), (1, 5, 3), (5, 5, 3, 3)])
def test_calls_are_counted_for_each_batch(lengths):
    model = Recurrent()
    batches = [rows(8 * n, seed).view(8, n, WIDTH) for seed, n in enumerate(lengths)]
    read = []
    handle = model.step.register_forward_pre_hook(lambda _, x: read.append(x[0].detach()))
    for batch in batches:
        model(batch)
    handle.remove()
    found = eva_init(model, batches, {"step": 3, "out": 2}, EvaSettings(rho=1.0, tau=1.0))
    assert found["step"].rows == 8 * sum(lengths)
    assert found["out"].rows == 8 * len(lengths)
    assert_leading(found["step"].components, torch.cat(read))


class Experts(nn.Module):
    """Two experts; a batch's mean says which of them it reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in "ab"}) for _ in range(2))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.experts[0] if x.mean() > 0 else self.experts[1]
        return self.last(torch.tanh(chosen["a"](x)) + torch.tanh(chosen["b"](x)))


@pytest.mark.parametrize("signs", ["+-+--+", "++-+", "-+-+++"])
def test_an_expert_that_some_batches_do_not_reach_has_the_rows_of_those_that_do(signs):
    batches = [rows(30, seed) + (1.0 if sign == "+" else -1.0) for seed, sign in enumerate(signs)]
    names = [f"experts.{i}.{n}" for i in range(2) for n in "ab"] + ["last"]
    found = eva_init(Experts(), batches, dict.fromkeys(names, 3), EvaSettings(rho=1.0, tau=1.0))
    for i, sign in enumerate("+-"):
        read = torch.cat([batch for batch, s in zip(batches, signs, strict=True) if s == sign])
        for n in "ab":
            assert found[f"experts.{i}.{n}"].rows == len(read)
            assert_leading(found[f"experts.{i}.{n}"].components, read)
    assert found["last"].rows == 30 * len(signs)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def trained(model: nn.Module) -> nn.Module:
    """The model with an adapter that is no longer at its start."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["first"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return wrapped


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_model_with_an_adapter_is_not_given_another_in_its_place():
    wrapped = trained(Two())
    for model in (wrapped, wrapped.base_model.model):
        before, x = state(wrapped), rows(5, 0)
        expected = wrapped(x)
        with pytest.raises(UserError, match=r"has an adapter already, on layer '.*first'"):
            attach(model, config("first", "second"), [rows(40, 1)] * 3)
        torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=0)
        assert {name: bool((tensor == before[name]).all()) for name, tensor in state(wrapped).items()} == dict.fromkeys(
            before, True
        )
        assert list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize("targets", [["second"], ["first", "second"]])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_a_second_adapter_is_initialised_and_the_first_is_as_it_was(targets, rho):
    wrapped = trained(Two())
    wrapped.add_adapter("task", config(*targets, rho=rho))
    before, x = state(wrapped), rows(5, 0)
    wrapped.set_adapter("default")
    expected = wrapped(x)
    batches = [rows(60, seed) for seed in range(6)]
    initialize_lora_eva_weights(wrapped, batches, adapter_name="task", show_progress_bar=False)
    torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=0)
    after = state(wrapped)
    own = {name: tensor for name, tensor in before.items() if ".default." in name or "base_layer" in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in own.items())
    if rho == 1:
        base = Two()
        hidden = torch.tanh(base.first(torch.cat(batches))).detach()
        assert_leading(wrapped.base_model.model.second.lora_A["task"].weight.detach(), hidden)


def test_an_adapter_that_is_not_there_is_named():
    wrapped = get_peft_model(Two(), config("first"), adapter_name="task")
    with pytest.raises(ValueError, match=r"no adapter 'tusk'.*'task'"):
        initialize_lora_eva_weights(wrapped, [rows(40, 0)], adapter_name="tusk")


def test_all_linear_is_resolved_on_a_model_that_is_not_wrapped():
    batches = [rows(60, seed) for seed in range(6)]
    found = get_eva_state_dict(Two(), batches, config(target_modules="all-linear"), show_progress_bar=False)
    expected = get_eva_state_dict(Two(), batches, config("first", "second"), show_progress_bar=False)
    assert found.keys() == expected.keys() == {"first", "second"}
    for name, components in found.items():
        torch.testing.assert_close(components, expected[name])


def test_targets_that_match_nothing_are_named():
    with pytest.raises(UserError, match=r"target_modules 'frist' match no layer. Did you mean 'first'"):
        get_eva_state_dict(Two(), [rows(40, 0)], config("frist"))
    with pytest.raises(UserError, match=r"'no.*thing' match no layer"):
        get_eva_state_dict(Two(), [rows(40, 0)], config(target_modules="no.*thing"))
    with pytest.warns(UserWarning, match=r"'frist' match no layer. Did you mean 'first'"):
        found = get_eva_state_dict(Two(), [rows(40, 0)] * 3, config("frist", "second"), show_progress_bar=False)
    assert list(found) == ["second"]


def test_a_state_dict_of_the_bare_model_initialises_the_wrapped_one():
    batches = [rows(60, seed) for seed in range(6)]
    found = get_eva_state_dict(Two(), batches, config("first", "second"), show_progress_bar=False)
    wrapped = get_peft_model(Two(), config("first", "second"))
    initialize_lora_eva_weights(wrapped, eva_state_dict=found)
    for name, components in found.items():
        layer = wrapped.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.lora_A["default"].weight.detach(), components)
    with pytest.raises(UserError, match=r"names no layer of the adapter 'default'.*'elsewhere'"):
        initialize_lora_eva_weights(wrapped, eva_state_dict={"elsewhere": components})


def broken(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    raise TypeError("a fault of the user's own")


def test_a_fault_in_the_users_forward_stays_what_it_is():
    model = Two()
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match="a fault of the user's own") as caught:
        attach(model, config("first"), [rows(40, 0)], forward=broken)
    assert "in broken" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match="not a batch"):
        attach(model, config("first"), (int("not a batch") for _ in range(1)))
    with pytest.raises(UserError, match="does not fit the model"):
        attach(model, config("nowhere"), [rows(40, 0)])


def test_the_first_adapter_of_peft_is_still_pefts():
    """The parity of what is loaded: the same rows, ranks, alphas and targets as by peft's own loader."""
    batches = [rows(60, seed) for seed in range(6)]
    made = []
    for loader in (initialize_lora_eva_weights, peft.initialize_lora_eva_weights):
        wrapped = get_peft_model(Two(), config("first", "second", rho=2.0, lora_alpha=6))
        found = get_eva_state_dict(wrapped, batches, show_progress_bar=False)
        loader(wrapped, eva_state_dict=dict(found))
        made.append(wrapped)
    ours, theirs = made
    assert state(ours).keys() == state(theirs).keys()
    for name, tensor in state(theirs).items():
        torch.testing.assert_close(state(ours)[name], tensor)
    for setting in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], setting) == getattr(theirs.peft_config["default"], setting)
    assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)
    scales = [{n: m.scaling for n, m in w.named_modules() if hasattr(m, "scaling")} for w in made]
    assert scales[0] == scales[1]
