"""Experts that are trained: a search, which may go on for hours, then its policies to the domain.

    python -m tools.experts search mujoco/Hopper-v5 --steps 1e6
    python -m tools.experts ship mujoco/Hopper-v5
    python -m tools.reference_scores mujoco --episodes 100

A search goes on from where it was stopped, and its result does not depend on when that was. `ship` takes the best of the
searches of all seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from eva_rl import envs
from tools.experts import ars
from tools.experts.searches import SEARCHES
from tools.experts.ship import ship


def train(task: str, folder: Path, seed: int, steps: int, every: int) -> None:
    """Search until so many environment steps were made, and every few iterations keep, score and save the policy."""
    domain, name = envs.find_task(task)
    env, search = domain.make(name), SEARCHES[task]
    path = folder / f"{task.replace('/', '.')}-seed{seed}.npz"
    state = ars.restore(path) if path.is_file() else ars.new_state(env)
    if not state.snapshots:
        ars.snapshot(env, state, search)  # where the search begins
    began = time.monotonic()
    while state.steps < steps:
        mean = ars.iterate(env, state, search, seed)
        if state.iteration % every == 0:
            score = ars.snapshot(env, state, search)
            ars.save(path, state)
            minutes = (time.monotonic() - began) / 60
            print(f"{task} {state.iteration} {state.steps} {mean:.1f} {score:.1f} {minutes:.1f}min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "ship"))
    parser.add_argument("task", choices=sorted(SEARCHES))
    parser.add_argument("--folder", type=Path, default=Path("build/experts"), help="where searches are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1e6, help="environment steps, those of earlier calls included")
    parser.add_argument("--every", type=int, default=10, help="iterations from one snapshot to the next")
    parser.add_argument("--episodes", type=int, default=20, help="that each candidate for shipping plays")
    arguments = parser.parse_args()
    task, folder = arguments.task, arguments.folder
    if arguments.what == "search":
        train(task, folder, arguments.seed, int(arguments.steps), arguments.every)
        return
    searches = sorted(folder.glob(f"{task.replace('/', '.')}-seed*.npz"))
    if not searches:
        parser.error(f"there is no search of {task} in {folder}: run `python -m tools.experts search {task}` first")
    choice = ship(task, searches, arguments.episodes)
    print(f"{task}: expert {choice.returns[-1]:.1f}, medium {choice.returns[choice.medium]:.1f}, all", end=" ")
    print(", ".join(f"{value:.1f}" for value in choice.returns))


if __name__ == "__main__":
    main()
