"""Train the experts: python -m tools.experts train mujoco/Hopper-v5 --folder build/experts

A search goes on from where it was stopped, and its result does not depend on when that was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from eva_rl import envs
from tools.experts import ars
from tools.experts.searches import SEARCHES


def train(task: str, folder: Path, seed: int, steps: int, every: int = 10) -> None:
    """Search for a policy for `task` until so many environment steps were made; every few iterations it is kept and scored."""
    domain, name = envs.find_task(task)
    env, search = domain.make(name), SEARCHES[task]
    path = folder / f"{task.replace('/', '.')}-seed{seed}.npz"
    state = ars.restore(path) if path.is_file() else ars.new_state(env)
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
    parser.add_argument("task", choices=sorted(SEARCHES))
    parser.add_argument("--folder", type=Path, default=Path("build/experts"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1e6, help="environment steps, those of earlier calls included")
    arguments = parser.parse_args()
    train(arguments.task, arguments.folder, arguments.seed, int(arguments.steps))


if __name__ == "__main__":
    main()
