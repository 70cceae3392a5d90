"""A tiny base and runs with random adapters, for tests of libraries."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from peft import LoraConfig
from results import result

from eva_rl.adapter import attach, save_adapter
from eva_rl.data import Trajectories, interface_of, pack
from eva_rl.model import (
    NOTES,
    TRUNK_LAYERS,
    AdapterNotes,
    DecisionTransformer,
    ModelConfig,
    load_base,
    save_base,
)

TASK = "dummy/Steps-v0"


def make_run(
    folder: Path, name: str = "tuned", seed: int = 0, rank: int = 4, base_seed: int = 0, vectors: bool = False
) -> Path:
    """Write a base, if there is none yet, and a run with a LoRA whose weights are random.

    vectors: whether the base has vectors of tasks, and the run one of its own.
    """
    trajectories = episodes("dummy/Steps-v0", np.array([1.0, 0, 0]), count=5)
    if not (folder / "base").exists():
        torch.manual_seed(base_seed)
        interface = interface_of("dummy", [trajectories])
        interface = replace(interface, observation_mean=(0.0,) * 3, observation_std=(1.0,) * 3)  # wide enough for all
        interface = replace(interface, tasks=("dummy/Other-v0",) if vectors else ())
        config = ModelConfig(layers=2, heads=2, width=32, context=8, dropout=0.0, tokens=("state",))
        model = DecisionTransformer(config, [interface])
        for parameter in model.parameters():  # so that no branch is near zero
            torch.nn.init.normal_(parameter, std=0.2)
        save_base(folder / "base", model, {TASK: trajectories.statistics()})
    base = load_base(str(folder / "base"))
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=8, target_modules=list(TRUNK_LAYERS), init_lora_weights=False)
    adapter = attach(base.model, lora, fresh_modules=("embedders.dummy.task",) if vectors else ())
    if vectors:
        torch.nn.init.normal_(base.model.embedders["dummy"].task.weight)
    notes = AdapterNotes(
        str(folder / "base"), base.sha256, TASK, base.model.interfaces["dummy"], trajectories.statistics()
    )
    save_adapter(adapter, folder / name / "adapter", notes.base, {NOTES: asdict(notes)})
    score = {"mean": 6.0, "low": 5.0, "high": 7.0, "n": 3}
    (folder / name / "result.json").write_text(
        json.dumps(result(task=TASK, episode_return=score, success_rate=None, normalized_score=None))
    )
    return folder


def episodes(task: str, mean: np.ndarray, count: int = 6, length: int = 20, seed: int = 0) -> Trajectories:
    """Trajectories whose observations scatter about a mean (3,)."""
    rng = np.random.default_rng(seed)
    spaces = gym.spaces.Box(-10.0, 10.0, (3,), np.float32), gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))
    made = [
        {
            "observations": (mean + 0.1 * rng.standard_normal((length, 3))).astype(np.float32),
            "actions": np.zeros((length, 2), np.float32),
            "rewards": np.ones(length, np.float32),
            "success": None,
        }
        for _ in range(count)
    ]
    return pack(task, made, *spaces)
