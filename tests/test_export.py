"""An exported file acts as the policy does, without this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_policy import ACTIONS, OBSERVATIONS, Diary, check_alike, make_checkpoint

import eva_rl
from eva_rl.policy import ActingPolicy, export_policy
from eva_rl.spaces import action_row, assembled

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100


class Caller:
    """Keeps the window as docs/acting.md says."""

    def __init__(self, act, examples: dict[str, np.ndarray], notes: dict[str, str]):
        """act: the window -> the action's arrays, one after the other."""
        self.act_on, self.window = act, {name: np.zeros_like(value) for name, value in examples.items()}
        self.context, self.keep, self.step = int(notes["context"]), int(notes["keep"]), -1

    def act(self, observation, wanted: float, space: gym.Space):
        if self.step == self.context - 1:
            for name, rows in self.window.items():
                if name != "step":
                    rows[: self.keep] = rows[self.context - self.keep :].copy()
                    rows[self.keep :] = 77  # what is behind the step must not be looked at
            self.step = self.keep - 1
        self.step += 1
        now = {"returns_to_go": wanted} | dict(named("observations", observation))
        for name in self.window.keys() & now.keys():
            self.window[name][self.step] = now[name]
        self.window["step"][()] = self.step
        return assembled(space, iter(self.act_on(self.window)))

    def record(self, action, reward: float) -> None:
        for name, value in (*named("actions", action), ("rewards", reward)):
            if name in self.window:
                self.window[name][self.step] = value


def named(name: str, observation):
    if isinstance(observation, dict | tuple):
        for key, value in observation.items() if isinstance(observation, dict) else enumerate(observation):
            yield from named(f"{name}.{key}", value)
    else:
        yield name, observation


def check_against(policy: ActingPolicy, caller: Caller) -> None:
    rng = np.random.default_rng(0)
    policy.observation_space.seed(0)
    policy.reset(5.0)
    wanted, seen = 5.0, set()
    for _ in range(STEPS):
        observation, reward = policy.observation_space.sample(), rng.normal()
        expected = policy.act(observation)
        found = caller.act(observation, wanted, policy.action_space)
        check_alike(policy.action_space, found, expected)
        seen.add(str(np.round(action_row(policy.action_space, expected), 3)))
        policy.observe(reward)
        caller.record(found, reward)
        wanted -= reward
    assert len(seen) > 1


def onnx_caller(path: Path) -> Caller:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    types = {
        "tensor(float)": np.float32,
        "tensor(double)": np.float64,
        "tensor(uint8)": np.uint8,
        "tensor(int64)": np.int64,
    }
    examples = {i.name: np.zeros(i.shape, types[i.type]) for i in session.get_inputs()}
    notes = session.get_modelmeta().custom_metadata_map
    return Caller(lambda window: session.run(None, window), examples, notes)


def torch_caller(path: Path) -> Caller:
    extra = {"eva_rl.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    notes = json.loads(extra["eva_rl.json"])
    names = notes["inputs"].split()
    examples = dict(zip(names, (x.numpy() for x in torch.export.load(path).example_inputs[0]), strict=True))

    def act(window):
        found = program(*map(torch.as_tensor, window.values()))
        return [own.numpy() for own in (found if isinstance(found, tuple) else [found])]

    return Caller(act, examples, notes)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        ("dict", "one"),
        *(
            pytest.param(*kinds, marks=pytest.mark.slow)
            for kinds in [
                ("vector", "parts"),
                ("vector", "numbers"),
                ("tuple", "several"),
                ("grid", "unbounded"),
                ("choice", "numbers"),
                ("clock", "numbers"),
            ]
        ),
    ],
)
def test_the_onnx_file_acts_as_the_policy_over_a_hundred_steps(observations, actions, tmp_path):
    pytest.importorskip("onnxscript")
    env = Diary(OBSERVATIONS[observations], ACTIONS[actions])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env))
    export_policy(policy, "onnx", tmp_path / "policy.onnx")
    check_against(policy, onnx_caller(tmp_path / "policy.onnx"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "model"] == ["policy.onnx"]  # one file


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        ("vector", "parts"),
        *(
            pytest.param(*kinds, marks=pytest.mark.slow)
            for kinds in [("dict", "one"), ("vector", "numbers"), ("tuple", "several")]
        ),
    ],
)
def test_the_torch_program_acts_as_the_policy_over_a_hundred_steps(observations, actions, tmp_path):
    env = Diary(OBSERVATIONS[observations], ACTIONS[actions])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env))
    export_policy(policy, "torch", tmp_path / "policy.pt2")
    check_against(policy, torch_caller(tmp_path / "policy.pt2"))


def test_a_cloned_network_is_exported_too(tmp_path):
    env = Diary(OBSERVATIONS["vector"], ACTIONS["numbers"])
    policy = eva_rl.load_policy(make_checkpoint(tmp_path / "model", env, cloning=True))
    export_policy(policy, "torch", tmp_path / "policy.pt2")
    check_against(policy, torch_caller(tmp_path / "policy.pt2"))


def test_the_command_writes_a_file_that_the_examples_loop_acts_with(run, base, tmp_path):
    pytest.importorskip("onnxscript")
    status, out, err = run("export", f"run={base}", "task=dummy/Steps-v0", "output=there/policy.onnx")
    assert status == 0, err
    assert out.strip().endswith("there/policy.onnx")
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import gymnasium as gym; sys.modules['eva_rl'] = None; "
    start += "gym.register('Dummy-v0', entry_point='toy:Toy', disable_env_checker=True); "
    start += f"sys.argv = ['', 'there/policy.onnx', 'Dummy-v0']; exec(open({str(ROOT / 'examples' / 'act_onnx.py')!r}).read())"
    (tmp_path / "toy.py").write_text(TOY)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    policy = eva_rl.load_policy(base, "dummy/Steps-v0")
    env = gym.make("ContinuousDummy-v0")
    observation, _ = env.reset(seed=0)
    actions, over = [], False
    while not over:
        actions.append(policy.act(observation))
        observation, reward, over, _, _ = env.step(actions[-1])
        policy.observe(reward)
    lines = done.stdout.strip().splitlines()
    found = [np.array(line[1 : line.index("]")].split(), float) for line in lines]
    np.testing.assert_allclose(found, actions, atol=1e-4)  # as printed
    status, _, err = run("export", f"run={base}", "task=dummy/Steps-v0", "output=there/policy.onnx")
    assert status == 1
    assert "is there already" in err


TOY = """
import gymnasium as gym
import numpy as np


class Toy(gym.Env):
    observation_space = gym.spaces.Box(-10.0, 10.0, (3,), np.float32)
    action_space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.length = 0, 5 + int(self.np_random.integers(3))
        self.offset = self.np_random.uniform(-1.0, 1.0)
        return self._seen(), {}

    def step(self, action):
        self.number += 1
        return self._seen(), float(np.max(action) >= 1), self.number == self.length, False, {}

    def _seen(self):
        return np.array([self.number, self.offset, self.number * self.offset], np.float32)
"""


def test_what_cannot_be_exported_is_said_in_one_sentence(run, base, monkeypatch):
    status, _, err = run("export", f"run={base}", "task=dummy/Steps-v0", "format=tflite")
    assert status == 1
    assert "format must be onnx or torch, got tflite." in err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = run("export", f"run={base}", "task=dummy/Steps-v0")
    assert status == 1
    assert "pip install 'eva_rl[onnx]'" in err
    assert not Path("policy.onnx").exists()
