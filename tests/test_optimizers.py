"""Every optimiser of configs/optimizer/: resumed bit for bit, listed, named in reports; and what only the right one does."""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from hydra import compose, initialize_config_module
from results import result
from torch import Tensor, nn

from eva_rl.adapter import attach
from eva_rl.config import ADAMW, FinetuneConfig, OptimizerSettings, PretrainConfig, choices, identity, parse
from eva_rl.errors import UserError
from eva_rl.interface import Batch, Interface
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer, ModelConfig
from eva_rl.report.labels import labels
from eva_rl.training import Recipe, TrainingConfig, train
from eva_rl.training.optimizers import lora_pairs, make_optimizer
from eva_rl.training.optimizers.reflora import refactoring

ALL = [line.split()[0] for line in choices("optimizer", "finetune").splitlines()]
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


def make_model(lora: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = DecisionTransformer(ModelConfig(layers=1, heads=2, width=32, context=4, dropout=0.1), [ARM])
    if lora:
        fresh = ("embedders.arm", "heads.arm")
        attach(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TRUNK_LAYERS)), fresh_modules=fresh)
    return model


def batches(number: int) -> Batch:
    """Batch `number` of four: the actions are the first two observations."""
    generator = torch.Generator().manual_seed(1000 + number % 4)
    observations = torch.randn(8, 4, 3, generator=generator)
    zeros, mask = torch.zeros(8, 4), torch.ones(8, 4, dtype=torch.bool)
    return Batch(observations, observations[..., :2].clone(), zeros, zeros, mask, "arm")


def run(name: str, folder: Path, stop: int | None = None, seed: int = 0, steps: int = STEPS, resume: bool = False):
    """Train a fresh model with this optimiser, on LoRA where it needs that: losses and trained weights."""
    own = settings(name)
    model = make_model(own.pairs, seed)
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
    losses = train(model, read, model.loss, steps, config, folder, resume, frozen=frozen, recipe=recipe).losses
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ALL)
def test_with_any_optimiser_an_interrupted_run_resumes_bit_for_bit(name, tmp_path):
    losses, weights = run(name, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(name, tmp_path / "broken", stop=6)
    resumed, again = run(name, tmp_path / "broken", seed=5, resume=True)
    assert resumed == losses
    assert [n for n in weights if not torch.equal(weights[n], again[n])] == []


@pytest.mark.parametrize("name", ALL)
def test_any_optimiser_lowers_the_loss_and_leaves_frozen_weights_alone(name, tmp_path):
    losses, after = run(name, tmp_path, steps=40)
    own = settings(name)
    before = dict(make_model(own.pairs).named_parameters())
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
    assert labels(runs)[0] == "lora"
    assert labels(runs[:2])[1] == "lora, optimizer=adan"
    assert len(set(labels(runs))) == 3


def test_an_optimiser_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'eva_rl\[optimizers\]'"):
        settings("adan").recipe()


def test_an_optimiser_for_lora_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="optimizer=riemannian works on LoRA's two factors"):
        make_optimizer(Recipe(**settings("riemannian").recipe()), make_model(False), 1e-3, 0.0, {})


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
    a, b = torch.randn(4, 9), torch.randn(7, 4)
    s = refactoring(a @ a.T, b.T @ b)
    torch.testing.assert_close(s @ (a @ a.T).double() @ s, (b.T @ b).double(), rtol=1e-6, atol=1e-6)
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.sqrt()) @ vectors.T
    a2, b2 = root @ a.double(), b.double() @ torch.linalg.inv(root)
    torch.testing.assert_close(b2 @ a2, (b @ a).double())
    torch.testing.assert_close(a2 @ a2.T, b2.T @ b2)


def test_galores_moments_live_in_few_dimensions(tmp_path):
    model = make_model(False)
    optimizer = make_optimizer(Recipe(**settings("galore").recipe()), model, 1e-3, 0.0, {})
    model.loss(batches(0)).backward()
    optimizer.step()
    weight = model.trunk.blocks[0].feed_forward.up.weight  # (128, 32)
    assert optimizer.state[weight]["exp_avg"].shape == (128, 8)
