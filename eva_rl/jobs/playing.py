"""A model's episodes in a task's environments, played or filmed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eva_rl import settings
from eva_rl.model import policy_of
from eva_rl.model.action_model import ActionModel
from eva_rl.rollout import LONGEST, Episodes, ForJobs, Job, Policy, Simulators, film, rollout
from eva_rl.training import autocast


@dataclass(frozen=True)
class Stage:
    """How models are played: where they compute, in which precision, and where their episodes are cut."""

    device: torch.device
    precision: str
    max_steps: int | None
    longest: int = LONGEST
    """Steps after which an episode is cut where neither `max_steps` nor the environment sets a limit."""

    def play(
        self,
        model: ActionModel,
        interface: str,
        jobs: Sequence[Job],
        simulators: Simulators,
        label: str = "roll out",
        finished: dict[int, tuple] | None = None,
        make_policy: ForJobs | None = None,
    ) -> Episodes:
        """One episode for each job (see `rollout`). Where `make_policy` is None, the policies are the model's."""
        policies, own = make_policy or policy_of(model, interface), model.interfaces[interface]
        with autocast(self.precision, self.device):
            return rollout(policies, own, jobs, simulators, self.device, label, finished, self.max_steps, self.longest)

    def film(
        self,
        model: ActionModel,
        interface: str,
        job: Job,
        make_policy: Callable[[int], Policy] | ForJobs | None = None,
        short: bool = False,
    ) -> np.ndarray:
        """(T, height, width, 3) uint8: the job's episode (see `film`), or its first steps at most if `short`."""
        limit = min(settings.FILM_STEPS, self.max_steps or settings.FILM_STEPS) if short else self.max_steps
        with autocast(self.precision, self.device), warnings.catch_warnings():
            if short:
                warnings.simplefilter(
                    "ignore"
                )  # the rollout has said all that there is to say, and a film has no score
            make_policy, own = make_policy or policy_of(model, interface), model.interfaces[interface]
            often = {"every": settings.FILM_EVERY} if short else {}  # software may take half a second for a frame
            return film(make_policy, own, job, self.device, limit, self.longest, **often)
