"""LoRA with a matrix between its factors: what is trained there, and where it starts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import make_batch, make_model, settings, training
from torch import Tensor

from eva_rl.adapter import EvaSettings, attach, save_adapter
from eva_rl.adapter.sandwich import landing_field
from eva_rl.training import Rules, Saves, train

LAYERS = ("trunk.blocks.0.attention.q", "trunk.blocks.1.feed_forward.up")
RANK = 5


def attached(name: str, rank: int = RANK):
    """The model with this method at a rank, and the base it was made of."""
    model, method = make_model(), settings(name)
    config, start = method.peft_config(rank), method.start_function()
    config.r = config.lora_alpha = rank
    batches = [make_batch(number) for number in range(3)]
    return attach(model, config, batches, model.token_mask, start=start, loss=model.loss, few=3), model, make_model()


def trained(adapter, model, name: str, folder: Path, steps: int = 6) -> None:
    batches = lambda number: make_batch(number % 4)  # noqa: E731
    train(model, batches, model.loss, steps, training(name), Saves(folder), Rules(companion=adapter.companion))


def svd(matrix: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix.detach(), full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def delta(model: torch.nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).get_delta_weight("default").detach()


def outside(matrix: Tensor, columns: Tensor) -> float:
    """The share of a matrix that is not in the span of these orthonormal columns."""
    return float((matrix - columns @ (columns.T @ matrix)).norm() / matrix.norm())


def trained_names(model: torch.nn.Module) -> set[str]:
    return {n.rpartition("lora_")[2] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["lora_xs", "svfit"])
def test_what_is_learned_stays_between_the_weights_leading_singular_vectors(name, tmp_path):
    adapter, model, base = attached(name)
    assert trained_names(model) == {"B.default.middle"}
    trained(adapter, model, name, tmp_path)
    for layer in LAYERS:
        u, _, vt = svd(base.get_submodule(layer).weight)
        change = delta(model, layer)
        assert change.norm() > 1e-3
        assert outside(change, u) < 1e-4
        assert outside(change.T, vt.T) < 1e-4


def test_lora_xs_multiplies_inputs_by_the_singular_values_and_starts_at_almost_nothing():
    _, model, base = attached("lora_xs")
    _, s, vt = svd(base.get_submodule(LAYERS[0]).weight)
    right = model.get_submodule(LAYERS[0]).lora_A["default"].weight
    torch.testing.assert_close((right @ vt.T).abs(), torch.diag(s), rtol=0, atol=1e-4)
    middle = model.get_submodule(LAYERS[0]).lora_B["default"].middle
    assert 0.5e-5 < middle.std() < 2e-5


def test_svfit_changes_the_weights_singular_values_and_nothing_else(tmp_path):
    adapter, model, base = attached("svfit", 64)
    trained(adapter, model, "svfit", tmp_path)
    before = base.get_submodule(LAYERS[0]).weight
    u, s, vt = svd(before, 64)
    turned = u.T @ (before + delta(model, LAYERS[0])) @ vt.T  # diagonal, if U and V are still those of W
    now = model.get_submodule(LAYERS[0]).lora_B["default"].middle.detach()
    assert (now - s).abs().max() > 1e-3
    torch.testing.assert_close(turned, torch.diag(now), rtol=0, atol=1e-4)


def test_osora_scales_each_output_of_the_leading_part_as_well(tmp_path):
    adapter, model, base = attached("osora")
    assert trained_names(model) == {"B.default.middle", "B.default.outputs"}
    trained(adapter, model, "osora", tmp_path)
    before = base.get_submodule(LAYERS[0]).weight
    u, s, vt = svd(before)
    factor = model.get_submodule(LAYERS[0]).lora_B["default"]
    assert (factor.outputs - 1).abs().max() > 1e-3
    leading = factor.outputs[:, None] * (u * factor.middle @ vt)
    expected = before - u * s @ vt + leading
    torch.testing.assert_close(before + delta(model, LAYERS[0]), expected, rtol=0, atol=1e-4)


def test_lora_sb_starts_at_the_best_low_rank_approximation_of_adams_first_step():
    _, model, base = attached("lora_sb")
    sum(base.loss(make_batch(number)) for number in range(3)).backward()
    for layer in LAYERS:
        step = -settings("lora_sb").config["step"] * base.get_submodule(layer).weight.grad.sign()
        u, s, vt = svd(step)
        found = delta(model, layer)
        torch.testing.assert_close(found, u * s @ vt, rtol=0, atol=1e-6)
        assert torch.linalg.matrix_rank(found, rtol=1e-4) == RANK
    assert trained_names(model) == {"B.default.middle"}


def test_eva_xs_looks_along_evas_directions_and_answers_along_the_weights(tmp_path):
    _, plain, _ = attached("eva")
    adapter, model, base = attached("eva_xs")
    assert trained_names(model) == {"B.default.middle"}
    for layer in LAYERS:
        ours, evas = (m.get_submodule(layer).lora_A["default"].weight for m in (model, plain))
        torch.testing.assert_close(ours, evas, rtol=0, atol=1e-6)
    assert adapter.eva.keys() == {name for name, _ in model.named_modules() if hasattr(_, "lora_A")}
    trained(adapter, model, "eva_xs", tmp_path)
    u, _, _ = svd(base.get_submodule(LAYERS[0]).weight)
    assert outside(delta(model, LAYERS[0]), u) < 1e-4


def test_polars_sides_stay_near_orthonormal_as_without_its_field_they_do_not(tmp_path):
    distances = {}
    for held in (True, False):
        adapter, model, _ = attached("polar")
        for factor in (m.lora_B["default"] for _, m in model.named_modules() if hasattr(m, "lora_B")):
            factor.middle.data += torch.eye(RANK)  # so that the sides have a gradient
        config = training("polar")
        batches = lambda number: make_batch(number % 4)  # noqa: E731
        companion = adapter.companion if held else None
        train(model, batches, model.loss, 12, config, Saves(tmp_path / str(held)), Rules(companion=companion))
        left = model.get_submodule(LAYERS[0]).lora_B["default"].left.detach()
        right = model.get_submodule(LAYERS[0]).lora_A["default"].weight.detach()
        distances[held] = max(float((g - torch.eye(RANK)).norm()) for g in (left.T @ left, right @ right.T))
    assert distances[True] < 0.5 * distances[False]


def test_the_landing_field_of_an_orthonormal_matrix_keeps_it_so_to_first_order():
    generator = torch.Generator().manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64))
    gradient = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    field = landing_field(x, gradient, 0.5)
    change = x.T @ field + field.T @ x  # of X^T X
    torch.testing.assert_close(change, torch.zeros(4, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = (gradient @ x.T - x @ gradient.T) @ x
    torch.testing.assert_close(field, expected)
    assert float((field * gradient).sum()) > 0  # so that a step against it goes downhill
    longer = landing_field(1.5 * x, torch.zeros_like(x), 0.5)
    torch.testing.assert_close(longer, 0.5 * 1.5 * (1.5**2 - 1) * x)  # towards unit length


def test_a_sandwich_is_saved_as_plain_lora_of_its_own_rank(tmp_path):
    adapter, model, _ = attached("svfit")
    trained(adapter, model, "svfit", tmp_path / "checkpoints")
    save_adapter(adapter, tmp_path / "adapter", "toy")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == RANK
    assert "diagonal" not in config
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = f"base_model.model.{LAYERS[0]}"
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    torch.testing.assert_close(product, delta(model, LAYERS[0]), rtol=0, atol=1e-6)
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}


def test_eva_xs_takes_evas_settings():
    model, method = make_model(), settings("eva_xs")
    start = method.start_function()
    config = method.peft_config(RANK)
    batches = [make_batch(number) for number in range(3)]
    found = attach(
        model,
        config,
        batches,
        model.token_mask,
        start=lambda *given: start(*given, settings=EvaSettings(rho=1.0, max_batches=1)),
    )
    assert {layer.batches for layer in found.eva.values()} == {1}


def test_eva_xs_takes_the_ranks_that_eva_shares_out():
    model, method = make_model(), settings("eva_xs")
    config = method.peft_config(4)
    config.eva_config.rho = 2.0
    expected = make_model()(make_batch(77))
    batches = [make_batch(number) for number in range(4)]
    attach(model, config, batches, model.token_mask, start=method.start_function())
    factors = [m.lora_B["default"] for _, m in model.named_modules() if hasattr(m, "lora_B")]
    assert len({len(factor.middle) for factor in factors}) > 1
    assert all(factor.left.any() and not factor.left.requires_grad for factor in factors)
    assert torch.equal(model.eval()(make_batch(77)), expected)


def test_what_left_the_weight_cancels_what_took_its_place_at_any_precision():
    model, method = make_model(), settings("svfit")
    config = method.peft_config(RANK)
    config.diagonal = False
    attach(model, config, start=method.start_function())
    with torch.autocast("cpu", torch.bfloat16):
        assert not model.get_submodule(LAYERS[0]).lora_B["default"].weight.any()
