"""A return-conditioned model in a vector of environments: many episodes at once, each decided by its own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor
from tqdm import tqdm

from eva_rl.errors import UserError
from eva_rl.interface import Batch, Interface

LONGEST = 10_000
"""Steps after which an episode of an environment without a time limit is given up."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Actor(Protocol):
    """What a rollout needs of a model."""

    interfaces: dict[str, Interface]

    def act(self, history: Batch, step: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Episodes:
    """Finished episodes, in the order of their seeds."""

    returns: np.ndarray  # (n,) undiscounted
    lengths: np.ndarray  # (n,) steps
    successes: np.ndarray | None  # (n,) bool: solved at any step; None where the environment does not say


def rollout(
    model: Actor,
    make_env: Callable[[], gym.Env],
    interface: str,
    context: int,
    seeds: Sequence[int],
    target_return: float,
    device: torch.device | str = "cpu",
    label: str = "roll out",
    parallel: int = 50,
) -> Episodes:
    """Run one episode for each seed, `parallel` at a time, with greedy actions.

    The model first asks for `target_return`; every reward received is subtracted from what it asks for next.
    (Chen et al. 2021, algorithm 1.) It sees the last `context` steps.

    Raises:
        UserError: if the environment's spaces do not fit the interface, or it returns NaN.
    """
    seeds = list(seeds)
    if not seeds:
        raise UserError("episodes=0 was given where at least 1 episode was expected.")
    check_spaces(make_env, model.interfaces[interface])
    chunks = [seeds[i : i + parallel] for i in range(0, len(seeds), parallel)]
    with tqdm(total=len(seeds), desc=label, unit="episode", bar_format=BAR) as bar:
        parts = []
        for chunk in chunks:
            envs = SyncVectorEnv([make_env] * len(chunk))
            try:
                parts.append(_episodes(model, envs, interface, context, chunk, target_return, device, bar))
            finally:
                envs.close()
    says_success = any(part.successes is not None for part in parts)
    successes = [np.zeros(len(part.lengths), bool) if part.successes is None else part.successes for part in parts]
    return Episodes(
        returns=np.concatenate([part.returns for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        successes=np.concatenate(successes) if says_success else None,
    )


def check_spaces(make_env: Callable[[], gym.Env], interface: Interface) -> None:
    """Raise a `UserError` unless the environment's observations and actions are those of `interface`."""
    env = make_env()
    observations, actions = env.observation_space, env.action_space
    env.close()
    discrete = isinstance(actions, gym.spaces.Discrete)
    size = int(actions.n) if discrete else int(np.prod(actions.shape or ()))
    found = (int(np.prod(observations.shape or ())), "discrete" if discrete else "continuous", size)
    if found != interface.sizes:
        raise UserError(
            f"The environment '{env.spec.id if env.spec else env}' has observations {observations} and actions {actions}, "
            f"but the model's interface '{interface.name}' has observations of size {interface.observation_size} and "
            f"{interface.action_kind} actions of size {interface.action_size}."
        )


def _episodes(
    model: Actor,
    envs: SyncVectorEnv,
    name: str,
    context: int,
    seeds: Sequence[int],
    target_return: float,
    device: torch.device | str,
    bar: tqdm,
) -> Episodes:
    count, interface, space = envs.num_envs, model.interfaces[name], envs.single_action_space
    discrete = interface.action_kind == "discrete"
    history = Batch(
        observations=torch.zeros(count, context, interface.observation_size, device=device),
        actions=torch.zeros((count, context), dtype=torch.int64, device=device)
        if discrete
        else torch.zeros(count, context, interface.action_size, device=device),
        returns_to_go=torch.zeros(count, context, device=device),
        rewards=torch.zeros(count, context, device=device),
        mask=torch.ones(count, context, dtype=torch.bool, device=device),
        interface=name,
    )
    observations, infos = envs.reset(seed=list(seeds))
    returns, lengths, running = np.zeros(count), np.zeros(count, np.int64), np.ones(count, bool)
    says_success = "success" in infos
    successes = np.zeros(count, bool)
    wanted = np.full(count, target_return)
    finished = bar.n
    spec = envs.envs[0].spec
    limit = (spec.max_episode_steps if spec else None) or LONGEST
    step = 0
    while running.any():
        if step > max(limit, LONGEST):
            raise UserError(
                f"An episode did not end within {step} steps: make the environment with max_episode_steps, or wrap it in "
                "gymnasium.wrappers.TimeLimit."
            )
        if not np.isfinite(observations[running]).all():
            raise UserError(f"The environment returned observations that are NaN or infinite at step {step}.")
        position = min(step, context - 1)
        if step >= context:  # the oldest step leaves
            for column in (history.observations, history.actions, history.returns_to_go, history.rewards):
                column[:, :-1] = column[:, 1:].clone()
        history.observations[:, position] = torch.as_tensor(observations.reshape(count, -1), dtype=torch.float32)
        history.returns_to_go[:, position] = torch.as_tensor(wanted, dtype=torch.float32)
        history.actions[:, position] = 0
        history.rewards[:, position] = 0
        seen = Batch(**{k: v if k == "interface" else v[:, : position + 1] for k, v in vars(history).items()})
        chosen = model.act(seen, torch.full((count,), position, device=device))  # (n, act) or (n,)
        history.actions[:, position] = chosen
        actions = chosen.cpu().numpy()
        if discrete:
            actions = actions + space.start
        else:
            actions = np.clip(actions.reshape(count, *space.shape), space.low, space.high).astype(space.dtype)
            history.actions[:, position] = torch.as_tensor(actions.reshape(count, -1), dtype=torch.float32)
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        if not np.isfinite(rewards[running]).all():
            raise UserError(f"The environment returned a reward that is NaN or infinite at step {step}.")
        history.rewards[:, position] = torch.as_tensor(rewards, dtype=torch.float32)
        wanted = wanted - rewards
        returns += np.where(running, rewards, 0.0)
        lengths += running
        if "success" in infos:
            says_success = True
            successes |= running & (np.asarray(infos["success"], float) > 0)
        ended = running & (terminations | truncations)
        # A running episode counts for its share of the time limit.
        running &= ~ended
        step += 1
        bar.n = finished + int((~running).sum()) + min(step / limit, 1.0) * int(running.sum())
        bar.update(0)
    return Episodes(returns, lengths, successes if says_success else None)
