"""What starts from nothing: cloning by a perceptron, and the base's transformer with fresh weights."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from test_entry_points import QUICK, TASK, result_of, sentence
from test_mixture import ALL, make_batch

from eva_rl.baselines import untrained
from eva_rl.data import load_dataset
from eva_rl.model import CloningConfig, CloningMLP, DecisionTransformer, ModelConfig, load_base, policy_of, save_base
from eva_rl.training import Saves, TrainingConfig, train


@pytest.mark.parametrize("interface", ALL, ids=lambda i: i.name)
def test_cloning_learns_every_kind_of_observation_and_action(interface, tmp_path):
    torch.manual_seed(0)
    model = CloningMLP(CloningConfig(width=64, dropout=0.0, bounded=False), interface)
    batch = make_batch(interface, steps=1)
    before = model.loss(batch).item()
    config = TrainingConfig(batch_size=6, learning_rate=3e-3, warmup=0, precision="float32")
    result = train(model, lambda number: batch, model.loss, 200, config, Saves(tmp_path))
    assert result.losses[-1] < before / 5


def test_the_policy_acts_as_the_network_predicts_whoever_is_beside_it(make_dataset):
    make_dataset()
    trajectories = load_dataset("dummy/random-v0", "dummy")
    model = untrained("mlp", ModelConfig(), "dummy", trajectories).eval()
    observations = trajectories.observations[:5]
    policy = policy_of(model, "dummy")(5)
    together = policy.act(observations, torch.zeros(5))
    assert together.shape == (5, 2)
    for row in range(5):
        alone = policy_of(model, "dummy")(1).act(observations[row : row + 1], torch.zeros(1))
        assert torch.equal(alone[0], together[row])
    low, high = (torch.tensor(bound) for bound in (trajectories.action_space.low, trajectories.action_space.high))
    assert ((together >= low) & (together <= high)).all()


def test_actions_without_bounds_are_not_squashed(make_dataset):
    make_dataset(action_space=gym.spaces.Box(-float("inf"), float("inf"), (2,)))
    trajectories = load_dataset("dummy/random-v0", "dummy")
    assert not untrained("mlp", ModelConfig(), "dummy", trajectories).config.bounded
    make_dataset("dummy/bounded-v0")
    assert untrained("mlp", ModelConfig(), "dummy", load_dataset("dummy/bounded-v0", "dummy")).config.bounded


def test_actions_that_use_little_of_their_bounds_can_all_be_predicted(make_dataset):
    make_dataset(action_space=gym.spaces.Box(-1000.0, 1000.0, (2,)))
    trajectories = load_dataset("dummy/random-v0", "dummy")
    trajectories = replace(trajectories, actions=trajectories.actions / 1000)
    with pytest.warns(UserWarning, match="bounds"):
        model = untrained("mlp", ModelConfig(), "dummy", trajectories)
    assert not model.config.bounded


def test_a_fresh_network_owes_nothing_to_the_base_but_its_shape(make_dataset):
    make_dataset()
    like = ModelConfig(2, 2, 16, 4)
    model = untrained("fresh", like, "dummy", load_dataset("dummy/random-v0", "dummy"))
    assert isinstance(model, DecisionTransformer)
    assert (model.config.layers, model.config.width, model.config.context) == (2, 16, 4)
    assert list(model.interfaces) == ["dummy"]


def test_a_cloned_network_is_a_checkpoint_that_acts_the_same(make_dataset, tmp_path):
    make_dataset()
    model = untrained("mlp", ModelConfig(), "dummy", load_dataset("dummy/random-v0", "dummy")).eval()
    save_base(tmp_path / "model", model, {})
    again = load_base(str(tmp_path / "model")).model
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("adapter", ["bc", "scratch"])
def test_what_starts_from_nothing_stands_beside_the_adapters(run, base, adapter):
    status, out, err = run("finetune", f"task={TASK}", f"adapter={adapter}", f"base={base}", "run_dir=run", *QUICK)
    assert status == 0, err
    result = result_of(Path("run"))
    assert result["success_rate"]["n"] == 3
    assert result["zero_shot"]["episode_return"] is None  # an untrained network has no score worth its rollouts
    assert result["trainable_parameters"] == result["total_parameters"] > 0
    assert f"{adapter} from scratch" in out
    status, _, err = run("evaluate", "checkpoint=run/model", f"task={TASK}", "episodes=3", "workers=0", "run_dir=again")
    assert status == 0, err
    again = result_of(Path("again"))["tasks"][TASK]
    assert again["episode_return"]["mean"] == pytest.approx(result["episode_return"]["mean"])
    assert list(load_base("run/model").tasks) == [TASK]


def test_a_method_has_steps_and_batches_of_its_own_unless_the_run_says(run, base):
    wanted = [f"task={TASK}", "adapter=bc", f"base={base}", "episodes=0"]
    status, _, err = run("finetune", *wanted, "run_dir=own", "adapter.steps=3", "adapter.batch_size=5")
    assert status == 0, err
    assert run("finetune", *wanted, "run_dir=given", "steps=2", "training.batch_size=4")[0] == 0
    for folder, steps, batch_size in (("own", 3, 5), ("given", 2, 4)):
        result = result_of(Path(folder))
        assert result["steps"] == steps
        assert result["settings"]["steps"] == steps
        assert result["settings"]["training"]["batch_size"] == batch_size


@pytest.mark.parametrize("dataset", ["Discrete"])
def test_discrete_actions_are_cloned_too(run, base, make_dataset, dataset):
    make_dataset("mine/choices-v0", dataset)
    arguments = ["task=minari/mine/choices-v0", "adapter=bc", f"base={base}", "run_dir=run", *QUICK]
    status, _, err = run("finetune", *arguments)
    assert status == 0, err
    assert json.loads(Path("run/result.json").read_text())["status"] == "complete"


def test_an_adapter_on_a_network_that_is_not_the_base_is_refused(run, base):
    status, _, err = run("finetune", f"task={TASK}", "adapter=lora", "adapter.network=mlp", f"base={base}")
    assert status == 1
    assert "got adapter.network=mlp with adapter.trainable=adapter" in sentence(err)
    assert not Path("runs").exists()


def test_a_cloned_network_is_no_base(run, base):
    assert run("finetune", f"task={TASK}", "adapter=bc", f"base={base}", "run_dir=run", *QUICK)[0] == 0
    status, _, err = run("finetune", f"task={TASK}", "adapter=lora", "base=run/model", "run_dir=next")
    assert status == 1
    assert "got run/model, a network cloned from scratch" in sentence(err)
    assert not Path("next/result.json").exists()
