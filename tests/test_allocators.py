"""Every allocator of configs/allocator/, on LoRA and on EVA: trained, saved, loaded and resumed; and what only the right one does."""

import functools
import itertools
import json
from pathlib import Path

import peft
import pytest
import torch
from hydra import compose, initialize_config_module
from results import result, typed
from test_adapters import STEPS, TRAINING, actions, interrupted, make_batch, make_model

from eva_rl.adapter import Adapter, attach, load_adapter, save_adapter, trainable_parameters
from eva_rl.adapter.allocators.dylora import truncate
from eva_rl.adapter.allocators.prilora import depths_of
from eva_rl.config import NO_ALLOCATOR, FinetuneConfig, choices, identity, parse, plan
from eva_rl.errors import UserError
from eva_rl.jobs.finetuning import asked_for
from eva_rl.model import DecisionTransformer, ModelConfig
from eva_rl.study.labels import labelled
from eva_rl.training import Rules, Saves, train
from eva_rl.training.optimizers import Recipe, lora_pairs

ALL = [line.split()[0] for line in choices("allocator", "finetune").splitlines()]
WHILE_TRAINING = [name for name in ALL if name not in ("none", "prilora")]


@functools.cache
def configured(name: str, *overrides: str) -> FinetuneConfig:
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        arguments = ["task=dummy/Steps-v0", "adapter=lora", f"allocator={name}", f"steps={STEPS}", *overrides]
        return parse(compose("finetune", overrides=arguments), FinetuneConfig)


def attached(name: str, model: torch.nn.Module, *overrides: str) -> Adapter:
    config = configured(name, *overrides)
    torch.manual_seed(0)
    method = config.adapter
    start = method.start_function()
    batches = map(make_batch, itertools.count())
    own = config.allocator.allocator()
    given = batches, model.token_mask, (), start, own
    return attach(model, method.peft_config(8), *given, loss=model.loss, few=2)


def trained(
    adapter: Adapter, model: torch.nn.Module, folder: Path, steps: int = STEPS, resume: bool = False, read=None
):
    torch.manual_seed(1)
    read = read or (lambda number: make_batch(number % 4))
    return train(model, read, model.loss, steps, TRAINING, Saves(folder, resume), Rules(companion=adapter.companion))


