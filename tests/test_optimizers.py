"""Every optimiser of configs/optimizer/: resumed bit for bit, listed, named in reports; and what only the right one does."""

import functools
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import scipy.fft
import torch
from hydra import compose, initialize_config_module
from results import result, typed
from safetensors.torch import load_file
from selection import by_default
from torch import Tensor, nn

from eva_rl.adapter import attach
from eva_rl.adapter.hydra import HydraConfig
from eva_rl.batch import Batch
from eva_rl.config import ADAMW, FinetuneConfig, OptimizerSettings, PretrainConfig, choices, identity, parse
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer, ModelConfig
from eva_rl.study.labels import labelled
from eva_rl.training import Recipe, Rules, Saves, TrainingConfig, train
from eva_rl.training.optimizers import lora_pairs, make_optimizer, pack, unpack
from eva_rl.training.optimizers.dct_adamw import transform
from eva_rl.training.optimizers.lora_pro import adjusted, equivalent
from eva_rl.training.optimizers.reflora import refactoring

ALL = [line.split()[0] for line in choices("optimizer", "finetune").splitlines()]
OF_EACH_KIND = [
    "adamw",
    "allora",
    "dct_adamw",
    "frugal",
    "galore",
    "lora_pro",
    "muon",
    "reflora",
    "riemannian",
    "schedule_free",
    "soap",
]
ARM = Interface("arm", 3, "continuous", 2, (0.0,) * 3, (1.0,) * 3, (0.0,) * 2, (1.0,) * 2, 1.0, 1.0)
STEPS = 12
CONFIG = TrainingConfig(batch_size=8, learning_rate=3e-3, warmup=2, precision="float32", checkpoint_every=4)


@functools.cache
def configured(name: str, *overrides: str) -> FinetuneConfig:
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        arguments = ["task=dummy/Steps-v0", "adapter=lora", f"optimizer={name}", f"steps={STEPS}", *overrides]
        return parse(compose("finetune", overrides=arguments), FinetuneConfig)


def settings(name: str, *overrides: str) -> OptimizerSettings:
    return configured(name, *overrides).optimizer


def make_model(lora: bool, seed: int = 0, alpha: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    model = DecisionTransformer(ModelConfig(layers=1, heads=2, width=32, context=4, dropout=0.1), [ARM])
    if lora:
        fresh = ("embedders.arm", "heads.arm")
        attach(model, peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=list(TRUNK_LAYERS)), fresh_modules=fresh)
    return model


def batches(number: int) -> Batch:
    """Batch `number` of four: the actions are the first two observations."""
    generator = torch.Generator().manual_seed(1000 + number % 4)
    observations = torch.randn(8, 4, 3, generator=generator)
    zeros, mask = torch.zeros(8, 4), torch.ones(8, 4, dtype=torch.bool)
    return Batch(observations, observations[..., :2].clone(), zeros, zeros, mask, "arm")


