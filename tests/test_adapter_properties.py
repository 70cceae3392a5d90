"""What only the right method does: FedSVD, FILA, GoRA, ABBA, Hydra, KaSA."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from test_adapters import actions, attached, make_batch, make_model, rules, settings, trained, training

from eva_rl.adapter import attach, load_adapter, save_adapter, starts, trainable_parameters
from eva_rl.adapter.fedsvd import refactored, turn_moments
from eva_rl.adapter.fila import fila, importance, weighted
from eva_rl.adapter.gora import shared_out
from eva_rl.adapter.hydra import HydraConfig
from eva_rl.errors import UserError
from eva_rl.model import TRUNK_LAYERS
from eva_rl.training import Saves, train

NAME = "trunk.blocks.0.attention.v"
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("rank_of_b", [4, 2, 0])
def test_fedsvd_refactors_without_a_change_of_the_product_and_turns_gradients_along(rank_of_b):
    a, b = randn(4, 9), randn(7, rank_of_b) @ randn(rank_of_b, 4)
    new_a, new_b, turn = refactored(a, b)
    torch.testing.assert_close(new_b @ new_a, b @ a)
    torch.testing.assert_close(new_a @ new_a.T, torch.eye(4, dtype=torch.float64))
    columns = new_b.norm(dim=0)
    torch.testing.assert_close(columns, torch.linalg.svdvals(b @ a)[:4])  # the singular values, in B
    gradient = randn(7, 9)  # of W
    torch.testing.assert_close(gradient @ new_a.T, gradient @ a.T @ turn)


def test_fedsvds_a_is_renewed_when_it_is_due_and_adams_moment_follows(tmp_path):
    model = make_model()
    adapter = attached("fedsvd", model)
    layer = model.get_submodule(NAME)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    seen = {}

    class Watched(torch.optim.AdamW):
        def step(self, *args):
            found = super().step(*args)
            seen[len(seen)] = self.state[b]["exp_avg"].clone(), a.detach().clone(), (b @ a).detach()
            return found

    recipe = rules(adapter, "fedsvd")
    recipe = recipe.__class__(recipe.recipe.__class__(Watched), companion=adapter.companion)
    batches = lambda number: make_batch(number % 4)  # noqa: E731
    train(model, batches, model.loss, 10, training("fedsvd"), Saves(tmp_path), recipe)
    assert all(torch.equal(seen[0][1], seen[n][1]) for n in range(10))  # until then A stays
    moment, old_a, product = seen[9]
    assert not torch.allclose(a, old_a, atol=1e-3)
    torch.testing.assert_close((b @ a).detach(), product, rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-5)
    now = adapter.companion.optimizer.state[b]["exp_avg"]
    torch.testing.assert_close(now, moment @ old_a @ a.detach().T, rtol=0, atol=1e-5)  # as A was orthonormal


def test_what_another_optimiser_than_adam_remembers_of_b_starts_anew():
    b, turn = torch.ones(7, 4), 2 * torch.eye(4, dtype=torch.float64)
    adam = {"step": torch.tensor(3.0), "exp_avg": torch.ones(7, 4), "exp_avg_sq": torch.ones(7, 4)}
    turn_moments(adam, b, turn)
    assert adam["exp_avg"].eq(2).all()
    assert adam["exp_avg_sq"].eq(4).all()
    for other in ({"momentum_buffer": torch.ones(7, 4)}, adam | {"exp_avg": torch.ones(7, 2)}):
        turn_moments(other, b, turn)
        assert other == {}


def test_eva_fedsvd_begins_at_evas_directions():
    found = {}
    for name in ("eva_fedsvd", "eva"):
        model = make_model()
        attach(model, settings(name).peft_config(6), [make_batch(n) for n in range(4)], model.token_mask)
        found[name] = model.get_submodule(NAME).lora_A["default"].weight
    assert torch.equal(found["eva_fedsvd"], found["eva"])
    assert [found[name].requires_grad for name in found] == [False, True]


def test_filas_product_is_the_best_for_rows_that_count_differently():
    """Against a descent from it in all directions, and against PiSSA where all rows count alike."""
    weight, w = randn(8, 6), torch.linspace(0.2, 2, 8, dtype=torch.float64)
    a, b = weighted(weight, w, 3, 2.0)
    cost = lambda product: float((w[:, None] * (weight - product)).norm())  # noqa: E731
    found = 2.0 * b @ a
    for _ in range(200):
        other = (b + 1e-3 * randn(8, 3)) @ (a + 1e-3 * randn(3, 6))
        assert cost(2.0 * other) >= cost(found) - 1e-9
    assert cost(found) == pytest.approx(float(torch.linalg.svdvals(w[:, None] * weight)[3:].norm()))
    a, b = weighted(weight, torch.ones(8, dtype=torch.float64), 3, 1.0)
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(b @ a, u[:, :3] * s[:3] @ vt[:3], atol=1e-10)


def test_fila_weighs_outputs_by_the_gradients_of_the_batches():
    base, model = make_model(), make_model()
    batches = [make_batch(n) for n in range(3)]
    config = settings("fila").peft_config(4)
    attach(model, config, batches, model.token_mask, start=fila, loss=model.loss, few=3)
    weight, squares = base.get_submodule(NAME).weight, 0
    for batch in batches:
        base.zero_grad()
        base.loss(batch).backward()
        squares = squares + weight.grad**2
    w = importance(squares)
    assert w.mean().item() == pytest.approx(1, abs=1e-3)
    layer = model.get_submodule(NAME)
    u, s, vt = torch.linalg.svd(w[:, None] * weight.detach(), full_matrices=False)
    expected = (u[:, :4] * s[:4] @ vt[:4]) / w[:, None]
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), expected, rtol=0, atol=1e-4)
    assert torch.equal(importance(torch.zeros(5, 3)), torch.ones(5))


def test_gora_gives_more_ranks_where_weights_and_gradients_are_large_within_the_same_budget():
    shapes, nominal = [(64, 64)] * 4 + [(256, 64)] * 2, [8] * 6
    ranks = shared_out([4.0, 3.0, 2.0, 1e-9, 2.0, 2.0], shapes, nominal)
    assert ranks[0] > ranks[1] > ranks[2] > ranks[3] == 4  # half of the nominal at least
    assert ranks[2] > ranks[4] >= ranks[5]  # wide layers pay more
    spent, total = (sum(r * sum(s) for r, s in zip(own, shapes, strict=True)) for own in (ranks, nominal))
    assert 0.95 * total <= spent <= total
    assert shared_out([1.0] * 3, [(8, 8)] * 3, [2] * 3) == [2] * 3
    assert max(shared_out([1e6, 1.0, 1.0], [(8, 8)] * 3, [2] * 3)) <= 8


def test_gora_starts_at_the_gradients_projection_onto_a_and_lowers_the_loss(tmp_path):
    base, model = make_model(), make_model()
    batches = [make_batch(n) for n in range(4)]
    method = settings("gora")
    adapter = attach(
        model, method.peft_config(8), batches, model.token_mask, start=method.start_function(), loss=model.loss, few=4
    )
    sum(base.loss(batch) for batch in batches).backward()
    gradient = base.get_submodule(NAME).weight.grad / 4
    layer = model.get_submodule(NAME)
    a = layer.lora_A["default"].weight.detach()
    projection = a.T @ torch.linalg.solve(a @ a.T, a)
    expected = -0.05 * (64 / len(a)) ** 0.5 * gradient @ projection
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), expected, rtol=1e-3, atol=1e-6)
    before, after = (sum(m.loss(batch) for batch in batches).item() for m in (base.eval(), model.eval()))
    assert after < before
    save_adapter(adapter, tmp_path / "adapter", "toy")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(set(saved["rank_pattern"].values())) > 1
    scales = {layer.scaling["default"] for _, layer in starts.lora_layers(model)}
    assert max(scales) == pytest.approx(min(scales)) == pytest.approx(1.0)


def test_abbas_first_product_is_the_weights_best_approximation_and_the_second_is_zero():
    base, model = make_model(), make_model()
    attached("abba", model)
    layer = model.get_submodule(NAME)
    rank = layer.r["default"]
    u, s, vt = torch.linalg.svd(base.get_submodule(NAME).weight.detach(), full_matrices=False)
    first = layer.hada_w1_a["default"] @ layer.hada_w1_b["default"]
    torch.testing.assert_close(first.detach(), u[:, :rank] * s[:rank] @ vt[:rank], rtol=0, atol=1e-4)
    assert not layer.hada_w2_a["default"].any()
    assert layer.scaling["default"] == 8.0
    with torch.no_grad():
        layer.hada_w2_a["default"].normal_()
    second = layer.hada_w2_a["default"] @ layer.hada_w2_b["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), 8 * first * second)


def with_biases() -> torch.nn.Module:
    model = make_model()
    torch.manual_seed(3)
    for name, p in model.trunk.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.5)
    return model.eval()


def test_hydra_computes_both_branches_and_merges_to_the_same(tmp_path):
    base, model = with_biases(), with_biases()
    method = settings("hydra")
    adapter = attach(model, method.peft_config(3))
    assert torch.equal(actions(model), actions(base))
    layer, x = model.get_submodule(NAME), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.normal_(std=0.1)
    plain = base.get_submodule(NAME)(x)
    down, up = layer.lora_A["default"], layer.lora_B["default"].weight
    parallel, sequential = x @ down.parallel.T @ up[:, :3].T, plain @ down.sequential.T @ up[:, 3:].T
    torch.testing.assert_close(layer(x), plain + parallel + sequential, rtol=1e-4, atol=1e-4)
    found = actions(model)
    torch.testing.assert_close(actions(adapter.merged()), found, rtol=0, atol=1e-4)
    save_adapter(adapter, tmp_path / "adapter", "toy")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_bias"]) == (6, True)
    torch.testing.assert_close(actions(load_adapter(with_biases(), tmp_path / "adapter")), found, rtol=0, atol=1e-4)


def test_hydra_trains_both_branches_down_and_up():
    model = make_model()
    adapter = attach(model, settings("hydra").peft_config(3))
    wide = [m.weight.shape for n, m in make_model().trunk.named_modules() if n.endswith(TRUNK_LAYERS)]
    assert trainable_parameters(adapter.model) == sum(3 * (i + 3 * o) for o, i in wide)


def test_hydra_is_refused_where_some_layers_have_a_bias_and_some_have_none():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False))
    with pytest.raises(UserError, match="some have a bias and some have none"):
        attach(model, HydraConfig(r=2, target_modules=["0", "1"]))
    assert isinstance(model[0], torch.nn.Linear)
    without = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    assert not attach(without, HydraConfig(r=2, target_modules=["0"])).model.peft_config["default"].lora_bias


def test_kasa_drops_the_weights_minor_components_and_learns_new_ones_under_its_penalty(tmp_path):
    base, model = make_model(), make_model()
    adapter = attached("kasa", model)
    layer = model.get_submodule(NAME)
    rank = layer.r["default"]
    u, s, vt = torch.linalg.svd(base.get_submodule(NAME).weight.detach(), full_matrices=False)
    torch.testing.assert_close(layer.base_layer.weight, u[:, :-rank] * s[:-rank] @ vt[:-rank], rtol=0, atol=1e-4)
    trained(adapter, model, "kasa", tmp_path, steps=3)
    expected = 0.0
    for _, m in starts.lora_layers(model):
        a, b = (m.lora_A["default"].weight.detach().numpy(), m.lora_B["default"].weight.detach().numpy())
        eye = np.eye(len(a))
        expected += 1e-4 * float((m.lora_diag["default"].detach() ** 2).sum())
        expected += 1e-3 * (np.linalg.norm(b.T @ b - eye) + np.linalg.norm(a @ a.T - eye))
    assert adapter.companion.penalty().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["kasa", "fedsvd", "hydra", "lora_xs", "abba"])
def test_what_is_not_lora_alone_is_not_taken_for_it(name):
    assert not settings(name).is_lora
    assert settings("gora").is_lora
    assert isinstance(settings("lora").peft_config(2), LoraConfig)
