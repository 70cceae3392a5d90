"""Every command and every block of Python in docs/acting.md runs, in its order."""

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from test_publish import hub  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "acting.md").read_text()
QUICK = {"finetune": ["steps=2", "episodes=1", "zero_shot=false", "workers=0", "training.batch_size=2"]}


def write_dataset() -> None:
    env, episodes = gym.make("Pendulum-v1"), []
    for seed in range(2):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        actions = np.stack([env.action_space.sample() for _ in range(200)])
        steps = [env.step(action) for action in actions]
        observations = np.stack([steps[0][0], *(step[0] for step in steps)])
        rewards, over = np.array([float(step[1]) for step in steps]), np.arange(200) == 199
        columns = {"rewards": rewards, "terminations": np.zeros(200, bool), "truncations": over}
        episodes.append(EpisodeBuffer(observations=observations, actions=actions, **columns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author
        minari.create_dataset_from_buffers("mine/pendulum-v0", episodes, env="Pendulum-v1")


@pytest.mark.slow
def test_the_page_on_acting_works_as_it_stands(run, hub, tmp_path):  # noqa: F811
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_dataset()
    blocks = re.findall(r"```(console|python)\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line.removeprefix("$ "))
            assert program == "python"
            if words[0] == "-m":
                command = words[1].removeprefix("eva_rl.")
                status, _, err = run(command, *words[2:], *QUICK.get(command, ()))
                assert status == 0, (line, err)
            else:
                script = [sys.executable, ROOT / words[0], *words[1:]]
                done = subprocess.run(script, capture_output=True, text=True, check=False)
                assert done.returncode == 0, (line, done.stderr)
                assert done.stdout.strip()
    assert {kind for kind, _ in blocks} == {"console", "python"}
    assert names["policy"].task == "minari/mine/pendulum-v0"
    assert len((ROOT / "examples" / "control_loop.py").read_text().splitlines()) <= 40
