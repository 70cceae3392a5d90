"""What every domain file in this folder offers: its tasks, their environments, an expert, a scale for scores.

A new domain is one new file that defines a subclass of `Domain` and a module-level `DOMAIN = ThatClass()`, and an extra in
pyproject.toml for its packages. The simulator is imported inside the methods, never at the top of the file, so that listing tasks stays
instant and a missing package is met only where it is needed.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from eva_rl.errors import MissingExtra

Policy = Callable[[Any], Any]
"""Maps one observation of the environment's space to one action of its space."""


@dataclass(frozen=True)
class ReferenceScores:
    """Mean undiscounted episode returns of a uniformly random policy and of the domain's expert on one task."""

    random: float
    expert: float


def time_limit(registered: str) -> int:
    """The steps after which gymnasium cuts an episode of the environment of this id."""
    steps = gym.spec(registered).max_episode_steps
    assert steps is not None, registered
    return steps


class Domain(ABC):
    """A family of tasks that share a simulator.

    Environments of a domain follow Gymnasium's API. `reset(seed=s)` decides everything random in the episode. Where
    tasks have a notion of success, `info["success"]` says whether the task is solved in the state reached.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    """The optional dependency group that installs the simulator: `pip install eva_rl[extra]`."""
    tasks: ClassVar[tuple[str, ...]]
    splits: ClassVar[dict[str, tuple[str, ...]]]
    shared_spaces: ClassVar[bool] = True
    """Whether all tasks go through one interface. Otherwise each has its own."""

    @abstractmethod
    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        """The environment of task `name`, truncated after so many steps, with a `spec` that recreates it."""

    @abstractmethod
    def expert(self, name: str, env: gym.Env) -> Policy:
        """A scripted policy that solves task `name`, for one episode of `env`, which has just been reset.

        It may look into the environment, and keep a state of its own.
        """

    def registered(
        self, environment: str, called: str, steps: int, render_mode: str | None = None, /, **settings: Any
    ) -> gym.Env:
        """An environment of this domain's class of that name, known as `<domain>/<called>` and truncated after so many steps.

        Its spec recreates it. `settings` are the class's own, by default the task's name alone.
        """
        spec = EnvSpec(
            id=f"{self.name}/{called}",
            entry_point=f"eva_rl.envs.{self.name}:{environment}",
            max_episode_steps=steps,
            disable_env_checker=True,
            kwargs=settings or {"name": called},
        )
        return gym.make(spec, render_mode=render_mode)

    def qualities(self, name: str) -> tuple[str, ...]:
        """The kinds of demonstrators that task `name` has, the default first."""
        return ("expert",)

    def demonstrator(self, name: str, env: gym.Env, quality: str, episode: int) -> Policy:
        """The policy of this quality that plays the episode of this number, `env` having just been reset."""
        return self.expert(name, env)

    def interface(self, name: str) -> str:
        """The name of the interface that task `name` goes through.

        Tasks of one interface share their spaces.
        """
        return self.name if self.shared_spaces else f"{self.name}_{name.replace('-', '_')}"

    def mirror(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """What the mirror image of task `name` shows and does: the signs (obs,) and (act,) by which observations and actions are multiplied.

        None where the task's world has no plane of symmetry, or none that single signs describe.
        """
        return None

    def reference_scores(self, name: str) -> ReferenceScores | None:
        """The score scale of task `name`, from `<domain>_scores.json` beside the domain's file.

        None if it was not measured.
        """
        path = Path(__file__).with_name(f"{self.name}_scores.json")
        table: dict[str, dict[str, Any]] = json.loads(path.read_text())["tasks"] if path.is_file() else {}
        row = table.get(name)
        return ReferenceScores(row["random"], row["expert"]) if row else None

    def require(self, module: str) -> ModuleType:
        """Import an optional package of this domain.

        Raises:
            MissingExtra: if it is not installed, naming the extra that installs it.
        """
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise MissingExtra(self.name, self.extra, error.name) from error