def trained(name: str, folder: Path, stop: int | None = None, seed: int = 0, steps: int = STEPS, resume: bool = False):
    """Train a fresh model with this optimiser, on LoRA where it needs that: losses and trained weights."""
    own = settings(name)
    model = make_model(own.pairs, seed, alpha=4 if name == "allora" else 6)
    for word in own.freezes:
        for parameter_name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and word not in parameter_name)

    def read(number: int) -> Batch:
        if number == stop:
            raise InterruptedError
        return batches(number)

    frozen = {n: p.data for n, p in model.named_parameters() if not p.requires_grad}
    config = replace(CONFIG, learning_rate=CONFIG.learning_rate * own.rate)
    recipe = Recipe(**own.recipe())
    rules = Rules(recipe, frozen=frozen)
    losses = train(model, read, model.loss, steps, config, Saves(folder, resume), rules).losses
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", by_default(OF_EACH_KIND, ALL))
def test_with_any_optimiser_an_interrupted_run_resumes_bit_for_bit(name, tmp_path):
    losses, weights = trained(name, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(name, tmp_path / "broken", stop=6)
    resumed, again = trained(name, tmp_path / "broken", seed=5, resume=True)
    assert resumed == losses
    assert [n for n in weights if not torch.equal(weights[n], again[n])] == []


@pytest.mark.parametrize("name", ALL)
def test_any_optimiser_lowers_the_loss_and_leaves_frozen_weights_alone(name, tmp_path):
    losses, after = trained(name, tmp_path, steps=40)
    own = settings(name)
    before = dict(make_model(own.pairs, alpha=4 if name == "allora" else 6).named_parameters())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    frozen = [n for n, p in before.items() if not p.requires_grad or any(word in n for word in own.freezes)]
    assert bool(frozen) == own.pairs
    assert [n for n in frozen if not torch.equal(before[n], after[n])] == []


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_every_optimiser_is_listed_with_its_source(command):
    lines = choices("optimizer", command).splitlines()
    assert [line.split()[0] for line in lines] == ALL
    assert all("arXiv" in line or "." in line.rpartition(", ")[2] for line in lines)


def test_the_default_is_adamw_and_leaves_a_runs_identity_as_it_was():
    config = configured("adamw")
    assert config.optimizer == ADAMW
    assert "optimizer" not in identity(config)
    assert identity(configured("adan"))["optimizer"]["name"] == "adan"


def test_pretraining_takes_an_optimiser_too():
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        config = parse(compose("pretrain", overrides=["optimizer=lion"]), PretrainConfig)
    assert identity(config)["optimizer"]["name"] == "lion"


def test_reports_name_the_optimiser_where_it_is_not_the_default():
    chosen = {"optimizer.name": "adan", "optimizer.rate": 1.0}
    runs = [result("lora"), result("lora", settings=chosen), result("lora", settings=chosen | {"optimizer.rate": 2.0})]
    methods = [own.method for own in labelled(typed(runs))]
    assert methods[0] == "lora"
    assert labelled(typed(runs[:2]))[1].method == "lora, optimizer=adan"
    assert len(set(methods)) == 3


def test_an_optimiser_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'eva_rl\[optimizers\]'"):
        settings("adan").recipe()


def test_an_optimiser_for_lora_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="optimizer=riemannian works on LoRA's two factors"):
        make_optimizer(Recipe(**settings("riemannian").recipe()), make_model(False), 1e-3, 0.0, {})


def test_an_optimiser_for_lora_is_refused_where_a_factor_is_made_of_other_numbers():
    model = make_model(False)
    attach(
        model, HydraConfig(r=4, target_modules=list(TRUNK_LAYERS))
    )  # whose A is [A_p; A_s W], computed at every call
    with pytest.raises(UserError, match="optimizer=lora_fa works on LoRA's two factors"):
        make_optimizer(Recipe(**settings("lora_fa").recipe()), model, 1e-3, 0.0, {})


# --- properties


def with_gradients(name: str) -> tuple[torch.optim.Optimizer, nn.Module, dict[str, Tensor]]:
    """An optimiser on LoRA whose B is not zero, and the gradient of every W that its A and B got theirs from."""
    model = make_model(True)
    for pair in lora_pairs(model):
        nn.init.normal_(pair.b, std=0.1)
    own = settings(name)
    optimizer = make_optimizer(Recipe(**own.recipe()), model, 1e-3, 0.0, {})
    full = {}
    generator = torch.Generator().manual_seed(0)
    for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
        a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        gradient = torch.randn(len(b), a.shape[1], generator=generator)  # (out, in)
        a.grad, b.grad = s * b.detach().T @ gradient, s * gradient @ a.detach().T
        full[id(a)] = gradient
    return optimizer, model, full


