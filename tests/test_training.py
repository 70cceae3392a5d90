"""The training loop: same losses after an interruption, schedule, checkpoints, and what it refuses."""

import json
import math
import os
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_rl.batch import Batch
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model import DecisionTransformer, ModelConfig
from eva_rl.training import (
    Hooks,
    Processes,
    Rules,
    Saves,
    TrainingConfig,
    autocast,
    check_run,
    choose_device,
    learning_rate_at,
    train,
)
from eva_rl.training import checkpoint as checkpoint_module
from eva_rl.training import precision as precision_module

ARM = Interface("arm", 3, "continuous", 2, (0.0,) * 3, (1.0,) * 3, (0.0,) * 2, (1.0,) * 2, 1.0, 1.0)
GAME = Interface("game", 4, "discrete", 5, (0.0,) * 4, (1.0,) * 4, (), (), 1.0, 1.0)
CONFIG = TrainingConfig(
    batch_size=8, learning_rate=1e-2, warmup=2, precision="float32", checkpoint_every=4, log_every=3
)
STEPS = 12


def make_model(seed: int = 0, width: int = 16) -> DecisionTransformer:
    torch.manual_seed(seed)
    return DecisionTransformer(ModelConfig(layers=1, heads=2, width=width, context=4, dropout=0.3), [ARM])


