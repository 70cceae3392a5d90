"""Every method of configs/adapter/: how it starts, trains, is saved, loaded, merged and resumed."""

import copy
import functools
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hydra import compose, initialize_config_module
from peft import LoraConfig
from selection import by_default
from torch import Tensor

from eva_rl.adapter import Adapter, EvaSettings, attach, load_adapter, save_adapter, starts, trainable_parameters
from eva_rl.adapter.attach import _at_risk, _linear_layers
from eva_rl.adapter.budget import count, lora_weights, matched, within_budget
from eva_rl.adapter.eva import Reading, eva_init
from eva_rl.adapter.eva.moments import principal_angle
from eva_rl.adapter.lora_da import Moments, directions, lora_da
from eva_rl.batch import Batch
from eva_rl.config import AdapterSettings, FinetuneConfig, choices, parse
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer, ModelConfig
from eva_rl.training import Rules, Saves, TrainingConfig, train

ALL = sorted(
    Path(f.name).stem for f in (resources.files("eva_rl.configs") / "adapter").iterdir() if f.name.endswith(".yaml")
)
WITHOUT_ADAPTER = ["none", "full", "head", "bc", "scratch"]
METHODS = [name for name in ALL if name not in (*WITHOUT_ADAPTER, "peft")]
WITHOUT_A_SIZE = ("c3a", "ia3", "osora", "road", "svfit", "tinylora", "vblora", "vera")
BUDGETED = [name for name in METHODS if name not in WITHOUT_A_SIZE]
START_AWAY_FROM_THE_BASE = [
    "gora",  # a step away
    "kasa",  # W loses its minor components
    "lora_da",  # a step away
    "lora_one",  # likewise
    "lora_sb",  # likewise
    "unilora",  # one vector makes A and B, so that it can't be zero
    "vblora",  # A and B are mixtures of one bank of vectors, likewise
]
CHANGE_THE_BASE = ["pissa", "olora", "milora", "lora_ga", "corda", "fila"]
RENEW_A = ["fedsvd", "eva_fedsvd"]
OF_EACH_KIND = [
    "adalora",
    "dora",
    "eva",
    "eva_fedsvd",
    "hra",
    "hydra",
    "kasa",
    "lora",
    "lora_sb",
    "pissa",
    "svfit",
    "vera",
]
"""One of each way to start, train and be saved, for properties that need trainings of their own."""
STEPS = 20
WIDTH = 64
TRAINING = TrainingConfig(batch_size=8, warmup=2, precision="float32", checkpoint_every=STEPS // 2)


@functools.cache
def settings(name: str, *overrides: str) -> AdapterSettings:
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        arguments = ["task=dummy/Steps-v0", f"adapter={name}", f"steps={STEPS}", *overrides]
        return parse(compose("finetune", overrides=arguments), FinetuneConfig).adapter


@functools.cache
def config_of(name: str, *overrides: str) -> peft.PeftConfig:
    """The method's config, of the size that meets its budget. `attach` leaves it as it is."""
    method = settings(name, *overrides)
    make, budget = method.peft_config, method.budget
    return within_budget(make_model(), make, budget, method.rank, method.tolerance, method.sizes)


def make_model() -> DecisionTransformer:
    """A trunk of two blocks whose weights are large enough for their singular vectors to matter."""
    torch.manual_seed(0)
    interface = Interface("toy", 5, "continuous", 2, (0.0,) * 5, (1.0,) * 5, (0.0,) * 2, (1.0,) * 2, 1.0, 1.0)
    model = DecisionTransformer(ModelConfig(layers=2, heads=2, width=WIDTH, context=6, dropout=0.0), [interface])
    for block in model.trunk.blocks:
        for name in TRUNK_LAYERS:
            module = dict(block.named_modules())[f"{'feed_forward' if name in ('up', 'down') else 'attention'}.{name}"]
            torch.nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    return model.eval()


def make_batch(number: int) -> Batch:
    """Windows whose actions follow from their states; the last ones are padded."""
    generator = torch.Generator().manual_seed(1000 + number)
    observations = torch.randn(8, 6, 5, generator=generator)
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[-2:, 4:] = False
    actions = torch.tanh(observations[..., :2] * 2 - observations[..., 2:4])
    zeros = torch.zeros(8, 6)
    return Batch(observations * mask[..., None], actions * mask[..., None], zeros, zeros, mask, "toy")


def attached(name: str, model: DecisionTransformer, *overrides: str) -> Adapter:
    method = settings(name, *overrides)
    config = config_of(name, *overrides)
    torch.manual_seed(0)
    start = method.start_function()
    if method.eva is not None:
        chosen = {key: value for key, value in vars(method.eva).items() if key != "tokens"}
        start = functools.partial(start or starts.eva, settings=EvaSettings(**chosen))
    batches = map(make_batch, itertools.count())
    return attach(model, config, batches, model.token_mask, start=start, loss=model.loss, few=4)


def trained(
    adapter: Adapter, model: DecisionTransformer, name: str, folder: Path, steps: int = STEPS, resume: bool = False
) -> list[float]:
    torch.manual_seed(1)
    batches = lambda number: make_batch(number % 4)  # noqa: E731
    return train(model, batches, model.loss, steps, training(name), Saves(folder, resume), rules(adapter, name)).losses


def interrupted(number: int) -> Batch:
    """The batches of `trained`, until three steps after the first checkpoint."""
    if number == STEPS // 2 + 3:
        raise InterruptedError
    return make_batch(number % 4)


def training(name: str) -> TrainingConfig:
    return replace(TRAINING, learning_rate=settings(name).learning_rate)


def rules(adapter: Adapter, name: str, frozen: dict[str, Tensor] | None = None) -> Rules:
    return Rules(ratios=settings(name).ratios, companion=adapter.companion, frozen=frozen or {})


@torch.no_grad()
def actions(model: torch.nn.Module) -> Tensor:
    return model(make_batch(77))


def base_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of everything that an adapter leaves alone."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: p.detach().clone() for name, p in frozen.items() if "ranknum" not in name}


@dataclass
class Trained:
    """What became of one method, from its start to its saved adapter."""

    start_difference: float
    frozen_moved: list[str]
    losses: list[float]
    actions: Tensor
    folder: Path
    trainable: int


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory):
    """Train a method once, whoever asks first."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def of(name: str) -> Trained:
        model = make_model()
        expected = actions(model)
        adapter = attached(name, model)
        difference = float((actions(model.eval()) - expected).abs().max())
        before = base_weights(model)
        losses = trained(adapter, model, name, folder / name / "checkpoints")
        after = dict(model.named_parameters())
        moved = [n for n, p in before.items() if not torch.equal(after[n], p)]
        if name in RENEW_A:
            moved = [n for n in moved if "lora_A" not in n]
        save_adapter(adapter, folder / name / "adapter", "toy")
        return Trained(
            difference, moved, losses, actions(model.eval()), folder / name / "adapter", trainable_parameters(model)
        )

    return of


@pytest.mark.parametrize("name", sorted({*METHODS} - {*START_AWAY_FROM_THE_BASE}))
def test_at_the_start_the_function_is_the_bases(trainings, name):
    assert trainings(name).start_difference <= 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_few_steps_lower_the_loss(trainings, name):
    losses = trainings(name).losses
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("name", METHODS)
def test_frozen_weights_have_not_moved_by_a_bit(trainings, name):
    assert trainings(name).frozen_moved == []


@pytest.mark.parametrize("name", sorted({*BUDGETED} - {"oft", "boft"}))
def test_as_many_weights_are_trained_as_lora_of_the_rank_would(trainings, name):
    wide = [m for n, m in make_model().trunk.named_modules() if n.endswith(TRUNK_LAYERS)]
    assert trainings(name).trainable == pytest.approx(8 * sum(sum(m.weight.shape) for m in wide), rel=0.05)


@pytest.mark.parametrize(("name", "tolerance"), [("oft", 0.05), ("boft", 0.07), ("randlora", 0.05), ("eva_dora", 0.05)])
def test_on_the_shipped_bases_trunk_the_budget_is_met(name, tolerance):
    """Blocks must divide the width, so that not every trunk has some of the right size."""
    model = DecisionTransformer(ModelConfig(layers=4, heads=4, width=256, context=20))
    method = settings(name)
    assert method.tolerance == tolerance
    config = within_budget(model, method.peft_config, method.budget, method.rank, method.tolerance, method.sizes)
    assert count(model, config) == pytest.approx(147_456, rel=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_counted_without_memory_there_are_as_many_weights_as_are_trained(trainings, name):
    method, counted = settings(name), count(make_model(), config_of(name))
    if name == "gora" or (name.startswith("eva_") and method.eva.rho > 1):
        assert trainings(name).trainable == pytest.approx(counted, rel=0.05)  # less than a rank is left over
    else:
        assert trainings(name).trainable == counted


@pytest.mark.parametrize("name", METHODS)
def test_loaded_on_the_base_and_merged_it_acts_as_before_it_was_saved(trainings, name):
    found = trainings(name)
    assert (found.actions - actions(make_model())).abs().max() > 1e-3  # it has learned something to be lost
    unmerged = peft.PeftModel.from_pretrained(make_model(), str(found.folder)).eval()
    torch.testing.assert_close(actions(unmerged), found.actions, rtol=0, atol=1e-4)
    merged = load_adapter(make_model(), found.folder).eval()
    torch.testing.assert_close(actions(merged), found.actions, rtol=0, atol=1e-4)
    assert isinstance(merged, DecisionTransformer)
    assert {name: p.shape for name, p in merged.state_dict().items()} == {
        name: p.shape for name, p in make_model().state_dict().items()
    }


FRESH = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, {tests!r})
from test_adapters import actions, make_model
from peft import PeftModel
torch.set_num_threads(1)
found = {{name: actions(PeftModel.from_pretrained(make_model(), folder).eval()) for name, folder in {folders!r}.items()}}
save_file(found, {output!r})
"""


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_actions(trainings, tmp_path):
    from safetensors.torch import load_file

    folders = {name: str(trainings(name).folder) for name in OF_EACH_KIND}
    script = FRESH.format(tests=str(Path(__file__).parent), folders=folders, output=str(tmp_path / "found"))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    found = load_file(tmp_path / "found")
    for name in OF_EACH_KIND:
        torch.testing.assert_close(
            found[name], trainings(name).actions, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", by_default(OF_EACH_KIND, METHODS))
def test_resumed_it_ends_as_without_an_interruption(trainings, name, tmp_path):
    model = make_model()
    adapter = attached(name, model)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        train(model, interrupted, model.loss, STEPS, training(name), Saves(tmp_path), rules(adapter, name))
    model = make_model()
    adapter = attached(name, model)
    losses = trained(adapter, model, name, tmp_path, resume=True)
    assert losses == trainings(name).losses
    torch.testing.assert_close(actions(model.eval()), trainings(name).actions, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mica", "svfit", "lora_sb", "fedsvd", *CHANGE_THE_BASE])
def test_a_resumed_run_has_the_start_it_began_with(trainings, name, tmp_path):
    """Even where another machine would find singular vectors of the other sign."""
    model = make_model()
    adapter = attached(name, model)
    with pytest.raises(InterruptedError):
        train(
            model,
            interrupted,
            model.loss,
            STEPS,
            training(name),
            Saves(tmp_path),
            rules(adapter, name, adapter.frozen()),
        )
    model = make_model()
    adapter = attached(name, model)
    assert adapter.frozen()
    for tensor in adapter.frozen().values():
        tensor.neg_()
    batches = lambda number: make_batch(number % 4)  # noqa: E731
    frozen = adapter.frozen()
    train(model, batches, model.loss, STEPS, training(name), Saves(tmp_path, True), rules(adapter, name, frozen))
    torch.testing.assert_close(actions(model.eval()), trainings(name).actions, rtol=0, atol=0)
    save_adapter(adapter, tmp_path / "adapter", "toy")
    merged = load_adapter(make_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(actions(merged), trainings(name).actions, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", by_default(OF_EACH_KIND, METHODS))
def test_a_fresh_embedder_and_head_are_trained_saved_and_loaded_with_any_method(name, tmp_path):
    def connected() -> tuple[DecisionTransformer, tuple[str, ...]]:
        model = make_model()
        fresh = model.connect(replace(model.interfaces["toy"], name="new"), "a dataset")
        return model, fresh

    def batch(number: int) -> Batch:
        return replace(make_batch(number), interface="new")

    model, fresh = connected()
    method = settings(name)
    config = config_of(name)
    start = method.start_function() or (partial(starts.eva, settings=EvaSettings()) if method.eva else None)
    adapter = attach(
        model, config, map(batch, itertools.count()), model.token_mask, fresh, start, loss=model.loss, few=2
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
    train(model, batch, model.loss, 6, training(name), Saves(tmp_path / "checkpoints"), rules(adapter, name))
    after = dict(model.named_parameters())
    assert before
    assert {n.partition(".")[0] for n, p in before.items() if not torch.equal(p, after[n])} == {"embedders", "heads"}
    expected = model.eval()(batch(77)).detach()
    save_adapter(adapter, tmp_path / "adapter", "toy")
    again, _ = connected()
    merged = load_adapter(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(batch(77)), expected, rtol=0, atol=1e-4)
    assert {n: p.shape for n, p in merged.state_dict().items()} == {
        n: p.shape for n, p in connected()[0].state_dict().items()
    }


@pytest.mark.parametrize("name", CHANGE_THE_BASE)
def test_what_changes_the_base_is_saved_as_lora_of_twice_the_rank_for_the_base_as_it_was(trainings, name):
    config = json.loads((trainings(name).folder / "adapter_config.json").read_text())
    assert config["r"] == 2 * 8
    assert config["init_lora_weights"] is True
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert scale == pytest.approx(16 / 8**0.5 if name == "lora_ga" else 1)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"rank_pattern": {"up": 3}, "alpha_pattern": {"up": 5}}])
def test_a_changed_base_is_made_up_for_at_any_scale(tmp_path, changes):
    model = make_model()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(TRUNK_LAYERS), init_lora_weights="pissa", **changes)
    adapter = attach(model, config)
    trained(adapter, model, "lora", tmp_path / "checkpoints", steps=5)
    save_adapter(adapter, tmp_path / "adapter", "toy")
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(actions(loaded), actions(model.eval()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_milora_takes_the_minor_singular_components_out_of_the_base():
    before, model = make_model(), make_model()
    attached("milora", model)
    for name in ("trunk.blocks.0.attention.q", "trunk.blocks.1.feed_forward.up"):
        original, layer = before.get_submodule(name).weight, model.get_submodule(name)
        u, s, vt = torch.linalg.svd(original, full_matrices=False)
        minor = u[:, -8:] * s[-8:] @ vt[-8:]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(layer.scaling["default"] * b @ a, minor, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.base_layer.weight, original - minor, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_orthogonal_starts_in_orthonormal_rows_that_differ_between_seeds():
    rows = []
    for seed in (0, 1):
        model = make_model()
        torch.manual_seed(seed)
        attach(model, LoraConfig(r=8, target_modules=list(TRUNK_LAYERS)), start=starts.orthogonal)
        weight = model.trunk.blocks[0].attention.q.lora_A["default"].weight.detach()
        torch.testing.assert_close(weight @ weight.T, torch.eye(8), rtol=0, atol=1e-5)
        rows.append(weight)
    assert principal_angle(*rows) > 30


@torch.no_grad()
def test_eva_sees_the_rows_that_training_sends_through_each_layer_and_no_others():
    model, batch, seen = make_model(), make_batch(0), {}
    layers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TRUNK_LAYERS]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
        for name in layers
    ]
    model.train().loss(batch)
    model.eval()
    for handle in handles:
        handle.remove()
    eva_settings = EvaSettings(rho=1.0, max_batches=1, method="covariance")
    ranks = dict.fromkeys(layers, 4)
    found = eva_init(model, [batch], ranks, eva_settings, Reading(DecisionTransformer.as_trained, model.token_masks))
    masks = {mask.shape: mask for mask in (model.token_mask(batch), batch.mask)}
    for name in layers:
        rows = seen[name][masks[seen[name].shape[:-1]]]
        assert found[name].rows == len(rows)
        _, _, vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert principal_angle(found[name].components, vt[:4]) < 0.1
    states_alone = {name for name in layers if found[name].rows == batch.mask.sum()}
    assert states_alone == {
        f"trunk.blocks.1.{name}" for name in ("attention.q", "attention.o", "feed_forward.up", "feed_forward.down")
    }
    # Other tokens than states do not reach those layers in training: where they are asked for, all go through.
    chosen = eva_init(
        model,
        [batch],
        ranks,
        eva_settings,
        Reading(lambda m, b: m.as_trained(b, "action"), lambda b: model.token_masks(b, "action")),
    )
    assert {layer.rows for layer in chosen.values()} == {float(batch.mask.sum())}


@torch.no_grad()
def test_corda_looks_at_the_tokens_that_count_and_no_others():
    """Padding filled with anything changes nothing, and the components are those of W C."""
    models = []
    for padding in (0.0, 100.0):
        model = make_model()
        batch = make_batch(0)
        batch.observations[~batch.mask] = padding
        method = settings("corda")
        attach(model, method.peft_config(8), [batch], model.token_mask, few=1)
        models.append(model)
    layers = [model.trunk.blocks[1].feed_forward.up for model in models]
    torch.testing.assert_close(layers[0].base_layer.weight, layers[1].base_layer.weight, rtol=0, atol=1e-5)

    base, seen = make_model(), []
    base.trunk.blocks[1].feed_forward.up.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    batch = make_batch(0)
    base(batch)
    x = seen[0][base.token_mask(batch)]
    covariance = x.T @ x / len(x)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(WIDTH)  # CorDA's damping
    weight = base.trunk.blocks[1].feed_forward.up.weight
    u, _, _ = torch.linalg.svd(weight @ covariance, full_matrices=False)
    assert principal_angle(layers[0].lora_B["default"].weight.T, u[:, :8].T) < 0.1


def test_lora_ga_starts_in_the_singular_vectors_of_the_mean_gradient_at_the_papers_scale():
    base, model = make_model(), make_model()
    batches = [make_batch(n) for n in range(3)]
    attach(model, settings("lora_ga").peft_config(4), batches, model.token_mask, loss=model.loss, few=3)
    sum(base.loss(batch) for batch in batches).backward()
    name = "trunk.blocks.0.attention.v"
    u, _, vt = torch.linalg.svd(base.get_submodule(name).weight.grad)
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert principal_angle(a, vt[:4]) < 1
    assert principal_angle(b.T, u[:, 4:8].T) < 1
    torch.testing.assert_close(a.norm(dim=1), torch.full((4,), WIDTH**0.25 / 4))  # gamma is 16
    torch.testing.assert_close(b.norm(dim=0), torch.full((4,), WIDTH**0.25 / 4))
    assert not any(p.grad is not None for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_lora_one_starts_at_the_best_low_rank_step_against_the_mean_gradient():
    base, model = make_model(), make_model()
    batches = [make_batch(n) for n in range(3)]
    config = settings("lora_one").peft_config(4)
    attach(model, config, batches, model.token_mask, start=starts.lora_one, loss=model.loss, few=3)
    sum(base.loss(batch) for batch in batches).backward()
    name = "trunk.blocks.0.attention.v"
    u, s, vt = torch.linalg.svd(-base.get_submodule(name).weight.grad, full_matrices=False)
    layer = model.get_submodule(name)
    found = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(found, 16 / 4**0.5 / 128 * (u[:, :4] * s[:4] / s[0] @ vt[:4]), rtol=1e-3, atol=1e-5)
    assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)
    before, after = (sum(m.loss(batch) for batch in batches).item() for m in (base.eval(), model.eval()))
    assert after < before


def test_lora_da_lies_between_the_inputs_directions_and_the_newton_step():
    """Without a gradient A is uncentred EVA's; without regard to variance B A is the best approximation of the step."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=rng) * torch.linspace(3, 0.5, 12)
    g = torch.randn(4000, 5, generator=rng) * torch.linspace(1, 2, 5) + 0.1 * x[:, 3:8]
    quiet, moved = Moments(), Moments()
    quiet.add(x, 1e-9 * torch.randn(4000, 5, generator=rng))
    moved.add(x, g)
    a, _ = directions(quiet, 4, beta=1e6)
    assert principal_angle(a, torch.linalg.svd(x, full_matrices=False).Vh[:4]) < 1
    a, b = directions(moved, 3, beta=0.0)
    step = np.linalg.solve((x.T @ x / 4000).numpy(), (x.T @ g / 4000).numpy()) / (g.numpy() ** 2).mean(0)  # (in, out)
    u, s, vt = np.linalg.svd(-step.T, full_matrices=False)
    np.testing.assert_allclose((b @ a).numpy(), u[:, :3] * s[:3] / s[0] @ vt[:3], atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=0)


def test_lora_da_sees_the_gradient_of_full_fine_tuning_and_lowers_the_loss():
    base, model = make_model(), make_model()
    batches = [make_batch(n) for n in range(3)]
    config = settings("lora_da").peft_config(4)
    attach(model, config, batches, model.token_mask, start=lora_da, loss=model.loss, few=3)
    name = "trunk.blocks.0.attention.v"
    layer = model.get_submodule(name)
    assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)
    sum(base.loss(batch) for batch in batches).backward()
    change = layer.get_delta_weight("default").detach()
    assert float((change * base.get_submodule(name).weight.grad).sum()) < 0  # downhill
    before, after = (sum(m.loss(batch) for batch in batches).item() for m in (base.eval(), model.eval()))
    assert after < before


def test_lora_plus_lets_b_learn_sixteen_times_as_fast(tmp_path):
    """Adam's first step moves every entry by the learning rate, whatever its gradient."""
    model = make_model()
    attached("lora_plus", model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    config = TrainingConfig(batch_size=8, warmup=0, learning_rate=1e-4, weight_decay=0.0, precision="float32")
    with torch.no_grad():  # so that A has a gradient too
        for n, p in model.named_parameters():
            p += 0.01 * ("lora_B" in n)
    before |= {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    train(model, make_batch, model.loss, 1, config, Saves(tmp_path), Rules(ratios=settings("lora_plus").ratios))
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters() if n in before}
    assert max(most for n, most in moved.items() if "lora_B" in n) == pytest.approx(16e-4, rel=0.01)
    assert max(most for n, most in moved.items() if "lora_A" in n) == pytest.approx(1e-4, rel=0.01)


def test_adalora_ends_with_fewer_ranks_than_it_began_with(trainings):
    weights = json.loads((trainings("adalora").folder / "adapter_config.json").read_text())["rank_pattern"]
    kept = sum(sum(mask) for mask in weights.values())
    ranks = [len(mask) for mask in weights.values()]
    assert kept == settings("adalora").peft_config(8).target_r * len(ranks) < sum(ranks)


def test_dora_meets_the_budget_by_one_rank_more_in_some_layers():
    model, method = make_model(), settings("dora")
    budget = lora_weights(model, method.peft_config(), 8)
    config = matched(model, method.peft_config, budget, 0.01)
    assert 0 < len(config.rank_pattern) < 12
    assert set(config.rank_pattern.values()) == {config.r + 1}
    assert config.alpha_pattern == config.rank_pattern  # alpha / r stays 1
    assert count(model, config) == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize("name", ["lora", "randlora", "fourierft", "hra"])
@pytest.mark.parametrize("budget", ["25000", "50000"])
def test_a_budget_can_be_a_number(name, budget):
    model = make_model()
    adapter = attached(name, model, f"adapter.budget={budget}", "adapter.tolerance=0.1")
    assert trainable_parameters(adapter.model) == pytest.approx(int(budget), rel=0.1)


@pytest.mark.parametrize(("name", "budget"), [("lora", "10"), ("oft", "77000"), ("randlora", "100000000")])
def test_a_budget_that_no_size_meets_is_refused_with_the_nearest(name, budget):
    model = make_model()
    before = list(model.named_modules())
    with pytest.raises(UserError, match=f"{budget} trainable weights was asked for; the nearest .* [0-9]+"):
        attached(name, model, f"adapter.budget={budget}")
    assert list(model.named_modules()) == before


@pytest.mark.parametrize("name", ["lora", "pissa", "adalora", "eva"])
def test_a_rank_that_does_not_fit_is_refused(name):
    with pytest.raises(UserError, match=r"[Rr]ank 100 .* 64 dimensions"):
        attached(name, make_model(), "adapter.budget=null", "adapter.rank=100")


@pytest.mark.parametrize("steps", [1, 2])
def test_adalora_is_refused_fewer_steps_than_it_can_prune_in(steps):
    with pytest.raises(UserError, match=f"{steps} steps are too few"):
        attached("adalora", make_model(), f"steps={steps}")


def test_a_budget_below_what_randlora_can_be_is_refused_before_it_grows():
    with pytest.raises(UserError, match="1000 trainable weights was asked for; the nearest"):
        attached("randlora", make_model(), "adapter.budget=1000")


@pytest.mark.parametrize("config_targets", [r".*\.(q|up)", ["q", "up"]])
def test_a_changed_base_is_noticed_however_its_layers_are_named(config_targets, tmp_path):
    model = make_model()
    config = LoraConfig(r=2, target_modules=config_targets, init_lora_weights="pissa", lora_alpha=2)
    adapter = attach(model, config)
    trained(adapter, model, "lora", tmp_path / "checkpoints", steps=4)
    save_adapter(adapter, tmp_path / "adapter", "toy")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 4
    merged = load_adapter(make_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(actions(merged), actions(model.eval()), rtol=0, atol=1e-4)


def test_a_rank_wider_than_any_of_all_linear_layers_is_refused():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"Rank 2 .* 'embedders.toy.return_to_go', which has 1 dimensions"):
        attach(make_model(), config)


def test_a_layer_of_zeros_loses_nothing_to_pissa_and_loads_all_the_same(tmp_path):
    model, again = make_model(), make_model()
    for m in (model, again):
        torch.nn.init.zeros_(m.trunk.blocks[1].attention.o.weight)
    adapter = attach(model, LoraConfig(r=2, target_modules=list(TRUNK_LAYERS), init_lora_weights="pissa"))
    save_adapter(adapter, tmp_path / "adapter", "toy")
    torch.testing.assert_close(actions(load_adapter(again, tmp_path / "adapter").eval()), actions(model.eval()))


class Transposed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.layer = Conv1D(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(("init", "start"), [("pissa", None), (True, starts.milora), (True, starts.orthogonal)])
def test_layers_that_keep_their_weights_transposed_start_as_the_base(init, start):
    model, x = Transposed(), torch.ones(1, 6)
    expected = model(x)
    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=init, fan_in_fan_out=True)
    torch.testing.assert_close(attach(model, config, start=start).model(x), expected, rtol=0, atol=1e-5)


def test_an_initialisation_that_changes_the_function_is_refused():
    """peft's OLoRA forgets that the weights of such layers are transposed."""
    model = Transposed()
    before = model.layer.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights="olora", fan_in_fan_out=True)
    with pytest.raises(UserError, match="changed what layer 'layer' computes"):
        attach(model, config)
    assert torch.equal(model.layer.weight, before)


def test_a_config_is_left_as_it_was_given():
    config = settings("eva_rho2").peft_config(4)
    before = copy.deepcopy(config)
    model = make_model()
    attach(model, config, [make_batch(n) for n in range(4)], model.token_mask, ["heads.toy"])
    assert config == before


@pytest.mark.parametrize(
    ("name", "trainable"), [("lora", "all"), ("lora", "none"), ("full", "adapter"), ("eva", "interface")]
)
def test_what_is_trainable_beside_an_adapter_is_refused(name, trainable):
    with pytest.raises(UserError, match=f"adapter.trainable={trainable} does not go with"):
        settings(name, f"adapter.trainable={trainable}")


def test_dora_on_a_changed_base_is_refused_and_the_model_is_as_it_was():
    model = make_model()
    expected, state = actions(model), copy.deepcopy(model.state_dict())
    config = LoraConfig(r=4, target_modules=["q", "up"], init_lora_weights="olora", use_dora=True)
    with pytest.raises(UserError, match="choose one"):
        attach(model, config)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(actions(model), expected)


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_an_initialisation_that_needs_data_and_gets_none_says_so(name):
    model = make_model()
    with pytest.raises(UserError, match="no batch of data"):
        attach(model, settings(name).peft_config(4), [], model.token_mask, loss=model.loss)
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_every_choice_is_listed_with_a_line_of_its_own():
    lines = choices("adapter", "finetune").splitlines()
    assert [line.split()[0] for line in lines] == ALL
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.slow
def test_one_setting_says_which_layers_every_method_adapts():
    for name in METHODS:
        config = settings(name, "adapter.layers=[q,v]").peft_config()
        assert set(config.target_modules) == {"q", "v"}, name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.budget=many", "adapter.budget must be "),
        ("adapter.rank=0", "adapter.rank must be at least 1, got 0"),
        ("adapter.start=eva_rl.adapter.starts.nowhere", "names no function"),
        ("adapter.size=null", "can't be met without adapter.size"),
        ("adapter.trainable=some", "adapter.trainable must be "),
        ("adapter.size={r: x}", "adapter.size.r must be "),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        settings("lora", override).start_function()


def test_a_ratio_for_no_parameter_is_refused(tmp_path):
    model = make_model()
    attached("lora", model)
    with pytest.raises(UserError, match="names 'nothing'"):
        train(model, make_batch, model.loss, 1, TRAINING, Saves(tmp_path), Rules(ratios={"nothing": 2.0}))


@pytest.mark.parametrize(
    ("name", "kept"), [("eva", 0), ("orthogonal", 0), ("milora", 1), ("pissa", 1), ("lora_ga", 1), ("olora", 1)]
)
def test_no_weight_is_copied_but_those_that_the_start_may_change(name, kept):
    model, method = make_model(), settings(name, "adapter.layers=[blocks.1.feed_forward.up]")
    config = method.peft_config(2)
    start = method.start_function() or starts.start_of(config)
    names = [name for name, _ in _at_risk(model, config, functools.partial(start))]
    assert names == ["trunk.blocks.1.feed_forward.up"] * kept
    config.target_modules = None
    assert len(list(_at_risk(model, config, start))) == (len(list(_linear_layers(model))) if kept else 0)


@pytest.mark.parametrize(
    ("layer", "outputs"), [("attention.q", WIDTH), ("feed_forward.up", 4 * WIDTH), ("feed_forward.down", WIDTH)]
)
def test_lora_ga_scales_by_the_fourth_root_of_the_outputs_number(layer, outputs):
    model = make_model()
    attach(model, settings("lora_ga").peft_config(4), [make_batch(0)], model.token_mask, loss=model.loss, few=1)
    own = model.get_submodule(f"trunk.blocks.0.{layer}")
    c = outputs**0.25 / 16**0.5  # arXiv 2407.05000, algorithm 1, with gamma = 16
    torch.testing.assert_close(own.lora_A["default"].weight.norm(dim=1), torch.full((4,), c))
    torch.testing.assert_close(own.lora_B["default"].weight.norm(dim=0), torch.full((4,), c))


def test_adaloras_penalty_is_how_far_its_matrices_are_from_orthonormal():
    model = make_model()
    adapter = attached("adalora", model)
    generator, distances = torch.Generator().manual_seed(0), []
    for name, p in adapter.model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator)
            rows = p.data.numpy().astype(float) if "lora_A" in name else p.data.numpy().astype(float).T
            distances.append(np.linalg.norm(rows @ rows.T - np.eye(len(rows))))
    expected = settings("adalora").config["orth_reg_weight"] * np.mean(distances)  # arXiv 2303.10512, eq. 4
    assert adapter.companion.penalty().item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1


def test_layers_of_rslora_whose_rank_the_budget_changed_have_rsloras_scale():
    model = make_model()
    attached("eva_rslora", model, "adapter.eva.rho=2.0")
    alpha = config_of("eva_rslora", "adapter.eva.rho=2.0").lora_alpha
    layers = starts.lora_layers(model)
    assert len({layer.r["default"] for _, layer in layers}) > 1
    for _, layer in layers:
        assert layer.scaling["default"] == pytest.approx(alpha / layer.r["default"] ** 0.5)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vera", "projection_prng_key"),
        ("randlora", "projection_prng_key"),
        ("fourierft", "random_loc_seed"),
        ("shira", "random_seed"),
    ],
)
def test_what_a_method_draws_once_is_drawn_from_the_runs_seed(name, key):
    assert [settings(name, f"seed={seed}").config[key] for seed in (0, 3)] == [0, 3]
