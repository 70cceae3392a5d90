"""How often the script that made the demonstrations solves the goals that adapted models are scored on.

    python -m benchmarks.oracle --tasks metaworld/cw10 --episodes 50 --seeds 0 1 2

A clone of the script without error scores as much. The script plays without noise, on the goals of `finetune` at
these seeds.
"""

from __future__ import annotations

import argparse

import numpy as np
from tqdm import tqdm

from benchmarks.eva_init import RESULTS
from eva_rl.envs import expand_tasks, find_task
from eva_rl.files import write_text
from eva_rl.run import versions
from eva_rl.seeding import evaluation_seeds
from eva_rl.table import markdown


def solved(task: str, seeds: list[int]) -> float:
    """The share of these episodes in which the expert is ever successful."""
    domain, name = find_task(task)
    env, ever = domain.make(name), []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        expert, over, success = domain.expert(name, env), False, False
        while not over:
            observation, _, terminated, truncated, info = env.step(expert(observation))
            over, success = terminated or truncated, success or bool(info["success"])
        ever.append(success)
    return float(np.mean(ever))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["metaworld/cw10"])
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    a = parser.parse_args()
    tasks = [task for name in a.tasks for task in expand_tasks(name)]
    found = [
        [solved(task, evaluation_seeds(task, seed, a.episodes)) for seed in a.seeds]
        for task in tqdm(tasks, unit="task")
    ]
    rows = [
        [task, *(f"{one:.2f}" for one in own), f"{np.mean(own):.3f}"] for task, own in zip(tasks, found, strict=True)
    ]
    rows.append(["**mean**", *(f"{one:.3f}" for one in np.mean(found, 0)), f"**{np.mean(found):.3f}**"])
    command = f"python -m benchmarks.oracle --tasks {' '.join(a.tasks)} --episodes {a.episodes} --seeds {' '.join(map(str, a.seeds))}"
    text = [
        "# The script's own success on the goals that models are scored on",
        (__doc__ or "").split("\n\n")[2],
        f"`{command}`",
        markdown(["task", *(f"seed {seed}" for seed in a.seeds), "all"], rows),
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    write_text(RESULTS / "oracle.md", "\n\n".join(text) + "\n")
    print(text[3])


if __name__ == "__main__":
    main()
