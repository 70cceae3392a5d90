"""Acting in an environment's own observations and actions: the rollouts' actor, with the environment's spaces at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from eva_rl.errors import UserError, in_one_line
from eva_rl.model import policy_of
from eva_rl.prepared import shape_of
from eva_rl.rollout import Actor, TargetReturn
from eva_rl.spaces import action_row, action_rows, flatten, nested, parts_of, to_action, together
from eva_rl.table import counted

if TYPE_CHECKING:
    import torch

    from eva_rl.interface import Interface, TaskStatistics
    from eva_rl.model.action_model import ActionModel

NO_OBSERVATION = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""What numpy raises for values that are no observation of a space, and torch for tensors that numpy can't read."""


class ActingPolicy:
    """Acts greedily in one task, an episode or several at a time: `reset`, then `act` and `observe` in turns.

    Without a call of `observe` a step is taken to have earned nothing, and to have been done as `act` said.
    """

    def __init__(
        self,
        model: ActionModel,
        interface: Interface,
        task: str,
        spaces: tuple[gym.Space, gym.Space],
        statistics: TaskStatistics | None = None,
        device: torch.device | str = "cpu",
    ):
        self.model, self.interface, self.task, self.statistics = model, interface, task, statistics
        self.observation_space, self.action_space = spaces
        self._parts = parts_of(self.observation_space)
        self._make_policy, self._device = policy_of(model, interface.name, alone=True), device
        self._actor: Actor | None = None
        self._done: np.ndarray | None = None
        """The last action, (n, act), until it is known what it earned."""
        self._acted = False

    @property
    def typical_return(self) -> float:
        """What it asks for unless told, as a rollout does: `auto` of `eva_rl.rollout.TargetReturn`.

        Raises:
            UserError: if nothing is known of the task's returns.
        """
        return self._returns(TargetReturn())

    def reset(self, target_return: float | str | Sequence[float] | None = None) -> None:
        """Begin an episode, or as many as the next call has observations.

        Args:
            target_return: what to ask for, in the task's undiscounted reward. This is a number, one for each episode,
                or a word that `python -m eva_rl.evaluate` takes as `target_return`. With None, it is
                `typical_return`, which that command also asks for unless told.

        Raises:
            UserError: if that is no return, or nothing is known of the task's and none was given.
        """
        if target_return is None:
            target_return = self.typical_return
        elif isinstance(target_return, str | int | float):
            asked = TargetReturn(str(target_return))
            if asked.sweeps:
                raise UserError("target_return must be one return, got sweep.")
            target_return = self._returns(asked)
        try:
            self._target = np.asarray(target_return, np.float64)
        except (TypeError, ValueError):
            self._target = np.array(np.nan)
        if not self._target.size or self._target.ndim > 1 or not np.isfinite(self._target).all():
            raise UserError(f"target_return must be a finite number, or one for each episode, got {target_return}.")
        self._begin(self._target.size)

    def _returns(self, asked: TargetReturn) -> float:
        [found] = asked.wanted(self.task, self.statistics, self.model.embedder_of(self.interface.name).tokens)
        return found

    def act(self, observation: Any) -> Any:
        """The action for the environment's observation, in the environment's units, shape and type.

        Raises:
            UserError: if that is not an observation of `observation_space`, or several episodes are running.
        """
        return to_action(self.action_space, self._choose(self._rows(observation, ())[None])[0])

    def act_batch(self, observations: Any) -> Any:
        """The actions (n, ...) of n episodes that step together, for observations with a leading axis of n.

        Those of a Dict are a dict of such arrays, those of a Tuple a tuple, as vector environments have them. So are actions. An episode's
        actions do not depend on those beside it.

        Raises:
            UserError: if those are not observations of `observation_space`, or not of as many episodes as are running.
        """
        rows = self._choose(self._rows(observations, (None,)))
        return together(self.action_space, [to_action(self.action_space, row) for row in rows])

    def observe(self, reward: float | np.ndarray, action: Any = None) -> None:
        """What the last action earned: a number, or one (n,) for each episode.

        Args:
            action: what was done in the end, where that is not what `act` said. After `act_batch`, a batch of it.

        Raises:
            UserError: if the reward is not finite, or there was no action.
        """
        if self._done is None:
            raise UserError("observe() was called without an action to observe: act() comes first.")
        rewards = np.asarray(reward, np.float64).reshape(-1)
        if rewards.shape not in ((1,), (len(self._done),)) or not np.isfinite(rewards).all():
            raise UserError(f"The reward must be {counted(len(self._done), 'finite number')}, got {reward}.")
        if action is not None:
            self._done = self._what_was_done(action, self._done)
        self._running.observe(self._done, np.full(len(self._done), rewards))
        self._done = None

    def keep(self, episodes: Sequence[int]) -> None:
        """Go on with these of the running episodes, by their numbers, because the others have ended.

        Raises:
            UserError: if they are not some of those running.
        """
        running = 0 if self._actor is None else len(self._actor.wanted)
        chosen = np.asarray(episodes)
        numbers = (
            chosen.ndim == 1 and np.issubdtype(chosen.dtype, np.integer) and len(set(chosen.tolist())) == len(chosen)
        )
        if not numbers or not len(chosen) or chosen.min() < 0 or chosen.max() >= running:
            raise UserError(f"Episodes {list(episodes)} were to be kept, but there are {running}, numbered from 0.")
        self._settle()
        self._running.keep(chosen)

    @property
    def _running(self) -> Actor:
        """The actor of the episodes that are running, which `reset` makes."""
        assert self._actor is not None
        return self._actor

    def _begin(self, episodes: int) -> None:
        targets = np.broadcast_to(self._target, (episodes,))
        self._actor = Actor(self._make_policy(episodes), self.interface, targets, self._device)
        self._done, self._acted = None, False

    def _choose(self, rows: np.ndarray) -> np.ndarray:
        """The actions' rows (n, act) for flat observations (n, obs)."""
        if self._actor is None:
            self.reset()
        running = len(self._running.wanted)
        if len(rows) != running:
            if self._acted or self._target.size > 1:
                raise UserError(
                    f"There must be one observation for each of the {running} episodes that are running, got {len(rows)}: reset() begins "
                    "anew, keep() goes on with some."
                )
            self._begin(len(rows))
        self._settle()
        chosen, self._acted = self._running.act(rows), True
        self._done = np.stack([action_row(self.action_space, to_action(self.action_space, row)) for row in chosen])
        return chosen

    def _what_was_done(self, action: Any, chosen: np.ndarray) -> np.ndarray:
        """The rows (n, act) of an action, or of a batch of them, in the place of those that `act` chose."""
        if nested(self.action_space):
            return self._parts_done(action, chosen)
        expected = len(chosen), *shape_of(self.action_space)
        try:
            actions = np.asarray(action, np.float64).reshape(expected)
        except (TypeError, ValueError):
            actions = np.array([np.nan])
        space = self.action_space
        fits = (space.contains(one.astype(space.dtype)[()]) and (one % 1 == 0).all() for one in actions)
        if not np.isfinite(actions.astype(np.float32)).all() or not (isinstance(space, gym.spaces.Box) or all(fits)):
            raise UserError(f"The action must be {len(chosen)} of {space}, got {action}.")
        return np.stack([action_row(self.action_space, one) for one in actions])

    def _parts_done(self, action: Any, chosen: np.ndarray) -> np.ndarray:
        """The same, of actions of several parts."""
        try:
            rows = np.atleast_2d(action_rows(self.action_space, action))
            actions = [to_action(self.action_space, row) for row in rows]
            kept = np.stack([action_row(self.action_space, own) for own in actions])
            fits = all(map(self.action_space.contains, actions)) and np.isfinite(rows.astype(np.float32)).all()
        except NO_OBSERVATION:
            rows = kept = np.zeros((0, 0))
            fits = False
        choices = [bool(part.choices) for part in self.interface.action_parts for _ in range(part.size)]
        if not fits or rows.shape != chosen.shape or (rows != kept)[:, choices].any():
            raise UserError(f"The action must be {len(chosen)} of {self.action_space}, got {action}.")
        return rows

    def _settle(self) -> None:
        if self._done is not None:
            self.observe(0.0)

    def _rows(self, observations: Any, leading: tuple) -> np.ndarray:
        """Flat observations, (obs,) or (n, obs)."""
        try:
            rows = flatten(self.observation_space, observations, self._parts)
        except UserError as error:
            raise UserError(f"{self._expected()} {error}.") from error
        except NO_OBSERVATION as error:
            raise UserError(f"{self._expected()} another kind of value ({in_one_line(error)}).") from error
        if rows.ndim != 1 + len(leading) or rows.shape[-1] != self.interface.observation_size or not rows.size:
            of = "a batch of arrays" if leading else "arrays"
            raise UserError(f"{self._expected()} {of} of other shapes, which make up {rows.shape}.")
        if not np.isfinite(rows).all():
            raise UserError(f"{self._expected()} NaN or infinite numbers.")
        return rows

    def _expected(self) -> str:
        return f"'{self.task}' has observations {self.observation_space}, but what was given has"
