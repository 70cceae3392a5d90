"""Minari dataset -> packed tensors, once; and the statistics a model needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from eva_rl.errors import UserError
from eva_rl.interface import Interface, TaskStatistics


@dataclass(frozen=True)
class Trajectories:
    """All episodes of one task, end to end: episode e is rows `starts[e]` to `starts[e + 1]` (excluded)."""

    task: str
    observations: Tensor  # (N, obs) float32
    actions: Tensor  # (N, act) float32, or (N,) int64 for discrete actions
    rewards: Tensor  # (N,) float32
    returns_to_go: Tensor  # (N,) float32
    starts: Tensor  # (E + 1,) int64
    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box | gym.spaces.Discrete
    successes: Tensor | None = None  # (E,) bool

    @property
    def lengths(self) -> Tensor:
        return self.starts.diff()  # (E,)

    @property
    def episode_returns(self) -> Tensor:
        return self.returns_to_go[self.starts[:-1]]  # (E,)

    def statistics(self) -> TaskStatistics:
        return TaskStatistics(
            episodes=len(self.lengths),
            return_max=float(self.episode_returns.max()),
            return_mean=float(self.episode_returns.mean()),
            success_rate=None if self.successes is None else float(self.successes.float().mean()),
            return_deciles=tuple(
                torch.quantile(self.episode_returns.double(), torch.linspace(0, 1, 11).double()).tolist()
            ),
        )


def returns_to_go(rewards: np.ndarray) -> np.ndarray:
    """Undiscounted sums of the rewards (T,) from each step to the end, summed in float64. (Chen et al. 2021, eq. 2)"""
    return np.cumsum(rewards[::-1].astype(np.float64))[::-1].astype(np.float32)


def pack(
    task: str,
    episodes: Sequence[dict[str, np.ndarray]],
    observation_space: gym.spaces.Box,
    action_space: gym.spaces.Box | gym.spaces.Discrete,
) -> Trajectories:
    """Join episodes, each a dict of observations (T or T + 1, obs), actions (T, act) or (T,), rewards (T,), success.

    An observation after the last action is dropped: nothing was done there.

    Raises:
        UserError: if an episode is empty, of other shapes, or holds NaN or infinite numbers; it names the episode.
    """
    if not episodes:
        raise UserError(f"The dataset of '{task}' holds no episode: collect or download it again.")
    observation_size = int(np.prod(observation_space.shape))
    discrete = isinstance(action_space, gym.spaces.Discrete)
    columns: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "rewards": [], "returns_to_go": []}
    for number, episode in enumerate(episodes):
        rewards = np.asarray(episode["rewards"], np.float32)
        length = len(rewards)
        if length == 0:
            raise UserError(f"Episode {number} of the dataset of '{task}' is empty: remove it from the dataset.")
        if len(episode["actions"]) != length or len(episode["observations"]) not in (length, length + 1):
            raise UserError(
                f"Episode {number} of the dataset of '{task}' has {length} rewards, {len(episode['actions'])} actions "
                f"and {len(episode['observations'])} observations, where T, T and T + 1 were expected."
            )
        observations = np.asarray(episode["observations"][:length], np.float32)
        with np.errstate(over="ignore"):  # becomes infinite, and is refused below
            actions = np.asarray(episode["actions"], None if discrete else np.float32)
        expected = () if discrete else action_space.shape
        shapes = observations.shape[1:], actions.shape[1:], rewards.shape[1:]
        if shapes != (observation_space.shape, expected, ()):
            raise UserError(
                f"Episode {number} of the dataset of '{task}' has observations, actions and rewards of the shapes "
                f"{shapes}, where the dataset's spaces ask for {(observation_space.shape, expected, ())}."
            )
        if discrete and not all(action_space.contains(action) for action in np.unique(actions)):
            raise UserError(f"Episode {number} of the dataset of '{task}' has actions outside {action_space}.")
        if not (np.isfinite(observations).all() and np.isfinite(rewards).all() and np.isfinite(actions).all()):
            raise UserError(f"Episode {number} of the dataset of '{task}' holds NaN or infinite numbers: remove it.")
        columns["observations"].append(observations.reshape(length, observation_size))
        columns["actions"].append(
            actions.astype(np.int64) - action_space.start
            if discrete
            else actions.astype(np.float32).reshape(length, -1)
        )
        columns["rewards"].append(rewards)
        columns["returns_to_go"].append(returns_to_go(rewards))
    lengths = [len(rewards) for rewards in columns["rewards"]]
    successes = [episode["success"].max() > 0 for episode in episodes if episode.get("success") is not None]
    return Trajectories(
        task=task,
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()},
        starts=torch.from_numpy(np.cumsum([0, *lengths])),
        observation_space=observation_space,
        action_space=action_space,
        successes=torch.tensor(successes) if len(successes) == len(episodes) else None,
    )


def interface_of(name: str, trajectories: Sequence[Trajectories], std_floor: float = 0.01) -> Interface:
    """The interface of training trajectories that share their spaces, every task weighing the same.

    No observation dimension's standard deviation is taken to be less than `std_floor` times the median over the
    dimensions that move at all. Without a floor a dimension that rests during pretraining would be divided by nearly
    zero, and a target task in which it moves would drown every other input: a base for unseen tasks wants a high one
    (pretraining takes 1.5). A single task's own statistics need one only against division by zero.

    Actions of a bounded space are scaled to [-1, 1] by its bounds, others by their mean and standard deviation.

    Raises:
        UserError: if the trajectories' spaces differ, or the floor is not above 0.
    """
    if not std_floor > 0:
        raise UserError(f"std_floor={std_floor} was given where a number above 0 was expected.")
    first = trajectories[0]
    for other in trajectories[1:]:
        if (
            other.observations.shape[1:] != first.observations.shape[1:]
            or other.actions.shape[1:] != first.actions.shape[1:]
            or other.action_space != first.action_space
        ):
            raise UserError(
                f"The tasks '{first.task}' and '{other.task}' differ in their spaces "
                f"({first.observation_space.shape}, {first.action_space} and {other.observation_space.shape}, "
                f"{other.action_space}): train them apart."
            )
    means = torch.stack([t.observations.double().mean(0) for t in trajectories])  # (tasks, obs)
    squares = torch.stack([t.observations.double().square().mean(0) for t in trajectories])
    mean = means.mean(0)
    std = (squares.mean(0) - mean.square()).clamp(min=0).sqrt()
    moving = std[std > 1e-6 * (1 + mean.abs())]
    std = std.clamp(min=std_floor * float(moving.median()) if len(moving) else 1.0)
    discrete = isinstance(first.action_space, gym.spaces.Discrete)
    action_mean, action_scale = ((), ()) if discrete else _action_range(trajectories)
    return Interface(
        name=name,
        observation_size=first.observations.shape[1],
        action_kind="discrete" if discrete else "continuous",
        action_size=int(first.action_space.n) if discrete else first.actions.shape[1],
        observation_mean=tuple(mean.tolist()),
        observation_std=tuple(std.tolist()),
        action_mean=action_mean,
        action_scale=action_scale,
        return_scale=max(float(t.returns_to_go.abs().max()) for t in trajectories) or 1.0,
        reward_scale=max(float(t.rewards.abs().max()) for t in trajectories) or 1.0,
    )


def _action_range(trajectories: Sequence[Trajectories]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Centre and half-width of the actions' range: from the space where it is bounded, else from the data."""
    space = trajectories[0].action_space
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    actions = torch.cat([t.actions for t in trajectories]).double()
    bounded = np.isfinite(low) & np.isfinite(high) & (high > low)
    low, high = np.where(bounded, low, 0), np.where(bounded, high, 0)
    mean = np.where(bounded, (low + high) / 2, actions.mean(0).numpy())
    scale = np.where(bounded, (high - low) / 2, actions.std(0, correction=0).numpy().clip(1e-3))
    return tuple(mean.tolist()), tuple(scale.tolist())
