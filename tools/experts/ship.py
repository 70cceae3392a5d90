"""A search's snapshots -> the file that ships: envs/experts/<domain>.<task>.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import gymnasium as gym
import numpy as np
from safetensors.numpy import save_file

from eva_rl import envs
from eva_rl.envs.domain import Policy
from eva_rl.envs.trained import Snapshots, path_of
from eva_rl.files import replacing
from eva_rl.seeding import episode_seed
from tools.experts import ars
from tools.experts.searches import SEARCHES

SEED = 2000
"""Of the episodes that snapshots are chosen by: none that the expert is later scored on."""
CANDIDATES = 5
KEPT = 8


@dataclass(frozen=True)
class Choice:
    """The snapshots to ship, in the order of training, the last the expert."""

    numbers: list[int]
    returns: list[float]
    medium: int
    """The place in `numbers` of the one that is halfway to the expert. Where none is, the expert alone is shipped."""


def choose(rough: Sequence[float], measure: Callable[[int], float], random: float) -> Choice:
    """The snapshots to ship of those with these rough mean returns.

    Args:
        measure: the mean return of the snapshot of a number.
        random: the mean return of random actions.
    """
    scores = np.asarray(rough)
    later = 1 + np.argsort(-scores[1:], kind="stable")  # the expert is not the first: something has to come before it
    returns = {i: measure(i) for i in later[:CANDIDATES].tolist()}
    expert = max(returns, key=returns.__getitem__)
    earlier = scores[:expert]
    half = (random + returns[expert]) / 2
    near = np.argsort(np.abs(earlier - half), kind="stable")[:CANDIDATES].tolist()
    # By return rather than by time: a search may learn nothing for long, and then all at once.
    levels = np.linspace(earlier.min(), min(returns[expert], earlier.max()), KEPT - 1)
    spread = [int(np.abs(earlier - level).argmin()) for level in levels]
    returns |= {i: measure(i) for i in sorted({*near, *spread} - returns.keys())}
    medium = min((i for i in returns if i < expert), key=lambda i: abs(returns[i] - half))
    if abs(returns[medium] - half) > 0.2 * (returns[expert] - random):  # none plays half as well
        return Choice([expert], [returns[expert]], 0)
    numbers = sorted({*spread, medium, expert})
    return Choice(numbers, [returns[i] for i in numbers], numbers.index(medium))


def mean_return(env: gym.Env, task: str, policy: Policy | None, episodes: int) -> float:
    """The mean return of a policy, or of random actions, over so many episodes, which are the same for every policy."""
    totals = []
    env.action_space.seed(SEED)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode_seed("collect", task, SEED, episode))
        total, ended = 0.0, False
        while not ended:
            action = env.action_space.sample() if policy is None else policy(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        totals.append(total)
    return float(np.mean(totals))


def ship(task: str, states: Sequence[Path], episodes: int) -> Choice:
    """Write the policies of the best of these searches to where the domain reads them."""
    domain, name = envs.find_task(task)
    env = domain.make(name)
    path = max(states, key=lambda path: max(ars.restore(path).scores))
    state = ars.restore(path)
    every = np.stack(state.snapshots).astype(np.float32)  # (all, act, obs + 1)
    snapshots = Snapshots(every[..., :-1], every[..., -1], np.asarray(state.scores), 0)

    def measure(number: int) -> float:
        return mean_return(env, task, snapshots.policy(number, cast("gym.spaces.Box", env.action_space)), episodes)

    choice = choose(state.scores, measure, mean_return(env, task, None, episodes))
    tensors = {
        "weights": np.ascontiguousarray(snapshots.weights[choice.numbers]),
        "biases": np.ascontiguousarray(snapshots.biases[choice.numbers]),
        "returns": np.array(choice.returns, np.float32),
        "steps": np.array([state.at[i] for i in choice.numbers], np.int64),
    }
    made = {
        "task": task,
        "algorithm": "ARS",
        "search": json.dumps(asdict(SEARCHES[task])),
        "seed": path.stem.rpartition("seed")[2],
        "medium": str(choice.medium),
    }
    with replacing(path_of(domain.name, name)) as temporary:
        save_file(tensors, temporary, made)
    return choice