def preconditioned(optimizer: torch.optim.Optimizer) -> None:
    """Run what the optimiser does to gradients before its step."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook(optimizer, (), {})


def test_riemannian_gradients_are_pefts():
    from peft.optimizers import create_riemannian_optimizer

    optimizer, model, _ = with_gradients("riemannian")
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    preconditioned(optimizer)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for n, p in model.named_parameters():
        p.grad = expected.get(n)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-2).step()  # moves by minus its gradients
    assert found
    for n, gradient in found.items():
        torch.testing.assert_close(before[n] - dict(model.named_parameters())[n], gradient, rtol=1e-3, atol=1e-4)


def test_lora_fa_moves_the_product_by_the_full_gradient_in_as_row_space():
    optimizer, model, full = with_gradients("lora_fa")
    preconditioned(optimizer)
    for pair in lora_pairs(model):
        moved = pair.scale * pair.b.grad @ pair.a
        onto_rows = torch.linalg.pinv(pair.a) @ pair.a  # (in, in)
        torch.testing.assert_close(moved, full[id(pair.a)] @ onto_rows, rtol=1e-3, atol=1e-3)


def test_reflora_balances_the_refactored_pair():
    """A' = S^(1/2) A and B' = B S^(-1/2) have the same product, and Gram matrices that are one."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 9).double(), torch.randn(7, 4).double()
    s = refactoring(a @ a.T, b.T @ b)
    torch.testing.assert_close(s @ (a @ a.T) @ s, b.T @ b, rtol=1e-6, atol=1e-6)
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.sqrt()) @ vectors.T
    a2, b2 = root @ a, b @ torch.linalg.inv(root)
    torch.testing.assert_close(b2 @ a2, b @ a)
    torch.testing.assert_close(a2 @ a2.T, b2.T @ b2)


def test_galores_moments_live_in_few_dimensions(tmp_path):
    model = make_model(False)
    optimizer = make_optimizer(Recipe(**settings("galore").recipe()), model, 1e-3, 0.0, {})
    model.loss(batches(0)).backward()
    optimizer.step()
    weight = model.trunk.blocks[0].feed_forward.up.weight  # (128, 32)
    assert optimizer.state[weight]["exp_avg"].shape == (128, 8)


def test_weights_that_no_step_has_moved_yet_have_no_state_after_a_resume():
    model = make_model(False)
    up, down = model.trunk.blocks[0].feed_forward.up.weight, model.trunk.blocks[0].feed_forward.down.weight
    recipe = Recipe(**settings("galore").recipe())
    optimizer, resumed = (make_optimizer(recipe, model, 1e-3, 0.0, {}) for _ in range(2))
    model.loss(batches(0)).backward()
    down.grad = None  # as of a block that LISA did not draw
    optimizer.step()
    parameters = dict(model.named_parameters())
    unpack(resumed, parameters, *pack(optimizer, parameters))
    assert up in resumed.state
    assert down not in resumed.state


def test_lora_pros_equivalent_gradient_is_the_full_one_but_for_what_neither_factor_reaches():
    """Theorem 2.1: what is missing is (I - P_B) G (I - P_A), with the projections on B's columns and A's rows."""
    _, model, full = with_gradients("lora_pro")
    for pair in lora_pairs(model):
        gradient = full[id(pair.a)]
        found = equivalent(pair, *adjusted(pair, pair.a.grad, pair.b.grad, 1e-12)).detach()
        a, b = pair.a.detach(), pair.b.detach()
        beyond_b = torch.eye(len(b)) - b @ torch.linalg.pinv(b)
        beyond_a = torch.eye(a.shape[1]) - torch.linalg.pinv(a) @ a
        torch.testing.assert_close(gradient - found, beyond_b @ gradient @ beyond_a, rtol=1e-3, atol=1e-3)


def test_lora_pros_changes_are_the_nearest_to_the_gradients_of_all_with_one_equivalent_gradient():
    """Theorem 2.3: with any other X the changes lie further from the factors' own gradients."""
    _, model, _ = with_gradients("lora_pro")
    pair = lora_pairs(model)[0]
    a, b = pair.a.detach(), pair.b.detach()
    changes = [c.detach() for c in adjusted(pair, pair.a.grad, pair.b.grad, 1e-12)]
    distance = lambda c: (c[0] - pair.a.grad).square().sum() + (c[1] - pair.b.grad).square().sum()  # noqa: E731
    for seed in range(5):
        y = 0.1 * torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(seed))
        other = changes[0] + y @ a, changes[1] - b @ y
        torch.testing.assert_close(equivalent(pair, *other), equivalent(pair, *changes), rtol=1e-3, atol=1e-3)
        assert distance(changes) < distance(other)