@pytest.mark.parametrize("method", ["lora", pytest.param("eva", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_it_starts_as_the_base_learns_and_is_loaded_and_merged_as_it_was_saved(name, method, tmp_path):
    model = make_model()
    expected = actions(model)
    adapter = attached(name, model, f"adapter={method}")
    torch.testing.assert_close(actions(model.eval()), expected, rtol=0, atol=1e-5)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = trained(adapter, model, tmp_path / "checkpoints").losses
    assert sum(losses[-4:]) < sum(losses[:4])
    assert [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])] == []
    found = actions(model.eval())
    save_adapter(adapter, tmp_path / "adapter", "toy")
    unmerged = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(actions(unmerged), found, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        actions(load_adapter(make_model(), tmp_path / "adapter").eval()), found, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(actions(adapter.merged().eval()), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WHILE_TRAINING)
def test_resumed_it_ends_as_without_an_interruption(name, tmp_path):
    model = make_model()
    losses = trained(attached(name, model), model, tmp_path / "whole").losses
    broken = make_model()
    with pytest.raises(InterruptedError):
        trained(attached(name, broken), broken, tmp_path / "broken", read=interrupted)
    again = make_model()
    assert trained(attached(name, again), again, tmp_path / "broken", resume=True).losses == losses
    assert torch.equal(actions(again.eval()), actions(model.eval()))


def test_every_allocator_is_listed_with_its_source():
    lines = choices("allocator", "finetune").splitlines()
    assert all("arXiv" in line for line in lines if not line.startswith("none "))


def test_the_default_leaves_a_runs_identity_as_it_was():
    config = configured("none")
    assert config.allocator == NO_ALLOCATOR
    assert "allocator" not in identity(config)
    assert identity(configured("sora"))["allocator"]["name"] == "sora"


def test_reports_name_the_allocator_where_there_is_one():
    runs = [result("lora"), result("lora", settings={"allocator.name": "sora"})]
    assert [own.method for own in labelled(typed(runs))] == ["lora", "lora, allocator=sora"]


@pytest.mark.parametrize("method", ["full", "ia3", "adalora", "lora_xs"])
def test_an_allocator_without_lora_is_refused(method, tmp_path):
    config = configured("sora", f"adapter={method}", f"run_dir={tmp_path}")
    with pytest.raises(UserError, match=f"allocator=sora works on LoRA, and adapter={method} is none"):
        asked_for(config, plan(config, config.task))


def test_gates_on_lora_that_does_not_start_at_zero_are_refused_and_the_model_is_as_it_was():
    model = make_model()
    expected = actions(model)
    with pytest.raises(UserError, match="allocator=sora changes the scale of every rank"):
        attached("sora", model, "adapter=pissa")
    assert torch.equal(actions(model), expected)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("sora", "penalty=-1"),
        ("sora", "threshold=-1"),
        ("sora", "dense=1.0"),
        ("prilora", "spread=1.5"),
        ("increlora", "until=0.05"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, setting):
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        configured(name, f"++allocator.config.{setting}").allocator.allocator()


# --- properties


def gates(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach() for n, p in model.named_parameters() if n.endswith("lora_B.default.middle")])


def test_soras_step_solves_the_proximal_problem_of_the_l1_norm():
    """prox(g) = argmin_z 1/2 (z - g)^2 + threshold |z|, found here on a grid."""
    model = make_model()
    adapter = attached("sora", model, "allocator.config.threshold=0.4")
    before = gates(model).double()
    adapter.companion.after_step(1)
    grid = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    costs = 0.5 * (grid - before[:8, None]).square() + 0.4 * grid.abs()
    torch.testing.assert_close(gates(model)[:8].double(), grid[costs.argmin(1)], rtol=0, atol=1e-4)
    assert adapter.companion.penalty() == 0
    adapter.companion.strength = 10.0
    assert adapter.companion.penalty().item() == pytest.approx(10 * gates(model).abs().mean().item())
    assert before.mean().abs() < 0.4
    assert 0.7 < before.std() < 1.3


def test_ranks_whose_gate_is_shut_are_not_saved(tmp_path):
    model = make_model()
    adapter = attached("sora", model, "allocator.config.threshold=0.1")
    trained(adapter, model, tmp_path / "checkpoints")
    names = [n for n, m in model.named_modules() if hasattr(m, "lora_B")]
    open_ = {name: int((model.get_submodule(name).lora_B["default"].middle != 0).sum()) for name in names}
    assert len(set(open_.values())) > 1
    save_adapter(adapter, tmp_path / "adapter", "toy")
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    found = {
        n: len(m.lora_A["default"].weight) for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")
    }
    assert found == {name: max(1, number) for name, number in open_.items()}
    torch.testing.assert_close(actions(loaded.eval()), actions(model.eval()), rtol=0, atol=1e-5)


def test_codyras_gates_are_all_on_for_half_of_the_steps_and_then_drawn_ever_more():
    model = make_model()
    companion = attached("codyra", model).companion
    taken = []
    for step in range(1, STEPS + 1):
        before = gates(model)
        companion.after_step(step)
        taken.append(float((before - gates(model)).max()))
    assert taken[: STEPS // 2] == [0.0] * (STEPS // 2)
    rising = [0.005 * (n + 1) / (STEPS // 2) for n in range(STEPS // 2)]
    assert taken[STEPS // 2 :] == pytest.approx(rising, abs=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_dyloras_truncations_compute_what_its_steps_computed(rslora, tmp_path):
    """Cut to its first ranks, an adapter is the model that was trained when so many were drawn."""
    model = make_model()
    adapter = attached("dylora", model, f"adapter={'rslora' if rslora else 'lora'}")
    trained(adapter, model, tmp_path / "checkpoints", steps=6)
    save_adapter(adapter, tmp_path / "adapter", "toy")
    model.train()
    for rank in (1, 5, 8):
        for factor in adapter.companion.factors:
            factor.taken = rank
        cut = truncate(tmp_path / "adapter", rank, tmp_path / str(rank))
        assert json.loads((cut / "adapter_config.json").read_text())["r"] == rank
        loaded = peft.PeftModel.from_pretrained(make_model(), str(cut)).base_model.model.train()
        batch = make_batch(5)
        torch.testing.assert_close(loaded.loss(batch), model.loss(batch), rtol=1e-4, atol=1e-5)


def test_every_truncation_of_dylora_is_better_than_the_base(tmp_path):
    model, batch = make_model(), make_batch(2)
    adapter = attached("dylora", model)
    trained(adapter, model, tmp_path / "checkpoints", steps=40)
    save_adapter(adapter, tmp_path / "adapter", "toy")
    for rank in range(1, 9):
        cut = truncate(tmp_path / "adapter", rank, tmp_path / str(rank))
        assert load_adapter(make_model(), cut).loss(batch) < 0.8 * make_model().loss(batch)


def test_dyloras_step_moves_the_ranks_that_were_drawn_and_no_others():
    model = make_model()
    companion = attached("dylora", model).companion
    for factor in companion.factors:
        factor.taken = 3
        torch.nn.init.normal_(factor.weight)
    model.train().loss(make_batch(0)).backward()
    layer = model.get_submodule("trunk.blocks.1.feed_forward.up")
    for gradient in (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad.T):  # (r, ...)
        assert gradient[:3].abs().amax(1).min() > 0
        assert not gradient[3:].any()


def test_dylora_draws_every_rank_from_the_seed_and_the_step_alone():
    model = make_model()
    companion = attached("dylora", model, "seed=3").companion
    drawn = [companion.factors[0].taken]
    for step in range(1, 200):
        companion.after_step(step)
        drawn.append(companion.factors[0].taken)
    assert set(drawn) == set(range(1, 9))
    again = attached("dylora", make_model(), "seed=3").companion
    again.load_state_dict({"step": torch.tensor(120)})
    assert again.factors[0].taken == drawn[120]


def test_what_cannot_be_cut_to_a_rank_is_refused(tmp_path):
    model = make_model()
    save_adapter(attached("prilora", model), tmp_path / "adapter", "toy")
    with pytest.raises(UserError, match="What is cut to rank 2"):
        truncate(tmp_path / "adapter", 2, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_priloras_ranks_rise_linearly_with_depth_at_the_same_number_of_weights_and_the_same_scale():
    model, plain = make_model(), make_model()
    attached("prilora", model)
    attached("none", plain)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    ranks = {n: m.r["default"] for n, m in layers.items()}
    assert {ranks[n] for n in ranks if ".blocks.0." in n} == {4}
    assert {ranks[n] for n in ranks if ".blocks.1." in n} == {12}
    assert trainable_parameters(model) == trainable_parameters(plain)
    assert {m.scaling["default"] for m in layers.values()} == {1.0}
    assert depths_of(["a.7.q", "a.9.up", "a.7.k", "a.12.q"]) == [0, 1, 0, 2]
    assert depths_of(["q", "up"]) == [0, 0]


def test_priloras_ranks_rise_from_those_that_a_user_gave():
    model = make_model()
    given = ["++adapter.config.rank_pattern={q: 4}", "++adapter.config.alpha_pattern={q: 8}"]
    attached("prilora", model, *given)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    of_q = {n: m for n, m in layers.items() if n.endswith(".q")}
    assert [m.r["default"] for m in of_q.values()] == [2, 6]
    assert {m.scaling["default"] for m in of_q.values()} == {2.0}
    assert {m.r["default"] for n, m in layers.items() if n not in of_q} == {4, 12}


def test_an_optimiser_of_pairs_sees_no_pair_where_the_product_has_a_gate():
    model = make_model()
    attached("sora", model)
    assert lora_pairs(model) == []
    model = make_model()
    attached("dylora", model)
    assert len(lora_pairs(model)) == 12


def test_lisa_moves_the_blocks_that_were_drawn_and_what_is_in_none(tmp_path):
    torch.manual_seed(0)
    interface = make_model().interfaces["toy"]
    model = DecisionTransformer(ModelConfig(layers=4, heads=2, width=32, context=6, dropout=0.0), [interface])
    config = configured("lisa", "adapter=full", "allocator.config.every=5", "seed=1")
    companion = config.allocator.allocator().on_all(model)
    looks = []
    draw = companion.draw

    def look() -> None:
        now = {n: p.detach().clone() for n, p in model.named_parameters()}
        looks.append(now)
        draw()

    companion.draw = look
    losses = train(
        model, lambda n: make_batch(n % 4), model.loss, 40, TRAINING, Saves(tmp_path), Rules(companion=companion)
    ).losses
    assert sum(losses[-4:]) < sum(losses[:4])
    drawn = []
    for earlier, later in itertools.pairwise(looks):
        names = {n for n in earlier if not torch.equal(earlier[n], later[n])}
        drawn.append(frozenset(n.split(".")[2] for n in names if n.startswith("trunk.blocks.")))
        assert any(not n.startswith("trunk.blocks.") for n in names)
    assert {len(blocks) for blocks in drawn} == {2}
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("galore", marks=pytest.mark.slow)])
def test_lisa_with_all_weights_is_resumed_bit_for_bit(optimizer, tmp_path):
    recipe = Recipe(**configured("lisa", "adapter=full", f"optimizer={optimizer}").optimizer.recipe())

    def trained_to(folder: Path, read=lambda number: make_batch(number % 4), resume: bool = False):
        model = make_model()
        companion = (
            configured("lisa", "adapter=full", "allocator.config={active: 1, every: 4}")
            .allocator.allocator()
            .on_all(model)
        )
        torch.manual_seed(1)
        rules = Rules(recipe, companion=companion)
        return train(model, read, model.loss, STEPS, TRAINING, Saves(folder, resume), rules).losses, model

    losses, model = trained_to(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained_to(tmp_path / "broken", interrupted)
    again, resumed = trained_to(tmp_path / "broken", resume=True)
    assert again == losses
    assert torch.equal(actions(resumed.eval()), actions(model.eval()))


def test_lisa_leaves_frozen_what_an_optimiser_froze_after_it_was_made():
    model = make_model()
    companion = configured("lisa", "adapter=full").allocator.allocator().on_all(model)
    frozen = model.trunk.blocks[0].attention.q.weight.requires_grad_(False)
    companion.watch(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    for step in range(1, 50):
        companion.after_step(step)
        assert not frozen.requires_grad


@pytest.mark.parametrize("setting", ["allocator=sora", "allocator=dylora", "allocator=increlora", "adapter=lora_xs"])
def test_a_bias_of_lora_that_the_method_has_no_place_for_is_refused(setting):
    model = make_model()
    expected = actions(model)
    with pytest.raises(UserError, match="lora_bias=true was given, but the method has no bias"):
        attached("none", model, setting, "++adapter.config.lora_bias=true")
    assert torch.equal(actions(model), expected)


def test_lisa_goes_with_all_weights_and_with_lora_and_with_nothing_else(tmp_path):
    for method, goes in (("full", True), ("lora", True), ("bc", False), ("ia3", False)):
        config = configured("lisa", f"adapter={method}", f"run_dir={tmp_path}/{method}")
        if goes:
            assert asked_for(config, plan(config, config.task)).allocator is not None
        else:
            with pytest.raises(UserError, match=f"adapter={method} is none: take adapter=lora .*, adapter=full"):
                asked_for(config, plan(config, config.task))
    with pytest.raises(UserError, match="no list of modules"):
        configured("lisa").allocator.allocator().on_all(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        configured("lisa", "allocator.config.active=0").allocator.allocator()


def test_increloras_ranks_grow_from_a_quarter_to_all_where_the_update_matters(tmp_path):
    model = make_model()
    adapter = attached("increlora", model)
    companion = adapter.companion
    assert companion.counts == [2] * 12  # of 8, with room for 16
    assert [layer.r["default"] for layer in companion.layers] == [16] * 12
    trained(adapter, model, tmp_path / "checkpoints", steps=STEPS // 2 + 1)
    assert sum(companion.counts) == 8 * 12
    assert len(set(companion.counts)) > 1
    worth = companion.importance * companion.uncertainty
    most, least = worth.argmax(), worth.argmin()
    assert companion.counts[most] > companion.counts[least]
    for layer, count in zip(companion.layers, companion.counts, strict=True):
        assert layer.lora_B["default"].middle[:count].all()
        assert not layer.lora_B["default"].middle[count:].any()
    save_adapter(adapter, tmp_path / "adapter", "toy")
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter")).base_model.model
    assert [len(m.lora_A["default"].weight) for m in loaded.modules() if hasattr(m, "lora_A")] == companion.counts


def test_increloras_importance_is_that_of_the_update_and_the_weights_gradient():
    model = make_model()
    companion = attached("increlora", model).companion
    with torch.no_grad():
        for layer in companion.layers:
            layer.lora_B["default"].middle[:2] = torch.tensor([0.5, -1.0])
    updates = [layer.get_delta_weight("default").detach() for layer in companion.layers]
    weights = [layer.base_layer.weight.requires_grad_() for layer in companion.layers]
    gradients = torch.autograd.grad(model.eval().loss(make_batch(0)), weights)
    expected = [float((u * g).abs().sum()) / u.numel() ** 0.5 for u, g in zip(updates, gradients, strict=True)]
    torch.testing.assert_close(companion.scores(), torch.tensor(expected), rtol=1e-3, atol=1e-7)
    assert min(expected) > 0


def test_a_rank_in_reserve_learns_its_directions_and_not_its_size():
    model = make_model()
    companion = attached("increlora", model).companion
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    companion.watch(optimizer)
    layer = companion.layers[0]
    gate, left = layer.lora_B["default"].middle, layer.lora_B["default"].left
    before = left.detach().clone()
    model.loss(make_batch(0)).backward()
    optimizer.step()
    assert gate[:2].all()
    assert gate[2].item() == pytest.approx(1e-5)
    assert not gate[3:].any()
    moved = (left - before).abs().amax(0)
    assert moved[2] > 0
    assert not moved[3:].any()
