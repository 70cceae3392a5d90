import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from eva_rl.adapter import EvaSettings, attach, load_adapter, save_adapter, trainable_parameters
from eva_rl.adapter.eva import eva_init
from eva_rl.adapter.eva.ranks import explained, redistribute
from eva_rl.errors import UserError


class Branches(nn.Module):
    """Two layers that read one tensor, one that reads another, and dropout that evaluation must switch off."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.down = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.dropout(torch.tanh(self.q(x) * self.v(x))))


@pytest.fixture
def model() -> Branches:
    torch.manual_seed(0)
    return Branches()


def decaying_rows(count: int, width: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(7))).Q
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, width, generator=generator) * 0.6 ** torch.arange(width) @ basis.T


def make_batches(count: int, width: int = 12) -> list[torch.Tensor]:
    return [decaying_rows(40, width, seed).view(8, 5, width) for seed in range(count)]


def captured(components: torch.Tensor, rows: torch.Tensor, center: bool) -> float:
    """Variance in the components' span as a share of the most that any subspace of that size holds."""
    rows = rows.double() - (rows.double().mean(0) if center else 0)
    best = torch.linalg.svdvals(rows)[: len(components)].square().sum()
    return float((rows @ components.double().T).square().sum() / best)


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_rank_budget_is_spent_exactly_on_the_components_worth_most(counts, data):
    worth = {
        f"layer{i}": torch.tensor(sorted(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)), reverse=True))
        for i, n in enumerate(counts)
    }
    budget = data.draw(st.integers(0, sum(counts)))
    ranks = redistribute(worth, budget)
    assert sum(ranks.values()) == budget
    kept = [v for name, values in worth.items() for v in values[: ranks[name]].tolist()]
    dropped = [v for name, values in worth.items() for v in values[ranks[name] :].tolist()]
    assert not kept or not dropped or min(kept) >= max(dropped)


def test_a_budget_beyond_the_components_is_refused():
    with pytest.raises(UserError, match="budget of 3"):
        redistribute({"a": torch.ones(2)}, 3)


def test_explained_variance_follows_equation_6_and_pefts_ratio():
    sigma = torch.tensor([3.0, 2.0, 1.0])
    torch.testing.assert_close(explained(sigma**2, 11, 20.0, "paper"), sigma**2 / (10 * 6.0))
    torch.testing.assert_close(explained(sigma**2, 11, 20.0, "ratio"), sigma**2 / 20)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_a_is_the_leading_right_singular_vectors_of_all_rows_seen(model, rho):
    batches = make_batches(6)
    found = eva_init(model, batches, {"q": 3, "v": 3, "down": 3}, EvaSettings(rho=rho, tau=1.0, max_batches=6))
    rows = torch.cat(batches).view(-1, 12)
    hidden = torch.tanh(model.q(rows) * model.v(rows)).detach()
    for name, inputs in (("q", rows), ("v", rows), ("down", hidden)):
        components = found[name].components
        exact = torch.linalg.svd(inputs.double() - inputs.double().mean(0), full_matrices=False).Vh[: len(components)]
        cosines = (components.double() * exact).sum(1).abs()
        assert cosines.min() > 1 - 1e-4
    assert sum(len(layer.components) for layer in found.values()) == 9
    shared = min(len(found["q"].components), len(found["v"].components))
    torch.testing.assert_close(found["q"].components[:shared], found["v"].components[:shared])


def test_padding_does_not_enter(model):
    batches = make_batches(3)
    dirty = [torch.cat([batch, torch.full((8, 2, 12), 1e4)], 1) for batch in batches]
    settings = EvaSettings(max_batches=3)
    clean = eva_init(model, batches, {"q": 4, "down": 4}, settings)
    masked = eva_init(model, dirty, {"q": 4, "down": 4}, settings, lambda x: x[..., 0] < 1e3)
    for name in clean:
        torch.testing.assert_close(masked[name].components, clean[name].components, rtol=0, atol=1e-4)


def test_the_uncentred_components_see_the_mean(model):
    batches = [batch + 5.0 for batch in make_batches(3)]
    found = eva_init(model, batches, {"q": 1}, EvaSettings(center=False, rho=1.0))
    direction = torch.full((12,), 1 / math.sqrt(12))
    assert float((found["q"].components[0] * direction).sum().abs()) > 0.95


def test_the_stream_ends_when_the_components_have_converged(model):
    drawn = []

    def stream():
        for seed in range(1000):
            drawn.append(seed)
            yield decaying_rows(200, 12, seed)

    found = eva_init(model, stream(), {"q": 2, "down": 2}, EvaSettings(max_batches=100))
    assert 2 <= len(drawn) < 100
    assert max(layer.batches for layer in found.values()) == len(drawn)


def test_the_cap_on_batches_warns_with_the_layers_that_still_move(model):
    batches = (torch.randn(4, 12) for _ in range(100))
    with pytest.warns(UserWarning, match=r"stopped after 3 batches.*q"):
        eva_init(model, batches, {"q": 6}, EvaSettings(rho=1.0, tau=0.999999, max_batches=3))


def test_batches_with_fewer_rows_than_components_add_up(model):
    batches = [decaying_rows(2, 12, seed) for seed in range(40)]
    found = eva_init(model, batches, {"q": 5}, EvaSettings(rho=1.0, tau=1.0))
    rows = torch.cat(batches)
    assert found["q"].components.shape == (5, 12)
    assert captured(found["q"].components, rows, center=True) > 0.999


class Stop(Exception):
    pass


