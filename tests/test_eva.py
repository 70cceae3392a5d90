import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from eva_rl.adapter import EvaSettings, attach, load_adapter, save_adapter, trainable_parameters
from eva_rl.adapter.eva import Reading, eva_init
from eva_rl.adapter.eva.moments import principal_angle
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


pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped after:UserWarning"),
    pytest.mark.filterwarnings("ignore:The inputs of:UserWarning"),
]


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
    masked = eva_init(model, dirty, {"q": 4, "down": 4}, settings, Reading(token_mask=lambda x: x[..., 0] < 1e3))
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
        yield make_batches(1)[0] + torch.randn(1)
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
        ({"q": 2}, [*make_batches(2), torch.full((4, 12), torch.inf)], "'q' are NaN or infinite"),
        ({"q": 2}, [torch.zeros(4, 0, 12)], "no rows"),
    ],
)
def test_what_eva_cannot_use_is_refused_by_name(model, ranks, batches, message):
    with pytest.raises(UserError, match=message):
        eva_init(model, batches, ranks, EvaSettings(tau=1.0), strict=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_asked_to_be_strict_a_layer_without_directions_is_refused_and_the_model_is_as_it_was():
    model = nn.Sequential(nn.Embedding(5, 12), nn.Linear(12, 12))
    model[0].requires_grad_(False)
    before = [type(module) for module in model.modules()]
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva", eva_config=EvaConfig())
    with pytest.raises(UserError, match=r"'0' is a Embedding: leave it out"):
        attach(model, config, [torch.arange(5)], strict=True)
    assert [type(module) for module in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]


def test_a_model_whose_activations_eva_cannot_use_is_left_without_an_adapter(model):
    before = dict(model.named_modules())
    with pytest.raises(UserError, match="'q' are NaN"):
        attach(model, lora(), [torch.full((4, 12), torch.nan)], fresh_modules=("down",))
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_rows_that_are_not_floating_point_are_refused_by_name(model):
    class Bytes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    model.q = Bytes(12, 12)
    model.v = Bytes(12, 12)
    with pytest.raises(UserError, match=r"'q' reads torch\.int8"):
        eva_init(model, [torch.ones(4, 12, dtype=torch.int8)], {"q": 2, "down": 2}, EvaSettings())


def test_a_layer_that_never_runs_is_named_and_keeps_what_it_has_or_strictly_is_refused(model):
    model.idle = nn.Linear(12, 12)
    ranks = {"q": 2, "idle": 2}
    with pytest.warns(UserWarning, match="usual initialisation.*idle did not run in 10 batches"):
        found = eva_init(model, make_batches(10), ranks, EvaSettings(tau=1.0))
    assert {name: len(layer.components) for name, layer in found.items()} == {"q": 2}  # its budget is its own
    with pytest.raises(UserError, match="'idle' did not run"):
        eva_init(model, make_batches(10), ranks, EvaSettings(), strict=True)
    with pytest.raises(UserError, match="'idle' did not run"):
        eva_init(model, make_batches(10), {"idle": 2}, EvaSettings())


@pytest.mark.parametrize(
    "settings",
    [
        {"rho": 0.5},
        {"tau": 0.0},
        {"max_batches": 0},
        {"ranking": "best"},
        {"components": "minor"},
        {"whiten": True, "rotation": True},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(UserError, match=f"{name}(=| must be one of .*){str(value).lower()}"):
        EvaSettings(**settings)


def test_forward_passes_end_with_the_last_layer_that_still_moves(model):
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.runs_of_tail = model, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                y = self.body(x)
            except Exception as error:
                raise AssertionError("a forward pass ends without troubling the model") from error
            self.runs_of_tail += 1
            return y

    long, runs = Long(), []
    batches = [decaying_rows(60, 12, seed) for seed in range(20)]
    eva_init(
        long,
        batches,
        {"body.q": 2, "body.down": 2},
        EvaSettings(tau=0.999, max_batches=20),
        Reading(forward=lambda model, x: (runs.append(1), model(x))),
    )
    assert len(runs) > 3
    assert long.runs_of_tail == 1  # the first pass, which finds out what reads what


def test_a_layer_deep_in_the_model_is_no_longer_run_once_it_has_converged():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.slow, self.fast, self.runs_of_fast = nn.Linear(12, 12), nn.Linear(12, 12), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.slow(x)
            self.runs_of_fast += 1
            return self.fast(x[..., :1].expand_as(x).clone())  # one direction, learned at once

    chain = Chain()
    batches = [torch.randn(30, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    with pytest.warns(UserWarning, match="slow"):
        found = eva_init(chain, batches, {"slow": 2, "fast": 1}, EvaSettings(rho=1.0, tau=0.9999, max_batches=12))
    assert chain.runs_of_fast == found["fast"].converged_after < found["slow"].batches == 12
    assert found["slow"].converged_after is None


@pytest.mark.parametrize("share", [True, False])
def test_layers_share_statistics_if_they_read_one_tensor_not_if_its_values_are_equal(share):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x if share else x.clone())

    found = eva_init(Twins(), make_batches(6), {"a": 2, "b": 2}, EvaSettings(tau=1.0, max_batches=6))
    assert (found["b"].group == "a") == share
    torch.testing.assert_close(found["a"].components, found["b"].components)


def test_a_layer_that_runs_twice_counts_the_rows_of_both_runs():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.step(self.step(x))

    recurrent = Recurrent()
    batches = make_batches(3)
    found = eva_init(recurrent, batches, {"step": 3}, EvaSettings(rho=1.0, tau=1.0, max_batches=3))
    rows = torch.cat([torch.cat([x, recurrent.step(x)]).detach().view(-1, 12) for x in batches])
    assert found["step"].rows == len(rows)
    assert captured(found["step"].components, rows, center=True) > 0.999


def test_what_a_model_does_to_an_input_after_a_layer_has_read_it_does_not_count():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 1.0
            self.q(h)
            return h.mul_(0.0)

    batches = make_batches(3)
    found = eva_init(InPlace(), batches, {"q": 3}, EvaSettings(rho=1.0, tau=1.0, max_batches=3))
    assert captured(found["q"].components, torch.cat(batches).view(-1, 12), center=True) > 0.999


def test_streaming_and_exact_covariances_find_the_same_subspaces(model):
    batches = make_batches(10)
    ranks = {"q": 3, "v": 3, "down": 3}
    streaming, exact = (
        eva_init(model, batches, ranks, EvaSettings(rho=1.0, tau=1.0, max_batches=10, method=method))
        for method in ("streaming", "covariance")
    )
    for name in ranks:
        assert principal_angle(streaming[name].components, exact[name].components) < 2.0  # degrees
        torch.testing.assert_close(
            streaming[name].squared_singular_values, exact[name].squared_singular_values, rtol=0.02, atol=0
        )
        assert streaming[name].total == pytest.approx(exact[name].total, rel=1e-5)


def test_nearly_equal_singular_values_hold_up_cosines_and_not_the_subspace(model):
    batches = [torch.randn(300, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(60)]
    subspace = eva_init(model, batches, {"q": 6}, EvaSettings(rho=1.0, tau=0.98, max_batches=60))
    assert subspace["q"].converged_after is not None
    with pytest.warns(UserWarning, match="still moving"):
        cosines = eva_init(
            model, batches, {"q": 6}, EvaSettings(rho=1.0, tau=0.98, max_batches=60, convergence="components")
        )
    assert cosines["q"].converged_after is None


def squared_gradients(model: Branches, rows: torch.Tensor, targets: torch.Tensor, a: torch.Tensor) -> float:
    """The mean over rows of |dL/dB|^2 for the layer `down` with B = 0 and this A, by autograd, row by row."""
    total = 0.0
    for x, y in zip(rows, targets, strict=True):
        b = torch.zeros(12, len(a), requires_grad=True)
        hidden = torch.tanh(model.q(x) * model.v(x))
        output = model.down(hidden) + b @ (a @ hidden)
        total += float(torch.autograd.grad((output - y).square().sum(), b)[0].square().sum())
    return total / len(rows)


def test_weighting_by_gradient_maximises_the_expected_squared_gradient_of_b(model):
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 12, generator=generator)
    targets = model(rows) + torch.randn(300, 12, generator=generator) * (0.05 + 3 * (rows[:, :1] > 1))
    batches = list(zip(rows.split(50), targets.split(50), strict=True))

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().sum()

    def gradient(**options) -> float:
        settings = EvaSettings(rho=1.0, tau=1.0, max_batches=6, **options)
        found = eva_init(model, batches, {"down": 2}, settings, Reading(lambda model, b: model(b[0]), loss=loss))
        return squared_gradients(model, rows, targets, found["down"].components)

    weighted = gradient(weighting="gradient", center=False, method="covariance")
    hidden = torch.tanh(model.q(rows) * model.v(rows))
    upstream = 2 * (model.down(hidden) - targets)
    sigma = (hidden * upstream.square().sum(1, keepdim=True)).T @ hidden / len(rows)  # E[|g|^2 x x^T]
    assert weighted == pytest.approx(float(torch.linalg.eigvalsh(sigma)[-2:].sum()), rel=1e-4)  # the most there is
    assert gradient(weighting="gradient", center=False) > 0.99 * weighted
    assert weighted > 1.01 * gradient(center=False)
    assert all(p.grad is None for p in model.parameters())


def test_weighting_by_gradient_needs_a_loss_that_reaches_the_layers(model):
    settings = EvaSettings(weighting="gradient")
    with pytest.raises(UserError, match="give `loss`"):
        eva_init(model, make_batches(1), {"q": 2}, settings)
    with pytest.raises(UserError, match="depends on the adapted layers"):
        eva_init(model, make_batches(1), {"q": 2}, settings, Reading(loss=lambda x: x.sum()))


def test_the_ablations_change_the_directions_and_keep_the_ranks(model):
    batches = make_batches(6)
    ranks = {"q": 3, "v": 3, "down": 3}

    def rows(**options) -> dict[str, torch.Tensor]:
        settings = EvaSettings(tau=1.0, max_batches=6, method="covariance", **options)
        return {name: layer.components for name, layer in eva_init(model, batches, ranks, settings).items()}

    leading, inputs = rows(), torch.cat(batches).view(-1, 12)
    identity = torch.eye(len(leading["q"]))
    for options in ({"components": "minor"}, {"components": "random"}, {"rotation": True}):
        changed = rows(**options)
        assert {n: x.shape for n, x in changed.items()} == {n: x.shape for n, x in leading.items()}
        torch.testing.assert_close(changed["q"] @ changed["q"].T, identity, rtol=0, atol=1e-5)
    exact = torch.linalg.svd(inputs.double() - inputs.double().mean(0)).Vh.float()
    minor = rows(components="minor")["q"]
    assert principal_angle(minor, exact[-len(minor) :]) < 0.5
    random = rows(components="random")
    assert principal_angle(random["q"], leading["q"]) > 20
    assert not torch.equal(random["q"], rows(components="random", seed=1)["q"])
    rotated = rows(rotation=True)["q"]
    assert principal_angle(rotated, leading["q"]) < 0.01
    assert (rotated * leading["q"]).sum(1).abs().min() < 0.95
    permuted = rows(permutation=True)["q"]
    torch.testing.assert_close(permuted.sort(1).values, leading["q"].sort(1).values)
    assert principal_angle(permuted, leading["q"]) > 20
    whitened = inputs @ rows(whiten=True)["q"].T
    torch.testing.assert_close(whitened.std(0), torch.ones(whitened.shape[1]), rtol=1e-3, atol=0)


def test_layers_whose_inputs_never_change_are_named_and_explain_nothing(model):
    with torch.no_grad():
        model.q.weight.zero_()
        model.q.bias.zero_()
    with pytest.warns(UserWarning, match="never change.*down"):
        found = eva_init(model, make_batches(4), {"q": 3, "down": 3}, EvaSettings(rho=1.0))
    rows = found["down"].components
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
    assert found["down"].explained.sum() == 0


def test_updates_beside_the_next_forward_pass_give_the_same_result(model, monkeypatch):
    batches, ranks = make_batches(6), {"q": 3, "v": 3, "down": 3}
    settings = EvaSettings(tau=1.0, max_batches=6)
    alone = eva_init(model, batches, ranks, settings)
    monkeypatch.setattr("eva_rl.adapter.eva.engine._Updates._beside", staticmethod(lambda device: True))
    beside = eva_init(model, batches, ranks, settings)
    for name in ranks:
        assert torch.equal(beside[name].components, alone[name].components)
    with pytest.raises(UserError, match="NaN or infinite"):
        eva_init(model, [*batches, torch.full((4, 12), torch.inf)], ranks, EvaSettings(tau=1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_result_is_that_of_the_cpu(model):
    batches, ranks = make_batches(8), {"q": 3, "v": 3, "down": 3}
    settings = EvaSettings(tau=1.0, max_batches=8)
    cpu = eva_init(model, batches, ranks, settings)
    cuda = eva_init(model.cuda(), [x.cuda() for x in batches], ranks, settings)
    for name in ranks:
        assert principal_angle(cuda[name].components.cpu(), cpu[name].components) < 0.5


def lora(rho: float = 2.0, **changes) -> LoraConfig:
    return LoraConfig(
        r=3,
        lora_alpha=3,
        target_modules=["q", "v", "down"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
        **changes,
    )


def test_attached_the_function_is_the_bases_and_only_the_adapter_trains(model):
    x = make_batches(1)[0]
    model.eval()
    before = model(x).detach()
    adapter = attach(model, lora(), make_batches(8))
    peft_model, found = adapter.model, adapter.eva
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
    adapter = attach(model, lora(), make_batches(8))
    peft_model, found = adapter.model, adapter.eva
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
    adapter = attach(base, lora(), make_batches(8))
    found = adapter.eva
    alive = {name for name, layer in found.items() if len(layer.components)}
    assert 0 < len(alive) < len(found) == 24
    save_adapter(adapter, tmp_path / "adapter", "deep")
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    layers = {name.removeprefix("base_model.model.") for name, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    assert layers == alive


def test_a_saved_adapter_loads_in_peft_and_merged_equals_unmerged(model, tmp_path):
    x = make_batches(1)[0]
    base = Branches()
    base.load_state_dict(model.state_dict())
    adapter = attach(model, lora(), make_batches(8))
    peft_model = adapter.model
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    peft_model.eval()
    expected = peft_model(x).detach()
    save_adapter(adapter, tmp_path / "adapter", "base-of-this-test")
    again = Branches()
    again.load_state_dict(base.state_dict())
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
    merged = load_adapter(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-4)


def test_fresh_modules_are_trained_in_full_and_saved_with_the_adapter(model, tmp_path):
    adapter = attach(model, LoraConfig(r=2, target_modules=["q", "v"]), fresh_modules=("down",))
    peft_model = adapter.model
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    peft_model.eval()
    expected = peft_model(make_batches(1)[0]).detach()
    save_adapter(adapter, tmp_path / "adapter", "base")
    torch.manual_seed(0)
    merged = load_adapter(Branches(), tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(make_batches(1)[0]), expected, rtol=0, atol=1e-5)


def test_layers_that_are_not_there_are_refused(model):
    with pytest.raises(UserError, match="does not fit"):
        attach(model, LoraConfig(r=2, target_modules=["nowhere"]), [])


def test_a_folder_without_an_adapter_and_one_of_another_model_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        load_adapter(model, tmp_path)
    adapter = attach(Branches(width=8), LoraConfig(r=2, target_modules=["q"]))
    save_adapter(adapter, tmp_path / "adapter", "other")
    with pytest.raises(UserError, match="another model"):
        load_adapter(model, tmp_path / "adapter")


def test_rho_of_pefts_own_config_counts_where_no_settings_are_given(model):
    found = attach(model, lora(rho=1.0), make_batches(8)).eva
    assert [len(layer.components) for layer in found.values()] == [3, 3, 3]
