"""A domain is one file: one that appears in the folder of domains is collected, trained on, adapted to and evaluated in."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import InlineExecutor

from eva_rl import envs
from eva_rl.data import collection, load_dataset

DOMAIN = '''
import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from eva_rl.envs.domain import Domain


class Toys(Domain):
    """Press the button that the screen shows, as hard as the gauge says."""

    name = "toys"
    extra = "toys"
    tasks = ("Easy", "Hard", "Flat")
    splits = {"train": ("Easy", "Flat"), "heldout": ("Hard",)}

    def make(self, name, render_mode=None):
        entry, steps = ("toys_domain:Flat", 4) if name == "Flat" else ("toys_domain:Toy", 6)
        return gym.make(EnvSpec(id=f"toys/{name}", entry_point=entry, max_episode_steps=steps, disable_env_checker=True))

    def interface(self, name):
        return "toys_flat" if name == "Flat" else "toys"

    def expert(self, name, env):
        toy = env.unwrapped
        return lambda observation: toy.answer

DOMAIN = Toys()


class Toy(gym.Env):
    observation_space = Dict(
        {
            "screen": Box(0, 255, (32, 32), np.uint8),
            "cells": Box(0, 3, (3, 3, 2), np.uint8),
            "words": Box(0, 9, (4,), np.int64),
            "gauge": Box(-1, 1, (2,)),
            "lamp": Discrete(3, start=1),
        }
    )
    action_space = MultiDiscrete([4, 3], start=[0, 1])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation(), {"success": 0.0}

    def observation(self):
        seen = self.observation_space.sample()
        self.answer = np.array([seen["cells"][0, 0, 0], seen["lamp"]])
        return seen

    def step(self, action):
        right = bool((np.asarray(action) == self.answer).all())
        return self.observation(), float(right), False, False, {"success": float(right)}


class Flat(gym.Env):
    """Says nothing about success."""

    observation_space, action_space = Box(-1, 1, (2,)), Box(-1, 1, (1,))
    answer = np.array([0.5], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, False, False, {}
'''
QUICK = ["training.batch_size=4", "training.warmup=1"]


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """The domain's file in a folder of its own, which joins the folder of domains."""
    folder = tmp_path / "domains"
    folder.mkdir()
    (folder / "toys_domain.py").write_text(DOMAIN)
    monkeypatch.setattr(envs, "__path__", [*envs.__path__, str(folder)])
    monkeypatch.syspath_prepend(str(folder))  # its environments are made by name
    monkeypatch.setattr(collection, "ProcessPoolExecutor", InlineExecutor)
    envs.domains.cache_clear()
    collection._environment.cache_clear()
    yield
    envs.domains.cache_clear()
    collection._environment.cache_clear()


def test_a_domain_in_a_file_of_its_own_goes_all_the_way(toys, run):
    status, out, err = run("tasks", "domain=toys")
    assert "toys/heldout (1 task)" in out, err
    status, _, err = run(
        "pretrain",
        "task=[toys/train,gym/CartPole-v1]",
        "model=tiny",
        "demonstrations=3",
        "steps=10",
        "training.log_every=1",
        "weights={toys: 2}",
        "run_dir=base",
        *QUICK,
    )
    assert status == 0, err
    base = json.loads(Path("base/model/config.json").read_text())
    assert [interface["name"] for interface in base["interfaces"]] == ["toys", "toys_flat", "gym_CartPole_v1"]
    arguments = ["task=toys/Hard", "base=base/model", "demonstrations=3", "steps=4", "episodes=3", "workers=0"]
    status, out, err = run("finetune", *arguments, "run_dir=hard", *QUICK)
    assert status == 0, err
    result = json.loads(Path("hard/result.json").read_text())
    assert result["success_rate"]["n"] == 3
    assert result["trainable_parameters"] < 0.5 * result["total_parameters"]  # the interface was there already
    status, out, err = run("evaluate", "checkpoint=base/model", "task=toys/train", "episodes=2", "workers=0")
    assert status == 0, err
    assert "toys/Flat" in out
    assert "toys/Easy" in out


def test_its_dataset_keeps_every_part_of_the_observations(toys):
    [dataset_id] = collection.collect([collection.Recipe("toys/Easy", 2, noise=(0.0,))])
    trajectories = load_dataset(dataset_id, "toys/Easy")
    assert trajectories.observations.shape == (12, 18 + 2 + 1 + 1024 + 4)  # cells, gauge, lamp, screen, words
    assert trajectories.actions.min(0).values.tolist() == [0, 0]
    cells, lamps = trajectories.observations[:, 0], trajectories.observations[:, 20]
    np.testing.assert_array_equal(trajectories.actions, np.stack([cells, lamps], 1))  # what the expert saw, it did
    assert trajectories.statistics().success_rate == 1.0


def test_a_task_that_says_nothing_of_success_has_no_success_rate(toys):
    [dataset_id] = collection.collect([collection.Recipe("toys/Flat", 2)])
    assert load_dataset(dataset_id, "toys/Flat").statistics().success_rate is None


def test_an_absent_dataset_in_a_mixture_is_named(toys, run):
    status, _, err = run("pretrain", "task=[toys/train,minari/not/there-v0]", "model=tiny", "steps=1", "run_dir=base")
    assert status == 1
    assert "'not/there-v0'" in err
    assert not Path("base").exists()