def test_the_model_is_left_as_it_was_also_when_the_stream_raises(model):
    model.train()
    model.down.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()

    def stream():
        yield make_batches(1)[0]
        raise Stop

    with pytest.raises(Stop):
        eva_init(model, stream(), {"q": 2, "down": 2}, EvaSettings())
    assert (model.training, model.q.training, model.down.training) == (True, True, False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("ranks", "batches", "message"),
    [
        ({"q": 2}, [], "no batch"),
        ({"q": 13}, make_batches(1), "Rank 13.*'q'.*12 dimensions"),
        ({"q": 2, "dropout": 2}, make_batches(1), "'dropout' is a Dropout"),
        ({"q": 2}, [torch.full((4, 12), torch.nan)], "'q' are NaN or infinite"),
    ],
)
def test_what_eva_cannot_use_is_refused_by_name(model, ranks, batches, message):
    with pytest.raises(UserError, match=message):
        eva_init(model, batches, ranks, EvaSettings())


def test_a_layer_that_never_runs_is_named(model):
    model.idle = nn.Linear(12, 12)
    with pytest.raises(UserError, match="'idle' did not run"):
        eva_init(model, make_batches(1), {"q": 2, "idle": 2}, EvaSettings())


@pytest.mark.parametrize("settings", [{"rho": 0.5}, {"tau": 0.0}, {"max_batches": 0}, {"ranking": "best"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=str(next(iter(settings.values())))):
        EvaSettings(**settings)


def lora(rho: float = 2.0, **changes) -> LoraConfig:
    return LoraConfig(
        r=3,
        lora_alpha=3,
        target_modules=["q", "v", "down"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
        **changes,
    )


def test_the_subspaces_are_those_of_pefts_own_eva(model):
    batches = [decaying_rows(400, 12, seed) for seed in range(8)]
    theirs = get_eva_state_dict(
        model,
        batches,
        lora(rho=1.0),
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = eva_init(model, batches, {"q": 3, "v": 3, "down": 3}, EvaSettings(rho=1.0))
    for name, components in theirs.items():
        cosines = torch.linalg.svdvals(ours[name].components @ components.float().T)
        assert cosines.min() > 0.99  # their batches stop at cosine 0.99


def test_attached_the_function_is_the_bases_and_only_the_adapter_trains(model):
    x = make_batches(1)[0]
    model.eval()
    before = model(x).detach()
    peft_model, found = attach(model, lora(), make_batches(8))
    torch.testing.assert_close(peft_model(x), before, rtol=0, atol=1e-6)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert sum(len(layer.components) for layer in found.values()) == 9
    assert trainable_parameters(model) == sum(24 * len(layer.components) for layer in found.values())


def test_alpha_over_rank_stays_constant_and_rank_0_layers_lose_their_adapter(model):
    with torch.no_grad():
        model.q.weight.zero_()  # so that the last layer reads constants, which explain nothing
        model.q.bias.zero_()
    peft_model, found = attach(model, lora(), make_batches(8))
    assert len(found["down"].components) == 0
    assert type(peft_model.base_model.model.down) is nn.Linear
    for name in ("q", "v"):
        layer = peft_model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(1.0)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Branches() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_that_lost_their_adapter_do_not_get_one_back_when_it_is_loaded(tmp_path):
    torch.manual_seed(0)
    base = Deep()
    with torch.no_grad():
        base.blocks[3].q.weight.zero_()  # its last layer, and all blocks after it, read constants
        base.blocks[3].q.bias.zero_()
    again = Deep()
    again.load_state_dict(base.state_dict())
    peft_model, found = attach(base, lora(), make_batches(8))
    alive = {name for name, layer in found.items() if len(layer.components)}
    assert 0 < len(alive) < len(found) == 24
    save_adapter(peft_model, tmp_path / "adapter", "deep")
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    layers = {name.removeprefix("base_model.model.") for name, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    assert layers == alive


def test_a_saved_adapter_loads_in_peft_and_merged_equals_unmerged(model, tmp_path):
    x = make_batches(1)[0]
    base = Branches()
    base.load_state_dict(model.state_dict())
    peft_model, _ = attach(model, lora(), make_batches(8))
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    peft_model.eval()
    expected = peft_model(x).detach()
    save_adapter(peft_model, tmp_path / "adapter", "base-of-this-test")
    again = Branches()
    again.load_state_dict(base.state_dict())
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
    merged = load_adapter(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-4)


def test_fresh_modules_are_trained_in_full_and_saved_with_the_adapter(model, tmp_path):
    peft_model, _ = attach(model, LoraConfig(r=2, target_modules=["q", "v"]), make_batches(1), fresh_modules=("down",))
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    peft_model.eval()
    expected = peft_model(make_batches(1)[0]).detach()
    save_adapter(peft_model, tmp_path / "adapter", "base")
    torch.manual_seed(0)
    merged = load_adapter(Branches(), tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(make_batches(1)[0]), expected, rtol=0, atol=1e-5)


def test_layers_that_are_not_there_are_refused(model):
    with pytest.raises(UserError, match="does not fit"):
        attach(model, LoraConfig(r=2, target_modules=["nowhere"]), [])


def test_a_folder_without_an_adapter_and_one_of_another_model_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        load_adapter(model, tmp_path)
    peft_model = get_peft_model(Branches(width=8), LoraConfig(r=2, target_modules=["q"]))
    save_adapter(peft_model, tmp_path / "adapter", "other")
    with pytest.raises(UserError, match="another model"):
        load_adapter(model, tmp_path / "adapter")


def test_rho_of_pefts_own_config_counts_where_no_settings_are_given(model):
    _, found = attach(model, lora(rho=1.0), make_batches(8))
    assert [len(layer.components) for layer in found.values()] == [3, 3, 3]
