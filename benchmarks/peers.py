"""What d3rlpy's algorithms make of the same demonstrations in the same seconds, played by our rollouts.

    python -m benchmarks.peers --tasks metaworld/cw10 --demonstrations 1 5 40 --seconds 45

BC, TD3+BC and Decision Transformer are as d3rlpy ships them, with its own scaler of observations. The transformer also
has d3rlpy's scaler of returns, by 1/1000 as in its own reproduction scripts. Each trains from scratch, for so many
seconds of one core's time. Goals, simulators, demonstrations and the return that is asked for (`auto`) are those of
`python -m eva_rl.finetune`.

d3rlpy asks for an older gymnasium than Meta-World does, but works with the newer one. To install it, run
`pip install --no-deps d3rlpy`, then `pip install structlog colorama dataclasses-json scikit-learn gym`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.eva_init import RESULTS
from eva_rl.data import Trajectories, find_source, interface_of, load_dataset
from eva_rl.envs import expand_tasks
from eva_rl.files import write_text
from eva_rl.rollout import Job, Policy, Simulators, TargetReturn, rollout
from eva_rl.run import versions
from eva_rl.seeding import evaluation_seeds
from eva_rl.table import markdown

if TYPE_CHECKING:
    from d3rlpy.algos.base import LearnableBase
    from d3rlpy.dataset import ReplayBuffer

ALGORITHMS = ("BC", "TD3+BC", "DT")


class Instant:
    """A policy without memory: d3rlpy's `predict` for all episodes at once."""

    def __init__(self, algorithm: Any, episodes: int):
        self.algorithm = algorithm

    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        return torch.from_numpy(self.algorithm.predict(observations.numpy()))  # (n, act)

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        """Nothing is kept."""

    def keep(self, episodes: Tensor) -> None:
        """Nothing is kept."""


class Stateful:
    """d3rlpy's own wrapper that keeps a transformer's window, one for each episode."""

    def __init__(self, algorithm: Any, target: float, episodes: int):
        self.own = [algorithm.as_stateful_wrapper(target) for _ in range(episodes)]
        self.rewards = torch.zeros(episodes)

    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        steps = zip(self.own, observations.numpy(), self.rewards.tolist(), strict=True)
        return torch.from_numpy(np.stack([own.predict(seen, reward) for own, seen, reward in steps]))  # (n, act)

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        self.rewards = rewards

    def keep(self, episodes: Tensor) -> None:
        self.own, self.rewards = [self.own[i] for i in episodes.tolist()], self.rewards[episodes]


def make(name: str, longest: int) -> LearnableBase:
    """The algorithm with d3rlpy's defaults."""
    from d3rlpy.algos import BCConfig, DecisionTransformerConfig, TD3PlusBCConfig
    from d3rlpy.preprocessing import MultiplyRewardScaler, StandardObservationScaler

    seen = StandardObservationScaler()
    if name == "BC":
        return BCConfig(observation_scaler=seen).create(device=False)
    if name == "TD3+BC":
        return TD3PlusBCConfig(observation_scaler=seen).create(device=False)
    returns = MultiplyRewardScaler(0.001)
    return DecisionTransformerConfig(observation_scaler=seen, reward_scaler=returns, max_timestep=longest).create(
        device=False
    )


def buffer_of(trajectories: Trajectories) -> ReplayBuffer:
    """d3rlpy's dataset of the same steps, in which episodes end because time is over."""
    from d3rlpy.dataset import MDPDataset

    ends = np.zeros(len(trajectories.rewards), np.float32)
    ends[trajectories.starts[1:].numpy() - 1] = 1
    return MDPDataset(
        trajectories.observations.numpy(),
        trajectories.actions.numpy(),
        trajectories.rewards.numpy()[:, None],
        terminals=np.zeros_like(ends),
        timeouts=ends,
    )


def fitted(name: str, trajectories: Trajectories, seconds: float, longest: int) -> tuple[Any, int]:
    """The algorithm after so many seconds of updates, and their number."""
    from d3rlpy.algos.utility import build_scalers_with_trajectory_slicer, build_scalers_with_transition_picker

    algorithm, buffer, updates = make(name, longest), buffer_of(trajectories), 0
    scalers = build_scalers_with_trajectory_slicer if name == "DT" else build_scalers_with_transition_picker
    scalers(algorithm, buffer)
    algorithm.build_with_dataset(buffer)
    config, started = algorithm.config, time.process_time()  # other work on the machine takes none of it
    while time.process_time() - started < seconds:
        if name == "DT":
            algorithm.update(buffer.sample_trajectory_batch(config.batch_size, length=config.context_size))
        else:
            algorithm.update(buffer.sample_transition_batch(config.batch_size))
        updates += 1
    return algorithm, updates


