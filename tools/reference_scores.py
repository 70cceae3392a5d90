"""Mean returns of random actions and of the expert on every task of a domain, with 95 % intervals: envs/<domain>_scores.json.

    python -m tools.reference_scores metaworld

They are the 0 and the 1 of normalised scores. Seeds are those of collection with seed 1000: neither the default training
data's nor any evaluation's.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eva_rl import envs
from eva_rl.cores import available_cores, one_core_each
from eva_rl.files import write_json
from eva_rl.run import mean
from eva_rl.seeding import episode_rng, episode_seed

SEED = 1000


def measure(task: str, episodes: int) -> dict[str, float | list[float | None] | None]:
    """Mean episode returns with their intervals, and how often the expert succeeds.

    The returns include those of `medium` where there is one.
    """
    domain, name = envs.find_task(task)
    env = domain.make(name)
    played = ["random", "expert", *(quality for quality in domain.qualities(name) if quality == "medium")]
    returns: dict[str, list[float]] = {policy: [] for policy in played}
    solved = []
    for policy, totals in returns.items():
        for episode in range(episodes):
            rng = episode_rng(task, SEED, episode)
            env.action_space.seed(int(rng.integers(2**31)))
            observation, _ = env.reset(seed=episode_seed("collect", task, SEED, episode))
            act = None if policy == "random" else domain.demonstrator(name, env, policy, episode)
            total, ended, success = 0.0, False, None  # None: the environment does not say
            while not ended:
                action = env.action_space.sample() if act is None else act(observation)
                observation, reward, terminated, truncated, info = env.step(action)
                total, ended = total + float(reward), terminated or truncated
                if "success" in info:
                    success = bool(success) or bool(info["success"])
            totals.append(total)
            if policy == "expert":
                solved.append(success)
    found = {policy: mean(totals) for policy, totals in returns.items()}
    scores = {policy: round(estimate.mean, 2) for policy, estimate in found.items()}
    scores |= {
        f"{policy}_interval": [None if end is None else round(end, 2) for end in (e.low, e.high)]
        for policy, e in found.items()
    }
    return scores | {"expert_success_rate": None if None in solved else round(float(np.mean(solved)), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=sorted(envs.domains()))
    parser.add_argument("--episodes", type=int, default=20, help="of each policy and task, at least 2")
    arguments = parser.parse_args()
    domain = envs.domains()[arguments.domain]
    tasks = [f"{domain.name}/{name}" for name in domain.tasks]
    pool = ProcessPoolExecutor(available_cores(), multiprocessing.get_context("forkserver"))
    with one_core_each(), pool:
        rows = list(tqdm(pool.map(measure, tasks, [arguments.episodes] * len(tasks)), total=len(tasks), unit="task"))
    scores = {name: row for name, row in zip(domain.tasks, rows, strict=True)}
    made_by = f"python -m tools.reference_scores {domain.name} --episodes {arguments.episodes}"
    write_json(Path(envs.__file__).parent / f"{domain.name}_scores.json", {"made_by": made_by, "tasks": scores})


if __name__ == "__main__":
    main()
