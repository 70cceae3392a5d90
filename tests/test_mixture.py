"""Training on several interfaces and domains at once, in parts and in several processes."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eva_rl.batch import Batch, Mixture
from eva_rl.data import MixtureSampler, WindowSampler, domain_weights, pack
from eva_rl.data import windows as windows_module
from eva_rl.errors import UserError
from eva_rl.interface import Interface
from eva_rl.model import DecisionTransformer, Decoder, ModelConfig
from eva_rl.spaces import Part
from eva_rl.training import Hooks, Saves, TrainingConfig, by_domain, train

ARM = Interface("arm", 3, "continuous", 2, (0.5,) * 3, (2.0,) * 3, (0.1,) * 2, (3.0,) * 2, 10.0, 1.0)
GAME = Interface("game", 4, "discrete", 5, (0.0,) * 4, (1.0,) * 4, (), (), 1.0, 1.0)
CELLS, WORDS, DOOR, SCREEN = (
    Part("grid", (3, 4, 4), 6, True),
    Part("tokens", (5,), 9),
    Part("choice", (), 3),
    Part("image", (2, 36, 40)),
)
ROOM = Interface("room", 54, "multi_discrete", 5, (), (), (), (), 2.0, 1.0, parts=(CELLS, WORDS, DOOR), choices=(2, 3))
SIGHT = Interface(
    "sight",
    2 * 36 * 40 + 3,
    "continuous",
    2,
    (1.0,) * 3,
    (2.0,) * 3,
    (0.0,) * 2,
    (1.0,) * 2,
    1.0,
    1.0,
    parts=(SCREEN, Part("vector", (3,))),
)
ALL = [ARM, GAME, ROOM, SIGHT]
CONFIG = TrainingConfig(batch_size=12, learning_rate=1e-2, warmup=0, precision="float32", log_every=1)


def make_model(dropout: float = 0.0, interfaces=ALL) -> DecisionTransformer:
    torch.manual_seed(0)
    return DecisionTransformer(ModelConfig(2, 2, 16, 4, dropout), interfaces)


def observations_of(interface: Interface, generator: torch.Generator, *leading: int) -> torch.Tensor:
    columns = []
    for part in interface.parts:
        shape, limit = (*leading, part.size), 256 if part.kind == "image" else part.values
        random = torch.randint(limit, shape, generator=generator) if limit else torch.randn(shape, generator=generator)
        columns.append(random)
    return torch.cat(columns, -1).to(getattr(torch, interface.observation_dtype))


def make_batch(interface: Interface, count: int = 6, seed: int = 0, steps: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(n, (count, steps), generator=generator) for n in interface.choices]
    actions = torch.stack(columns, -1) if columns else torch.randn(count, steps, 2, generator=generator)
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (count, 1), generator=generator)
    return Batch(
        observations_of(interface, generator, count, steps),
        actions[..., 0] if interface.action_kind == "discrete" else actions,
        torch.randn(count, steps, generator=generator),
        torch.zeros(count, steps),
        mask,
        interface.name,
    )


def mixture(number: int = 0) -> Mixture:
    return Mixture(tuple(make_batch(interface, 3 + i, 10 * number + i) for i, interface in enumerate(ALL)))


def test_a_mixtures_loss_is_the_mean_over_all_its_real_steps():
    model, batch = make_model().eval(), mixture()
    expected = sum(model.loss(part) * part.steps for part in batch.parts) / batch.steps
    torch.testing.assert_close(model.loss(batch), expected)
    assert batch.steps == sum(part.mask.sum() for part in batch.parts)


@pytest.mark.parametrize("interface", ALL, ids=lambda i: i.name)
def test_padding_of_any_kind_of_observation_and_action_changes_nothing(interface):
    model, batch = make_model().eval(), make_batch(interface)
    other = make_batch(interface, seed=1)

    def where_real(own: torch.Tensor, alien: torch.Tensor) -> torch.Tensor:
        return torch.where(batch.mask.view(*batch.mask.shape, *[1] * (own.ndim - 2)), own, alien)

    changed = replace(
        batch,
        observations=where_real(batch.observations, other.observations),
        actions=where_real(batch.actions, other.actions),
    )
    assert not torch.equal(changed.observations, batch.observations)
    torch.testing.assert_close(model.loss(changed), model.loss(batch))


@pytest.mark.parametrize("interface", ALL, ids=lambda i: i.name)
def test_every_part_of_an_observation_reaches_the_action(interface):
    torch.manual_seed(0)
    model, batch, first = make_model().eval(), make_batch(interface), 0
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.3)
    for part in interface.parts:
        observations = batch.observations.clone()
        own = observations[:, 0, first : first + part.size]
        observations[:, 0, first : first + part.size] = (
            (own + 1) % part.values if part.values else 255 - own if part.kind == "image" else own + 1
        )
        first += part.size
        moved = model(replace(batch, observations=observations))[:, 0] - model(batch)[:, 0]
        assert moved.abs().amax(-1).min() > 1e-5, part


@pytest.mark.parametrize("interface", ALL, ids=lambda i: i.name)
def test_any_interface_can_be_fitted(interface, tmp_path):
    model, batch = make_model(interfaces=[interface]), make_batch(interface)
    losses = train(model, lambda number: batch, model.loss, 60, CONFIG, Saves(tmp_path)).losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("interface", [ROOM, SIGHT], ids=lambda i: i.name)
def test_acting_step_by_step_gives_the_whole_models_actions(interface):
    model, batch = make_model(interfaces=[interface]).eval(), make_batch(interface, count=5, steps=14)
    decoder, anchor = Decoder(model, interface.name, 5), 0
    for step in range(14):
        if step - anchor == 4:
            anchor = step - 2  # a full window starts anew with its later half
        if step == 9:  # two episodes end
            batch = batch.share(0, 2)
            decoder.keep(torch.tensor([0, 2, 4]))
        count = len(batch.mask)
        found = decoder.act(batch.observations[:, step], batch.returns_to_go[:, step])
        window = batch._mapped(lambda value, first=anchor: value[:, first : first + 4])
        expected = model.act(window, torch.full((count,), step - anchor))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.shape == (count, *interface.action_shape)
        decoder.record(batch.actions[:, step], batch.rewards[:, step])


@given(count=st.integers(1, 7), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_shares_make_up_the_whole_and_are_of_equal_size(count, sizes):
    whole = Mixture(tuple(make_batch(ARM, size, seed) for seed, size in enumerate(sizes)))
    shares = [whole.share(index, count) for index in range(count)]
    lengths = [sum(len(part.mask) for part in share.parts) for share in shares]
    assert sum(lengths) == sum(sizes)
    assert max(lengths) - min(lengths) <= 1
    rows = sorted(tuple(row.tolist()) for part in whole.parts for row in part.returns_to_go)
    assert rows == sorted(tuple(row.tolist()) for s in shares for part in s.parts for row in part.returns_to_go)


def test_in_parts_a_batch_gives_the_losses_and_weights_of_the_whole(tmp_path):
    found = {}
    for parts in (1, 3, 5):
        model = make_model()
        result = train(model, mixture, model.loss, 5, replace(CONFIG, accumulate=parts), Saves(tmp_path / str(parts)))
        found[parts] = result.losses, dict(model.named_parameters())
    for parts in (3, 5):
        np.testing.assert_allclose(found[parts][0], found[1][0], rtol=1e-4)
        for name, p in found[1][1].items():
            torch.testing.assert_close(found[parts][1][name], p, rtol=0, atol=1e-3, msg=name)


def test_more_parts_than_windows_are_refused(tmp_path):
    model = make_model()
    with pytest.raises(UserError, match=r"training\.batch_size must be at least 13, got 12"):
        train(model, mixture, model.loss, 1, replace(CONFIG, accumulate=13), Saves(tmp_path))


def test_each_domains_loss_and_share_of_the_gradient_are_told_apart():
    model, batch = make_model().eval(), mixture()
    domains = {"arm": "robots", "sight": "robots", "game": "games", "room": "games"}
    scalars = by_domain(domains, model.loss, list(model.trunk.parameters()))(batch)
    lengths = {}
    for domain in ("robots", "games"):
        own = Mixture(tuple(part for part in batch.parts if domains[part.interface] == domain))
        assert scalars[f"loss/{domain}"] == pytest.approx(model.loss(own).item())
        model.zero_grad()
        (model.losses(own)[own.parts[0].interface] + model.losses(own)[own.parts[1].interface]).backward()
        lengths[domain] = torch.cat([p.grad.flatten() for p in model.trunk.parameters()]).norm().item()
    for domain, length in lengths.items():
        assert scalars[f"gradient_share/{domain}"] == pytest.approx(length / sum(lengths.values()), rel=1e-4)


def test_looking_closer_does_not_move_the_training(tmp_path):
    losses = []
    for look in (False, True):
        model, seen = make_model(dropout=0.3), []
        inspect = by_domain({i.name: i.name for i in ALL}, model.loss, list(model.trunk.parameters()))
        hooks = Hooks(lambda step, scalars, seen=seen: seen.append(scalars), inspect=inspect) if look else Hooks()
        saves = Saves(tmp_path / str(look))
        losses.append(train(model, mixture, model.loss, 12, CONFIG, saves, hooks=hooks).losses)
    assert losses[0] == losses[1]
    assert sum("gradient_share/arm" in scalars for scalars in seen) == 2


def trajectories(length: int, value: float):
    box = gym.spaces.Box(-np.inf, np.inf, (2,))
    episode = {
        "observations": np.full((length, 2), value),
        "actions": np.zeros((length, 2)),
        "rewards": np.arange(length) + 100 * value,
    }
    return pack(f"task-{value}", [episode], box, box)


def test_windows_of_tasks_that_stay_apart_are_those_of_joined_ones(monkeypatch):
    tasks = [trajectories(length, value) for length, value in ((5, 1.0), (9, 2.0), (3, 3.0))]
    joined = WindowSampler(tasks, "arm", 4, 16, 0)
    monkeypatch.setattr(windows_module, "JOINED", 0)
    apart = WindowSampler(tasks, "arm", 4, 16, 0)
    assert len(apart.observations) == 3
    for number in range(5):
        for name, value in vars(joined.batch(number)).items():
            found = getattr(apart.batch(number), name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def test_a_mixtures_shares_hold_on_average_and_in_every_batch_nearly():
    weights = [0.5, 0.3, 0.15, 0.05]
    samplers = [WindowSampler([trajectories(9, float(i))], f"i{i}", 4, 10, 0) for i in range(4)]
    sampler, counts = MixtureSampler(samplers, weights, 10, 0), np.zeros(4)
    for number in range(2000):
        batch = sampler.batch(number)
        own = np.zeros(4)
        for part in batch.parts:
            own[int(part.interface[1])] = len(part.mask)
        assert own.sum() == 10
        assert (np.abs(own - 10 * np.array(weights)) < 1).all()
        counts += own
    np.testing.assert_allclose(counts / counts.sum(), weights, atol=0.004)


def test_a_mixtures_batch_is_a_pure_function_of_seed_and_number():
    samplers = [WindowSampler([trajectories(9, float(i))], f"i{i}", 4, 10, 0) for i in range(2)]
    first, again, other = (MixtureSampler(samplers, [1, 1], 10, seed).batch(3) for seed in (0, 0, 1))
    rewards = [torch.cat([part.rewards for part in batch.parts]) for batch in (first, again, other)]
    assert torch.equal(rewards[0], rewards[1])
    assert not torch.equal(rewards[0], rewards[2])


def test_temperature_evens_the_domains_out_and_weights_favour_them():
    sizes = {"large": 1_000_000, "small": 1_000}
    assert domain_weights(sizes)["large"] == pytest.approx(1000 / 1001)
    assert domain_weights(sizes, temperature=3)["large"] == pytest.approx(10 / 11)
    assert domain_weights(sizes, {"small": 10.0}, 3)["large"] == pytest.approx(0.5)
    assert domain_weights(sizes, temperature=np.inf)["large"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("weights", "temperature", "says"),
    [
        ({"larg": 1.0}, 1.0, "names 'larg', .* Did you mean 'large'"),
        ({"large": 0.0}, 1.0, "weights.large must be .* got 0.0"),
        ({"large": np.nan}, 1.0, "weights.large must be .* got nan"),
        ({}, 0.0, "temperature must be .* got 0.0"),
        ({}, np.nan, "temperature must be .* got nan"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(weights, temperature, says):
    with pytest.raises(UserError, match=says):
        domain_weights({"large": 10, "small": 1}, weights, temperature)


PRETRAIN = [
    "-m",
    "eva_rl.pretrain",
    "task=[gym/CartPole-v1,gym/Pendulum-v1]",
    "model=tiny",
    "model.dropout=0",
    "demonstrations=2",
    "steps=6",
    "device=cpu",
    "training.batch_size=9",
    "training.log_every=1",
    "training.precision=float32",
]


@pytest.mark.slow
def test_two_processes_train_as_one_does(datasets_root, tmp_path):
    def start(*launcher: str, folder: str) -> dict[int, float]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(datasets_root)}
        command = [sys.executable, *launcher, *PRETRAIN, f"run_dir={folder}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        return {event.step: event.value for event in events.Scalars("train/loss")}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = start(folder="one")
    two = start("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", folder="two")
    assert list(one) == list(two) == list(range(1, 7))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    weights = [load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4, msg=name)
    assert len(list(Path(tmp_path / "two").glob("events*"))) == 1