def policy(name: str, algorithm: Any, target: float) -> Callable[[int], Policy]:
    if name == "DT":
        return lambda episodes: Stateful(algorithm, target, episodes)
    return lambda episodes: Instant(algorithm, episodes)


def cell(name: str, task: str, a: argparse.Namespace, demonstrations: int) -> dict[str, Any]:
    """One algorithm on one task: its success on the held-out goals."""
    import d3rlpy

    d3rlpy.seed(a.seed)
    source = find_source(task, a.dataset and a.dataset.format(task=task))
    trajectories = load_dataset(source.dataset(demonstrations, a.seed), task, demonstrations).successful()
    longest = int(source.make_env().spec.max_episode_steps)
    algorithm, updates = fitted(name, trajectories, a.seconds, longest)
    [target] = TargetReturn("auto").returns(task, trajectories.statistics())
    jobs = [Job(task, source.make_env, seed, target) for seed in evaluation_seeds(task, a.seed, a.episodes)]
    with Simulators(0) as simulators:
        episodes = rollout(policy(name, algorithm, target), interface_of("own", [trajectories]), jobs, simulators)
    success = float(episodes.successes.mean())
    what = {"algorithm": name, "task": task, "demonstrations": demonstrations}
    return what | settings(a) | {"updates": updates, "success": success}


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """What else decides a row."""
    return {"seed": a.seed, "seconds": a.seconds, "episodes": a.episodes, "dataset": a.dataset}


def document(rows: Sequence[dict[str, Any]], a: argparse.Namespace) -> str:
    tasks = sorted({row["task"] for row in rows})
    table = []
    for count in sorted({row["demonstrations"] for row in rows}):
        for name in ALGORITHMS:
            own = {r["task"]: r for r in rows if (r["algorithm"], r["demonstrations"]) == (name, count)}
            found = [own[task]["success"] for task in tasks if task in own]
            if found:
                each = [f"{own[task]['success']:.2f}" if task in own else "-" for task in tasks]
                updates = f"{int(np.median([r['updates'] for r in own.values()])):,}"
                table.append([str(count), name, *each, f"**{np.mean(found):.3f}**", updates])
    short = [task.split("/")[-1].removesuffix("-v3") for task in tasks]
    return "\n\n".join(
        [
            "# d3rlpy's algorithms on the same demonstrations",
            (__doc__ or "").split("\n\n")[2],
            f"`python -m benchmarks.peers --tasks {' '.join(a.tasks)} --demonstrations {' '.join(map(str, a.demonstrations))} "
            f"--algorithms {' '.join(a.algorithms)} "
            f"--seconds {a.seconds:g} --episodes {a.episodes} --seed {a.seed}`",
            "Share of the held-out goals solved at any step:",
            markdown(["demonstrations", "algorithm", *short, "mean", "updates, median"], table),
            f"{platform.machine()}, one thread; " + ", ".join(f"{k} {v}" for k, v in versions().items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["metaworld/cw10"])
    parser.add_argument("--demonstrations", nargs="+", type=int, default=[1, 5, 40])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument(
        "--dataset", help="Minari id with {task} in it; by default the expert's, collected where missing"
    )
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "peers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if settings(a).items() <= row.items()]  # of other settings: made anew
    done = {(row["algorithm"], row["task"], row["demonstrations"]) for row in rows}
    for count in a.demonstrations:
        for task in [own for name in a.tasks for own in expand_tasks(name)]:
            for name in a.algorithms:
                if (name, task, count) in done:
                    continue
                rows.append(cell(name, task, a, count))
                print(json.dumps(rows[-1]), flush=True)
                keep(path, rows)
    write_text(RESULTS / "peers.md", document(rows, a) + "\n")


def keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows so far, so that an interrupted run goes on where it was."""
    order = sorted(rows, key=lambda r: (r["demonstrations"], r["task"], ALGORITHMS.index(r["algorithm"])))
    write_text(path, "".join(json.dumps(row) + "\n" for row in order))


if __name__ == "__main__":
    main()