def test_lora_pro_moves_the_product_against_adams_direction_of_the_full_gradient():
    """Adam's first direction is the gradient's sign, here that of the equivalent one."""
    optimizer, model, _ = with_gradients("lora_pro")
    pairs = lora_pairs(model)
    directions = [equivalent(p, *adjusted(p, p.a.grad, p.b.grad, 1e-12)).detach().sign() for p in pairs]
    before = [(p.a.detach().clone(), p.b.detach().clone()) for p in pairs]
    rate = 1e-5  # so small that the product of the changes does not count
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    for pair, direction, (a, b) in zip(pairs, directions, before, strict=True):
        reached = direction - (torch.eye(len(b)) - b @ torch.linalg.pinv(b)) @ direction @ (
            torch.eye(a.shape[1]) - torch.linalg.pinv(a) @ a
        )
        moved = pair.scale * (pair.b.double() @ pair.a.double() - b.double() @ a.double()) / -rate
        assert (moved - reached).norm() < 0.05 * reached.norm()


def test_allora_moves_rows_of_b_at_eta_times_the_rate_while_they_are_zero_and_slower_when_they_are_long():
    model = make_model(False)
    attach(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(TRUNK_LAYERS)))
    optimizer = make_optimizer(Recipe(**settings("allora").recipe()), model, 1e-3, 0.0, {})
    pair = lora_pairs(model)[0]
    with torch.no_grad():
        pair.b[0] = torch.tensor([6.0, 0.0, 0.0, 0.0])
    before = pair.b.detach().clone()
    pair.b.grad = torch.ones_like(pair.b)
    optimizer.step()
    moved = before - pair.b.detach()  # Adam's first step is the rate
    torch.testing.assert_close(moved[1:], torch.full_like(moved[1:], 2e-3))
    torch.testing.assert_close(moved[0], torch.full((4,), 1e-3 / 6.25**0.5), rtol=1e-3, atol=0)


def test_allora_is_refused_with_a_scaled_lora():
    with pytest.raises(UserError, match=r"scale must be 1 with optimizer=allora, got 1\.5"):
        make_optimizer(Recipe(**settings("allora").recipe()), make_model(True), 1e-3, 0.0, {})


def matrix_optimizer(name: str, *overrides: str, shape: tuple[int, int] = (12, 6)):
    """An optimiser of one matrix (of zeros) at rank 2."""
    model = nn.Linear(*shape[::-1], bias=False)
    nn.init.zeros_(model.weight)
    own = settings(name, "optimizer.matrices.rank=2", *overrides)
    return make_optimizer(Recipe(**own.recipe()), model, 1.0, 0.0, {}), model.weight


def test_the_cosine_transform_is_scipys_and_orthonormal():
    basis = transform(6)
    torch.testing.assert_close(basis, torch.from_numpy(scipy.fft.dct(torch.eye(6).double().numpy(), norm="ortho")))
    torch.testing.assert_close(basis.T @ basis, torch.eye(6).double())


def test_dct_adamw_takes_the_columns_with_most_of_the_gradient_and_feeds_back_the_rest():
    optimizer, weight = matrix_optimizer("dct_adamw")
    basis = transform(6).float()
    parts = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5.0, 0.1, 9.0, 0.2, 0.3]
    )
    weight.grad = parts @ basis.T
    optimizer.step()
    state = optimizer.state[weight]
    assert set(state["columns"].tolist()) == {1, 3}
    assert state["exp_avg"].shape == (12, 2)
    left_out = parts.clone()
    left_out[:, [1, 3]] = 0
    torch.testing.assert_close(state["error"], left_out @ basis.T, rtol=0, atol=1e-5)
    kept = dict(zip(state["columns"].tolist(), state["exp_avg"].T.clone(), strict=True))
    weight.grad = 100 * torch.outer(torch.ones(12), basis[:, 4])
    optimizer.step()  # column 4 comes in, and the stronger of the others stays with its moment
    assert 4 in state["columns"].tolist()
    place = state["columns"].tolist().index(4)
    torch.testing.assert_close(state["exp_avg"][:, place], 0.1 * (100 + left_out[:, 4]), rtol=1e-4, atol=1e-4)
    for column in set(kept) & set(state["columns"].tolist()):
        place = state["columns"].tolist().index(column)
        assert torch.allclose(state["exp_avg"][:, place], 0.9 * kept[column], atol=1e-4)


