"""What a model, or a library of adapters, scores in each task of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eva_rl.data import TaskSource, Trajectories
from eva_rl.errors import UserError
from eva_rl.library import Library
from eva_rl.library.serve import Adapters, MixedDecoder
from eva_rl.library.which import nearest
from eva_rl.model import policy_of
from eva_rl.model.action_model import ActionModel
from eva_rl.rollout import ForJobs, Job, Policy, Simulators, TargetReturn, rollout
from eva_rl.run import scores
from eva_rl.seeding import evaluation_seeds
from eva_rl.spaces import flatten
from eva_rl.training import autocast


@dataclass(frozen=True)
class Stage:
    """Where a sequence's tasks are played."""

    sources: Sequence[TaskSource]
    trajectories: Sequence[Trajectories]
    interface: str
    episodes: int
    seed: int
    simulators: Simulators
    device: torch.device
    precision: str
    max_steps: int | None = None

    def jobs(self, number: int, tokens: Sequence[str]) -> list[Job]:
        """The episodes of task `number`."""
        source = self.sources[number]
        [target] = TargetReturn().wanted(source.task, self.trajectories[number].statistics(), tokens)
        seeds = evaluation_seeds(source.task, self.seed, self.episodes)
        return [Job(source.task, source.make_env, seed, target) for seed in seeds]

    def score(
        self, number: int, model: ActionModel, make_policy: Callable[[int], Policy] | ForJobs | None = None
    ) -> float:
        """The success rate in task `number`, or its normalised score where the environment does not say.

        Raises:
            UserError: if there is neither.
        """
        source = self.sources[number]
        jobs = self.jobs(number, model.embedder_of(self.interface).tokens)
        make_policy = make_policy or policy_of(model, self.interface)
        with autocast(self.precision, self.device):
            spec = model.interfaces[self.interface]
            episodes = rollout(
                make_policy, spec, jobs, self.simulators, self.device, source.task, max_steps=self.max_steps
            )
        found = scores(episodes, source.score_scale)
        for name in ("success_rate", "normalized_score"):
            estimate = found[name]
            if estimate is not None:
                return estimate.mean
        raise UserError(f"'{source.task}' says neither success nor has reference scores: take tasks that do.")

    def score_found(self, number: int, library: Library) -> float:
        """The score in task `number` of the adapters that are found by each episode's first observation."""
        adapters = Adapters.load(library, [entry.name for entry in library.entries], self.device)
        jobs = self.jobs(number, adapters.model.embedder_of(self.interface).tokens)
        first = np.stack([_first_observation(job) for job in jobs])  # (n, obs)
        names = nearest(library, torch.from_numpy(first))
        chosen = dict(zip([job.seed for job in jobs], adapters.numbers(names), strict=True))
        make = ForJobs(lambda group: MixedDecoder(adapters, [chosen[job.seed] for job in group]))
        return self.score(number, adapters.model, make)


def _first_observation(job: Job) -> np.ndarray:
    """What the episode begins with, flat: (obs,)."""
    env = job.make_env()
    try:
        observation, _ = env.reset(seed=job.seed)
        return flatten(env.observation_space, observation)
    finally:
        env.close()
