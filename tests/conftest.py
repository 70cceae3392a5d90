"""What all tests share: a datasets root of their own, no network, one thread, and a toy environment."""

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import hypothesis
import minari
import numpy as np
import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from minari.data_collector import EpisodeBuffer

from eva_rl.envs.domain import Domain

hypothesis.settings.register_profile("tests", max_examples=60, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


class DummyEnv(gym.Env):
    """An episode of 5 to 7 steps, as its seed decides. A step of action 1 (or above) earns 1; the last one succeeds."""

    action_space: gym.Space
    observation_space = gym.spaces.Box(-10.0, 10.0, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.step_number, self.length = 0, 5 + int(self.np_random.integers(3))
        self.offset = self.np_random.uniform(-1.0, 1.0)
        return self._observation(), {"success": 0.0}

    def step(self, action):
        self.step_number += 1
        terminated = self.step_number == self.length
        return self._observation(), float(np.max(action) >= 1), terminated, False, {"success": float(terminated)}

    def _observation(self) -> np.ndarray:
        return np.array([self.step_number, self.offset, self.step_number * self.offset], np.float32)


class ContinuousDummyEnv(DummyEnv):
    action_space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))


class DiscreteDummyEnv(DummyEnv):
    action_space = gym.spaces.Discrete(3, start=1)


class DummyDomain(Domain):
    """The continuous dummy environment as a domain of two tasks, whose expert takes the same action throughout."""

    name = "dummy"
    extra = "dummy"
    tasks = ("Steps-v0", "Broken-v0")
    splits: ClassVar[dict[str, tuple[str, ...]]] = {"all": ("Steps-v0", "Broken-v0")}

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        return gym.make("ContinuousDummy-v0")

    def expert(self, name: str, env: gym.Env):
        return lambda observation: np.array([0.5, 2.0], np.float32)


class InlineExecutor(Executor):
    """Runs each job as it is submitted; an exception waits in the job's future, as a process pool's would."""

    def __init__(self, *_: object, **__: object):
        pass

    def submit(self, function: Callable[..., object], /, *arguments: object, **options: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 (a future carries any of them)
            future.set_exception(error)
        return future


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which may be at collection
    for kind in ("Continuous", "Discrete"):
        gym.register(f"{kind}Dummy-v0", entry_point=f"conftest:{kind}DummyEnv", disable_env_checker=True)


@pytest.fixture(autouse=True, scope="session")
def _no_users_datasets(tmp_path_factory: pytest.TempPathFactory):
    """Fixtures of a wider scope than a test see an empty datasets root too, never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("session-datasets")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_films():
    """Runs make no film unless it is asked for."""
    from eva_rl import settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "FILM_STEPS", 0)
        yield


@pytest.fixture(autouse=True)
def datasets_root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own, empty folder of Minari datasets; nothing is downloaded into it."""

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("tests run without a network")

    root = tmp_path_factory.mktemp("datasets")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.setattr(minari, "download_dataset", no_network)
    return root


@pytest.fixture
def make_dataset() -> Callable[..., minari.MinariDataset]:
    """A function that writes a small Minari dataset of the dummy environment, driven by random actions."""
    return _make_dataset


@pytest.fixture
def dummy_domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[DummyDomain]:
    """A domain `dummy` of its own, collected by this process so that a test's patches hold while it is."""
    from eva_rl import envs
    from eva_rl.data import collection

    domain = DummyDomain()
    monkeypatch.setattr(envs, "domains", lambda: {"dummy": domain})
    monkeypatch.setattr(collection, "ProcessPoolExecutor", InlineExecutor)
    collection._environment.cache_clear()
    yield domain
    collection._environment.cache_clear()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run an entry point with these arguments: its exit status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    compose = Hydra.get_mode

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
        """Hydra composes all settings once more to see whether they ask for a grid, as those of a study alone do."""
        told = any("study=" in word or "hydra.mode" in word for word in overrides)
        return compose(self, config_name, overrides) if told else None

    monkeypatch.setattr(Hydra, "get_mode", mode)

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        main = importlib.import_module(f"eva_rl.{name}").main
        monkeypatch.setattr(sys, "argv", [f"eva_rl.{name}", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = 1 if isinstance(stop.code, str) else stop.code or 0
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first test that needed a base made for the others."""
    return tmp_path_factory.mktemp("kept") / "made"


@pytest.fixture
def base(run, dummy_domain, datasets_root, kept, tmp_path) -> Path:
    """A tiny checkpoint that knows the dummy domain; and the datasets that it was trained on."""
    places = {"run": tmp_path / "pretrained", "datasets": datasets_root}
    if kept.is_dir():
        for name, place in places.items():
            shutil.copytree(kept / name, place, dirs_exist_ok=True)
        return tmp_path / "pretrained" / "model"
    arguments = ["model=tiny", "task=dummy/all", "demonstrations=4", "steps=4", "training.batch_size=4"]
    status, _, err = run("pretrain", *arguments, f"run_dir={places['run']}")
    assert status == 0, err
    for name, place in places.items():
        shutil.copytree(place, kept / name)
    return tmp_path / "pretrained" / "model"


def _make_dataset(
    dataset_id: str = "dummy/random-v0",
    kind: str = "Continuous",
    episodes: int = 4,
    seed: int = 0,
    success: bool = True,
    **changes: object,
) -> minari.MinariDataset:
    env = gym.make(f"{kind}Dummy-v0")
    env.action_space.seed(seed)
    buffers = []
    for number in range(episodes):
        observation, info = env.reset(seed=seed + number)
        observations, infos, actions, rewards, terminations, truncations = [observation], [info], [], [], [], []
        while not (terminations and terminations[-1]):
            actions.append(env.action_space.sample())
            observation, reward, terminated, truncated, info = env.step(actions[-1])
            observations.append(observation)
            infos.append(info)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations=np.stack(observations),
                actions=np.stack(actions),
                rewards=np.array(rewards),
                terminations=np.array(terminations),
                truncations=np.array(truncations),
                infos={"success": np.array([i["success"] for i in infos])} if success else None,
            )
        )
    options = {
        "env": env.spec,
        "eval_env": env.spec,
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "algorithm_name": "random actions",
        "author": "the tests",
        "author_email": "tests@example.org",
        "code_permalink": "https://example.org",
        "description": "episodes of the dummy environment",
    }
    return minari.create_dataset_from_buffers(dataset_id, buffers, **options | changes)