def test_frugal_moves_by_adam_in_its_subspace_and_by_signs_outside():
    optimizer, weight = matrix_optimizer("frugal", "optimizer.config.interval=3")
    for step in range(4):
        gradient = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        moved = before - weight.detach()
        rest = gradient - gradient @ basis @ basis.T
        in_subspace = moved - 0.1 * rest.sign()
        torch.testing.assert_close(in_subspace @ basis @ basis.T, in_subspace, rtol=0, atol=1e-4)
        if step in (0, 3):  # the moments start anew: Adam's first direction is a sign
            _, _, vt = torch.linalg.svd(gradient, full_matrices=False)
            torch.testing.assert_close((vt[:2] @ basis).abs(), torch.eye(2), rtol=0, atol=1e-4)
            torch.testing.assert_close(in_subspace @ basis, (gradient @ basis).sign(), rtol=0, atol=1e-3)


def test_lazy_galore_renews_a_steady_subspace_ever_more_rarely_and_a_changing_one_as_often():
    for steady in (True, False):
        optimizer, weight = matrix_optimizer(
            "lazy_galore", "optimizer.config.interval=2", "optimizer.config.memory=2", "optimizer.config.threshold=0.9"
        )
        for step in range(13):
            # Where it changes, the leading direction is another unit vector each time.
            place = 0 if steady else step // 2 % 6
            weight.grad = torch.zeros(12, 6)
            weight.grad[:, place], weight.grad[:, (place + 1) % 6] = 5.0, torch.arange(12.0) / 12
            optimizer.step()
        assert (optimizer.state[weight]["interval"] > 2) == steady
        assert optimizer.state[weight]["exp_avg"].shape == (12, 2)


# --- runs


QUICK = ["steps=2", "episodes=0", "workers=0", "training.batch_size=4", "training.warmup=1", "demonstrations=4"]


def test_a_run_with_frozen_factors_counts_what_it_trains(run, base):
    for name in ("adamw", "lora_fa"):
        arguments = ["task=dummy/Steps-v0", f"base={base}", "adapter=lora", f"optimizer={name}", f"run_dir={name}"]
        status, _, err = run("finetune", *arguments, *QUICK)
        assert status == 0, err
    results = {name: json.loads(Path(name, "result.json").read_text()) for name in ("adamw", "lora_fa")}
    assert "optimizer" not in results["adamw"]["settings"]
    assert results["lora_fa"]["settings"]["optimizer"]["name"] == "lora_fa"
    assert results["lora_fa"]["learning_rate"] == results["adamw"]["learning_rate"]
    tensors = load_file(next(Path("lora_fa", "checkpoints").glob("*.safetensors")))
    names = [name for name in tensors if name.startswith("parameter.")]
    assert sum(tensors[name].numel() for name in names) == results["lora_fa"]["trainable_parameters"]
    assert not any("lora_A" in name for name in names)
    assert results["lora_fa"]["trainable_parameters"] < results["adamw"]["trainable_parameters"]


def test_a_grid_over_optimisers_has_a_folder_for_each(run, base):
    arguments = ["task=dummy/Steps-v0", f"base={base}", "adapter=head", "optimizer=adamw,lion", "hydra.sweep.dir=grid"]
    status, _, err = run("finetune", "-m", *arguments, *QUICK)
    assert status == 0, err
    assert {path.name for path in Path("grid").iterdir() if path.is_dir()} == {"head", "head-lion"}


def test_an_optimiser_for_lora_with_another_adapter_ends_in_a_sentence(run, base):
    arguments = ["task=dummy/Steps-v0", f"base={base}", "adapter=head", "optimizer=lora_pro", "run_dir=there"]
    status, _, err = run("finetune", *arguments, *QUICK)
    assert status == 1
    assert "optimizer=lora_pro works on LoRA's two factors" in err
    assert "Traceback" not in err
    assert not Path("there").exists()
