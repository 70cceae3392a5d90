"""Steps a second of rollouts: the simulators alone, ours, and a plain loop over one environment.

    python -m benchmarks.rollout

- raw: the simulators' processes with random actions, new at every step, and no model to wait for: Meta-World as it ships.
- limit: the same with our environments, which find out faster whether the gripper touches.
- ours: `eva_rl.rollout` with a model of the preset's size, in our environments, in bfloat16 where the processor has it.
- plain: what one would write with Hugging Face's `DecisionTransformerModel` of that size: one environment as it ships, the whole
  window computed again for every step, in float32.

Weights are random, and every episode lasts 200 steps whatever the actions. Figures are medians of the repeats, the four
in turn. Resets count, but making the environments does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from benchmarks.eva_init import RESULTS, model_config
from eva_rl.data import find_source
from eva_rl.files import write_text
from eva_rl.interface import Interface
from eva_rl.model import DecisionTransformer, Decoder, load_base
from eva_rl.rollout import Job, Simulators, rollout
from eva_rl.run import versions
from eva_rl.table import markdown
from eva_rl.training import autocast

TASK = "metaworld/push-v3"
STEPS = 200


def ours_env() -> gym.Env:
    return find_source(TASK).make_env()


def shipped_env() -> gym.Env:
    """The same environment with all of Meta-World's own code."""
    env = ours_env()
    del env.unwrapped._env.touching_object
    return env


def jobs_of(episodes: int, make_env: Callable[[], gym.Env] = ours_env) -> list[Job]:
    return [Job(f"{TASK} {make_env.__name__}", make_env, seed, 1000.0) for seed in range(episodes)]


def raw(simulators: Simulators, interface: Interface, jobs: Sequence[Job]) -> float:
    """Steps a second of as many simulators, each with its share of the episodes, from their resets to their ends."""
    episodes, rng = len(jobs), np.random.default_rng(0)
    size = -(-episodes // simulators.workers)
    running = simulators.provide(-(-episodes // size), size, interface)
    left = {simulator.connection: (simulator, STEPS) for simulator in running}
    start = time.perf_counter()
    for number, simulator in enumerate(running):
        simulator.send(jobs[number * size : (number + 1) * size])
    while left:
        for connection in wait(list(left)):
            simulator, steps = left.pop(connection)
            simulator.receive()
            if steps:
                left[connection] = simulator, steps - 1
                simulator.board.actions[:] = rng.uniform(-1, 1, simulator.board.actions.shape)
                simulator.send(None)
    return episodes * STEPS / (time.perf_counter() - start)


def ours(model: DecisionTransformer, simulators: Simulators, episodes: int, device: str) -> float:
    interface = model.interfaces["metaworld"]
    start = time.perf_counter()
    with autocast("auto", torch.device(device)):  # as the entry points do
        found = rollout(partial(Decoder, model, "metaworld"), interface, jobs_of(episodes), simulators, device)
    return found.lengths.sum() / (time.perf_counter() - start)


@torch.no_grad()
def plain(model: DecisionTransformer, episodes: int, device: str) -> float:
    config = model.config
    theirs = DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=39,
            act_dim=4,
            hidden_size=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_positions=3 * config.context,
            max_ep_len=STEPS,
        )
    ).eval()
    theirs.to(device)
    env = shipped_env()
    start = time.perf_counter()
    steps = 0
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        states, actions, rewards = [], [], []
        wanted, over = [1000.0], False
        while not over:
            states.append(observation)
            actions.append(np.zeros(4))
            rewards.append(0.0)
            first = max(0, len(states) - config.context)
            window = [np.array(x[first:], np.float32)[None] for x in (states, actions, rewards, wanted)]
            s, a, r, g = (torch.from_numpy(x).to(device) for x in window)
            positions = torch.arange(first, len(states), device=device)[None]
            action = theirs(
                states=s,
                actions=a,
                rewards=r[..., None],
                returns_to_go=g[..., None],
                timesteps=positions,
                attention_mask=torch.ones(1, s.shape[1], device=device),
            ).action_preds[0, -1]
            actions[-1] = action.cpu().numpy()
            observation, rewards[-1], terminated, truncated, _ = env.step(np.clip(actions[-1], -1, 1))
            wanted.append(wanted[-1] - rewards[-1])
            over = terminated or truncated
            steps += 1
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=["small", "paper"], default=["small", "paper"])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at least 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that the table goes to")
    a = parser.parse_args()
    if a.workers < 1:
        parser.error(f"--workers {a.workers} was given where at least 1 was expected.")
    interface = load_base("mt40-small").model.interfaces["metaworld"]
    rows = []
    for preset in a.presets:
        model = DecisionTransformer(model_config(preset), [interface]).eval().to(a.device)
        speeds: dict[str, list[float]] = {"raw": [], "limit": [], "ours": [], "plain": []}
        shipped, own = jobs_of(a.episodes, shipped_env), jobs_of(a.episodes)
        with Simulators(a.workers) as as_shipped, Simulators(a.workers) as simulators:
            raw(as_shipped, interface, shipped), raw(simulators, interface, own), plain(model, 1, a.device)  # warm
            for _ in tqdm(range(a.repeats), desc=preset):
                speeds["raw"].append(raw(as_shipped, interface, shipped))
                speeds["limit"].append(raw(simulators, interface, own))
                speeds["ours"].append(ours(model, simulators, a.episodes, a.device))
                speeds["plain"].append(plain(model, 3, a.device))
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        rows += [
            [preset, name, f"{speed:.0f}", *(f"{speed / medians[other]:.2f}" for other in ("raw", "limit", "plain"))]
            for name, speed in medians.items()
        ]
    table = markdown(["preset", "what", "steps a second", "x raw", "x limit", "x plain"], rows)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = (
        f"`python -m benchmarks.rollout --episodes {a.episodes} --workers {a.workers} --repeats {a.repeats} --device {a.device}` "
        f"({TASK})"
    )
    place = torch.cuda.get_device_name() if a.device == "cuda" else platform.machine()
    name = "rollout.md" if a.device == "cpu" else f"rollout-{a.device}.md"
    write_text(a.results / name, f"{head}\n\n{place}, {os.cpu_count()} cores; {used}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