def batches(number: int) -> Batch:
    """Batch `number`: the actions are the first two observations, so there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + number)
    observations = torch.randn(8, 4, 3, generator=generator)
    return Batch(
        observations=observations,
        actions=observations[..., :2].clone(),
        returns_to_go=torch.randn(8, 4, generator=generator),
        rewards=torch.zeros(8, 4),
        mask=torch.ones(8, 4, dtype=torch.bool),
        interface="arm",
    )


def interrupted_at(step: int):
    """`batches` until `step`, then what Ctrl-C does."""

    def read(number: int) -> Batch:
        if number == step:
            raise KeyboardInterrupt
        return batches(number)

    return read


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run(
    folder: Path,
    config: TrainingConfig = CONFIG,
    steps: int = STEPS,
    read=batches,
    seed: int = 0,
    hooks: Hooks | None = None,
    **saved,
):
    """Train a fresh model, as a new process would; its losses and weights."""
    model = make_model(seed)
    result = train(model, read, model.loss, steps, config, Saves(folder, **saved), hooks=hooks or Hooks())
    return result.losses, weights_of(model)


def fill(folder: Path, config: TrainingConfig = CONFIG, at: int = STEPS) -> None:
    """Leave the checkpoints of a run that was interrupted at step `at`."""
    if at >= STEPS:
        run(folder, config)
        return
    with pytest.raises(KeyboardInterrupt):
        run(folder, config, read=interrupted_at(at))


# --- resume


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [2, 4, 7, 11])
def test_an_interrupted_run_resumes_to_the_same_losses_and_weights_bit_for_bit(tmp_path, step, precision):
    config = replace(CONFIG, precision=precision)
    losses, weights = run(tmp_path / "whole", config)
    fill(tmp_path / "broken", config, at=step)
    saved_steps = step // config.checkpoint_every * config.checkpoint_every
    # The weights and random state must come from the checkpoint, so the new process starts with others where it can.
    resumed_losses, resumed_weights = run(tmp_path / "broken", config, seed=5 if saved_steps else 0, resume=True)
    assert resumed_losses == losses
    assert same(resumed_weights, weights)


def test_a_run_interrupted_twice_resumes_to_the_same_losses(tmp_path):
    losses, weights = run(tmp_path / "whole")
    fill(tmp_path / "broken", at=5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", read=interrupted_at(9), resume=True)
    assert (tmp_path / "broken" / "step-00000008.safetensors").is_file()
    resumed_losses, resumed_weights = run(tmp_path / "broken", seed=5, resume=True)
    assert resumed_losses == losses
    assert same(resumed_weights, weights)


def test_a_run_that_evaluates_with_random_numbers_resumes_to_the_same_losses(tmp_path):
    config = replace(CONFIG, evaluate_every=4)

    def evaluate(step: int) -> dict[str, float]:
        return {"evaluate/noise": torch.rand(()).item()}

    losses, _ = run(tmp_path / "whole", config, hooks=Hooks(evaluate=evaluate))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", config, read=interrupted_at(6), hooks=Hooks(evaluate=evaluate))
    assert run(tmp_path / "broken", config, resume=True, hooks=Hooks(evaluate=evaluate))[0] == losses


def test_resuming_a_finished_run_gives_its_result_and_makes_no_step(tmp_path):
    losses, weights = run(tmp_path)
    again, restored = run(tmp_path, read=interrupted_at(STEPS), seed=5, resume=True)
    assert again == losses
    assert same(restored, weights)


def test_resuming_where_there_is_nothing_starts_afresh(tmp_path):
    assert run(tmp_path / "a", resume=True)[0] == run(tmp_path / "b")[0]


def test_parameters_that_no_batch_reaches_survive_a_resume(tmp_path):
    def two_interfaces() -> DecisionTransformer:
        model = make_model()
        model.add_interface(GAME)
        return model

    whole, first, second = two_interfaces(), two_interfaces(), two_interfaces()
    torch.manual_seed(1)
    losses = train(whole, batches, whole.loss, STEPS, CONFIG, Saves(tmp_path / "whole")).losses
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(first, interrupted_at(6), first.loss, STEPS, CONFIG, Saves(tmp_path / "broken"))
    resumed = train(second, batches, second.loss, STEPS, CONFIG, Saves(tmp_path / "broken", resume=True))
    assert resumed.losses == losses
    assert same(weights_of(second), weights_of(whole))


@pytest.mark.parametrize(
    "changed",
    [{"learning_rate": 2e-2}, {"batch_size": 4}, {"warmup": 3}, {"weight_decay": 0.0}, {"precision": "bfloat16"}],
    ids=str,
)
def test_resuming_with_other_settings_is_refused_and_names_them(tmp_path, changed):
    fill(tmp_path, at=6)
    with pytest.raises(UserError, match=next(iter(changed))) as error:
        run(tmp_path, replace(CONFIG, **changed), resume=True)
    assert "\n" not in str(error.value)


def test_resuming_with_another_number_of_steps_is_refused(tmp_path):
    fill(tmp_path, at=6)
    with pytest.raises(UserError, match="steps=12"):
        run(tmp_path, steps=20, resume=True)


def test_resuming_another_model_is_refused(tmp_path):
    fill(tmp_path, at=6)
    model = make_model(width=32)
    with pytest.raises(UserError, match="another model"):
        train(model, batches, model.loss, STEPS, CONFIG, Saves(tmp_path, resume=True))


@pytest.mark.parametrize("change", ["rename", "number", "kind", "seconds", "identity", "checksum"])
def test_a_checkpoint_that_is_not_what_its_checksum_was_made_of_is_passed_over(tmp_path, change):
    losses, weights = run(tmp_path / "whole")
    fill(tmp_path / "run", at=9)
    path = tmp_path / "run" / "step-00000008.safetensors"
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  not a dict
    name = next(name for name in tensors if name.endswith("exp_avg"))
    if change == "rename":
        tensors[name + "x"] = tensors.pop(name)
    elif change == "number":
        tensors[name].view(-1)[0] += 1
    elif change == "kind":
        tensors[name] = tensors[name].double()
    elif change == "checksum":
        about["sha257"] = about.pop("sha256")
    else:
        about[change] = json.dumps({"seed": 7}) if change == "identity" else "1e9"
    save_file(tensors, path, about)
    with pytest.warns(UserWarning, match=r"step-00000008\.safetensors.*damaged"):
        resumed_losses, resumed_weights = run(tmp_path / "run", resume=True)
    assert resumed_losses == losses
    assert same(resumed_weights, weights)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, size):
    losses, weights = run(tmp_path / "whole")
    fill(tmp_path / "broken", at=9)
    os.truncate(tmp_path / "broken" / "step-00000008.safetensors", size)
    read_from = []

    def read(number: int) -> Batch:
        read_from.append(number)
        return batches(number)

    with pytest.warns(UserWarning, match=r"step-00000008\.safetensors.*damaged"):
        resumed_losses, resumed_weights = run(tmp_path / "broken", read=read, seed=5, resume=True)
    assert read_from[0] == 4
    assert resumed_losses == losses
    assert same(resumed_weights, weights)


def test_a_whole_checkpoint_gives_no_warning(tmp_path):
    fill(tmp_path, at=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, resume=True)


# --- checkpoints


def test_checkpoints_of_an_earlier_run_are_not_overwritten_without_resume(tmp_path):
    fill(tmp_path, at=6)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("step-*")}
    with pytest.raises(UserError, match="resume=true"):
        run(tmp_path)
    with pytest.raises(UserError, match="resume=true"):
        check_run(1, tmp_path, resume=False)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("step-*")} == before
    check_run(1, tmp_path, resume=True)
    check_run(1, tmp_path / "absent", resume=False)


def test_checkpoints_are_safetensors_and_only_the_newest_two_are_kept(tmp_path):
    fill(tmp_path / "checkpoints")
    files = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert files == {"step-00000008.safetensors", "step-00000012.safetensors"}
    for name in files:
        with safe_open(tmp_path / "checkpoints" / name, "pt") as file:
            assert len(file.get_tensor("losses")) == int(name[5:13])


def test_the_last_step_is_saved_whatever_the_interval(tmp_path):
    losses, weights = run(tmp_path, replace(CONFIG, checkpoint_every=5), steps=7)
    again, restored = run(tmp_path, replace(CONFIG, checkpoint_every=5), steps=7, seed=5, resume=True)
    assert again == losses
    assert same(restored, weights)


def test_a_checkpoint_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="can't be written"):
        run(tmp_path / "file" / "checkpoints")


# --- steps


def test_losses_fall_and_every_step_has_one(tmp_path):
    losses, _ = run(tmp_path, steps=60)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_same_seed_gives_the_same_losses_and_another_gives_others(tmp_path):
    assert run(tmp_path / "a")[0] == run(tmp_path / "b")[0] != run(tmp_path / "c", seed=1)[0]


def test_the_time_of_training_is_without_that_of_the_evaluations(tmp_path):
    def evaluate(step: int) -> dict[str, float]:
        time.sleep(0.5)
        return {}

    model, started = make_model(), time.perf_counter()
    result = train(
        model,
        batches,
        model.loss,
        STEPS,
        replace(CONFIG, evaluate_every=4),
        Saves(tmp_path),
        hooks=Hooks(evaluate=evaluate),
    )
    assert result.seconds < time.perf_counter() - started - 0.9
    with safe_open(sorted(tmp_path.glob("step-*"))[-1], "pt") as file:
        assert float(file.metadata()["seconds"]) <= result.seconds


def test_zero_steps_change_nothing_and_write_nothing(tmp_path):
    model = make_model()
    before = weights_of(model)
    result = train(model, batches, model.loss, 0, CONFIG, Saves(tmp_path / "checkpoints"))
    assert result.losses == []
    assert result.seconds == 0
    assert same(weights_of(model), before)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("steps", [0, 3])
def test_the_model_is_left_in_evaluation_mode(tmp_path, steps):
    model = make_model()
    train(model, batches, model.loss, steps, CONFIG, Saves(tmp_path))
    assert not any(module.training for module in model.modules())


def test_negative_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match="steps must be at least 0, got -1"):
        run(tmp_path, steps=-1)


def test_only_parameters_that_require_gradients_move_and_are_saved(tmp_path):
    model = make_model()
    model.requires_grad_(False)
    model.trunk.blocks[0].attention.requires_grad_(True)
    before = weights_of(model)
    train(model, batches, model.loss, STEPS, CONFIG, Saves(tmp_path))
    attention = {name for name in before if name.startswith("trunk.blocks.0.attention.")}
    assert {name for name, p in weights_of(model).items() if not torch.equal(p, before[name])} == attention
    with safe_open(tmp_path / "step-00000012.safetensors", "pt") as file:
        names = list(file.keys())
        saved = {name.removeprefix("parameter.") for name in names if name.startswith("parameter.")}
    assert saved == attention


def test_a_model_without_trainable_parameters_is_left_alone(tmp_path):
    model = make_model().requires_grad_(False)
    before = weights_of(model)
    assert train(model, batches, model.loss, STEPS, CONFIG, Saves(tmp_path)).losses == []
    assert same(weights_of(model), before)


def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms_alone(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    nn.init.ones_(model[0].bias)
    before = weights_of(model)
    config = replace(CONFIG, learning_rate=0.1, warmup=0, weight_decay=0.5)
    train(model, batches, lambda batch: sum((0 * p).sum() for p in model.parameters()), 1, config, Saves(tmp_path))
    after = weights_of(model)
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_keeps_the_earlier_checkpoint(tmp_path, value):
    model = make_model()

    def loss(batch: Batch) -> Tensor:
        loss.calls += 1
        return model.loss(batch) * (value if loss.calls == 7 else 1.0)

    loss.calls = 0
    with pytest.raises(UserError, match=r"step 6.*learning_rate") as error:
        train(model, batches, loss, STEPS, CONFIG, Saves(tmp_path))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000004.safetensors"]
    assert run(tmp_path, seed=5, resume=True)[0] == run(tmp_path / "whole")[0]


def test_gradients_that_are_not_finite_are_refused_before_they_spoil_the_weights(tmp_path):
    model = make_model()

    def loss(batch: Batch) -> Tensor:  # finite, but the slope of the root at 0 is infinite
        loss.calls += 1
        value = model.loss(batch)
        return value + (0.0 * value).sqrt() if loss.calls == STEPS else value

    loss.calls = 0
    with pytest.raises(UserError):
        train(model, batches, loss, STEPS, CONFIG, Saves(tmp_path))
    assert all(p.isfinite().all() for p in model.parameters())


# --- schedule, log, evaluation


def test_the_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine():
    config = TrainingConfig(learning_rate=1.0, final_learning_rate=0.2, warmup=10)
    rates = [learning_rate_at(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way: cos 45 degrees
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_first_step_has_the_full_learning_rate():
    assert learning_rate_at(0, 10, TrainingConfig(learning_rate=3e-3, warmup=0)) == 3e-3


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_a_warm_up_longer_than_the_run_never_exceeds_the_learning_rate(steps):
    config = TrainingConfig(learning_rate=1.0, warmup=10)
    assert all(0 < learning_rate_at(step, steps, config) <= 1.0 for step in range(steps))


def test_the_optimiser_moves_by_the_scheduled_learning_rate(tmp_path):
    model, positions = nn.Linear(1, 1, bias=False), []  # Adam's step is the learning rate under a constant gradient
    config = replace(CONFIG, learning_rate=0.5, warmup=2, weight_decay=0.0, gradient_clip=1e9)

    def loss(batch: Batch) -> Tensor:
        positions.append(model.weight.item())
        return model.weight.sum()

    train(model, batches, loss, 6, config, Saves(tmp_path))
    moved = [a - b for a, b in zip(positions, [*positions[1:], model.weight.item()], strict=True)]
    assert moved == pytest.approx([learning_rate_at(step, 6, config) for step in range(6)], abs=1e-5)


def test_the_log_receives_the_mean_loss_since_the_last_line(tmp_path):
    logged = {}
    losses, _ = run(tmp_path, steps=7, hooks=Hooks(lambda step, scalars: logged.update({step: dict(scalars)})))
    assert list(logged) == [3, 6, 7]
    assert logged[3]["train/loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert logged[6]["train/loss"] == pytest.approx(sum(losses[3:6]) / 3)
    assert logged[6]["train/learning_rate"] == pytest.approx(learning_rate_at(5, 7, CONFIG))
    assert logged[6]["train/gradient_norm"] > 0


@pytest.mark.parametrize(("every", "expected"), [(0, []), (3, [3, 6, 9]), (4, [4, 8]), (6, [6]), (12, []), (100, [])])
def test_evaluation_is_called_in_evaluation_mode_every_so_many_steps_before_the_last(tmp_path, every, expected):
    model, calls, logged = make_model(), [], {}

    def evaluate(step: int) -> dict[str, float]:
        calls.append((step, any(module.training for module in model.modules())))
        return {"success_rate": 0.5}

    def loss(batch: Batch) -> Tensor:
        assert all(module.training for module in model.modules())
        return model.loss(batch)

    config = replace(CONFIG, evaluate_every=every)
    result = train(
        model,
        batches,
        loss,
        STEPS,
        config,
        Saves(tmp_path / "a"),
        hooks=Hooks(lambda step, scalars: logged.setdefault(step, {}).update(scalars), evaluate),
    )
    assert calls == [(step, False) for step in expected]
    assert [step for step, scalars in logged.items() if "success_rate" in scalars] == expected
    assert result.losses == run(tmp_path / "b")[0]


# --- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"warmup": -1},
        {"checkpoint_every": 0},
        {"evaluate_every": -1},
        {"log_every": 0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.nan},
        {"final_learning_rate": -1.0},
        {"weight_decay": -0.1},
        {"gradient_clip": -1.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"training.{next(iter(wrong))} must be "):
        TrainingConfig(**asdict(CONFIG) | wrong)


# --- device and arithmetic


@pytest.mark.parametrize("name", ["tpu", "", "gpu", "cuda:-1", "meta", "cpu cuda"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UserError, match="cpu, cuda or auto"):
        choose_device(name)


def test_an_absent_cuda_device_is_refused():
    with pytest.raises(UserError, match="cuda:99"):
        choose_device("cuda:99")


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(expected)


def product_type() -> torch.dtype:
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("precision", "hardware", "expected"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_auto_precision_takes_bfloat16_where_the_hardware_has_it(monkeypatch, precision, hardware, expected):
    monkeypatch.setattr(precision_module, "_has_bfloat16", lambda device: hardware)
    with autocast(precision, torch.device("cpu")):
        assert product_type() == expected
    assert product_type() == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx2": True}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_processor_has_bfloat16_when_it_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision_module._has_bfloat16(torch.device("cpu")) is expected


@pytest.mark.parametrize("name", ["float16", "bf16", ""])
def test_an_unknown_precision_is_refused(name):
    with pytest.raises(UserError, match="auto, float32 or bfloat16"):
        autocast(name, torch.device("cpu"))


def test_a_module_with_a_rate_of_its_own_learns_at_that_and_at_no_multiple_of_the_others(tmp_path):
    model = nn.ModuleDict({"fresh": nn.Linear(1, 1, bias=False), "lora_B": nn.Linear(1, 1, bias=False)})
    positions = {name: [] for name in model}  # Adam's step is the learning rate under a constant gradient
    config = replace(CONFIG, learning_rate=0.5, final_learning_rate=0.25, warmup=2, weight_decay=0.0, gradient_clip=1e9)

    def loss(batch: Batch) -> Tensor:
        for name, module in model.items():
            positions[name].append(module.weight.item())
        return sum(module.weight.sum() for module in model.values())

    train(
        model,
        batches,
        loss,
        6,
        config,
        Saves(tmp_path),
        Rules(ratios={"lora_B": 4.0, "fresh": 4.0}, rates={"fresh": 0.125}),
    )
    for name, rate in (("fresh", 0.125), ("lora_B", 2.0)):
        moved = [a - b for a, b in zip(positions[name], positions[name][1:], strict=False)]
        own = replace(config, learning_rate=rate, final_learning_rate=rate / 2)
        expected = [learning_rate_at(step, 6, own) for step in range(5)]
        assert moved == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("clip", "moves"), [(1e-12, False), (1e-3, True)])
def test_gradients_are_clipped(tmp_path, clip, moves):
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    # Adam's step does not depend on the gradient's length, unless that is far below its epsilon of 1e-8.
    config = replace(CONFIG, learning_rate=0.5, warmup=0, weight_decay=0.0, gradient_clip=clip)
    train(model, batches, lambda batch: model.weight.sum(), 6, config, Saves(tmp_path))
    assert (abs(model.weight.item() - before) > 0.1) == moves
    if not moves:
        assert abs(model.weight.item() - before) < 1e-3


class Pull:
    """A companion whose penalty is the weight itself."""

    def __init__(self, model: nn.Linear):
        self.model, self.steps = model, []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def penalty(self) -> Tensor:
        return self.model.weight.sum()

    def after_step(self, step: int) -> None:
        self.steps.append(step)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


def test_a_companions_penalty_is_learned_from_and_no_part_of_the_losses(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    before, companion = model.weight.item(), Pull(model)
    config = replace(CONFIG, learning_rate=0.1, warmup=0, weight_decay=0.0)
    found = train(
        model, batches, lambda batch: 0 * model.weight.sum(), 3, config, Saves(tmp_path), Rules(companion=companion)
    )
    assert found.losses == [0.0] * 3
    assert companion.steps == [1, 2, 3]
    assert companion.optimizer.param_groups[0]["params"] == [model.weight]
    assert model.weight.item() < before - 0.05


def test_a_parameter_without_a_gradient_in_any_process_keeps_none(monkeypatch):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    others = torch.tensor([10.0, 20.0, 30.0, 40.0, 0.0, 0.0, 1.0, 1.0, 0.0, 5.0])  # gradients, which are there, loss
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(others))
    loss = Processes(0, 2).sum_gradients(parameters, torch.tensor(2.0))
    assert loss.item() == 7.0
    assert parameters[0].grad.tolist() == [11.0, 22.0]
    assert parameters[1].grad.tolist() == [30.0, 40.0]  # the other process has one
    assert parameters[2].grad is None


def test_the_random_state_that_is_saved_is_that_of_the_models_device_and_not_of_the_current_one(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(checkpoint_module, "_cuda_device", lambda parameters: torch.device("cuda:1"))
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.zeros(3, dtype=torch.uint8)
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append((device, state.tolist())))
    run(tmp_path, steps=4)
    run(tmp_path, steps=4, resume=True)
    assert asked == [torch.device("cuda:1"), (torch.device("cuda:1"), [0, 0, 0])]


@pytest.mark.parametrize(("device", "found"), [("cuda:1", "cuda:1"), ("cpu", "None")])
def test_the_device_is_that_of_the_parameters(device, found):
    assert str(checkpoint_module._cuda_device({"weight": SimpleNamespace(device=torch.device(device))})) == found
