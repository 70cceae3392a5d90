"""Augmented Random Search (Mania et al. 2018, https://arxiv.org/abs/1803.07055): linear policies from returns alone.

Written here rather than taken from sb3-contrib, whose policies are torch modules: at a simulator step of 0.05 ms, the step of
such a module would take most of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from eva_rl.files import write_arrays
from eva_rl.prepared import shape_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Search:
    """Settings of the search, with the names of the paper's algorithm 2 in brackets."""

    directions: int = 16
    """Perturbations an iteration, each tried in both signs [N]."""
    best: int = 8
    """Of them, those that the update uses [b]."""
    step_size: float = 0.02
    """[alpha]"""
    noise: float = 0.03
    """Standard deviation of the perturbations [nu]."""
    alive_bonus: float = 0.0
    """What the environment pays for each step in which the body has not fallen. This is taken off, as in the paper,
    section 4.1."""
    horizon: int = 1000
    """Steps an episode at the start of the search."""
    growth: float = 0.0
    """Steps by which episodes get longer each iteration, up to the environment's limit."""
    discrete: bool = False
    """Whether the largest of the outputs chooses the action."""


@dataclass
class State:
    """All that a search goes on from."""

    weights: Floats  # (act, obs)
    mean: Floats  # (obs,) of all observations so far
    squares: Floats  # (obs,) sum of their squared deviations
    count: float = 0.0
    iteration: int = 0
    steps: int = 0
    snapshots: list[Floats] = field(default_factory=list)  # each (act, obs + 1), the last column the bias
    scores: list[float] = field(default_factory=list)  # mean return of each
    at: list[int] = field(default_factory=list)  # environment steps at each

    def affine(self, weights: Floats) -> Floats:
        """The policy with the normalisation of observations folded in: (act, obs + 1), the last column its bias."""
        deviation = np.sqrt(self.squares / max(self.count, 1.0))
        # The paper leaves entries that hardly change out, by an infinite deviation.
        scaled = weights / np.where(deviation < 1e-6, np.inf, deviation)
        return np.concatenate([scaled, -scaled @ self.mean[:, None]], axis=1)

    def observe(self, observations: Floats) -> None:
        """Take (T, obs) observations into mean and squares (Chan et al. 1979, equation 2.1)."""
        count, mean = len(observations), observations.mean(0)
        squares = ((observations - mean) ** 2).sum(0)
        total, apart = self.count + count, mean - self.mean
        self.squares += squares + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total


def new_state(env: gym.Env) -> State:
    actions = env.action_space
    outputs = int(actions.n) if isinstance(actions, gym.spaces.Discrete) else math.prod(shape_of(actions))
    inputs = math.prod(shape_of(env.observation_space))
    return State(np.zeros((outputs, inputs)), np.zeros(inputs), np.zeros(inputs))


def time_limit(env: gym.Env) -> int:
    """The steps after which the environment cuts an episode."""
    limit = env.spec.max_episode_steps if env.spec is not None else None
    assert limit is not None, env
    return limit


def play(env: gym.Env, policy: Floats, seed: int, limit: int, discrete: bool = False) -> tuple[float, Floats]:
    """The return of one episode of at most `limit` steps, and its observations (T, obs)."""
    weights, bias = policy[:, :-1], policy[:, -1]
    low, high = (
        (env.action_space.low, env.action_space.high) if isinstance(env.action_space, gym.spaces.Box) else (0, 0)
    )
    observation, _ = env.reset(seed=seed)
    seen, total, ended = [], 0.0, False
    while not ended and len(seen) < limit:
        seen.append(observation)
        output = weights @ observation + bias
        action = int(output.argmax()) if discrete else np.minimum(np.maximum(output, low), high)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        ended = terminated or truncated
    return total, np.array(seen, np.float64)


def iterate(env: gym.Env, state: State, search: Search, seed: int) -> float:
    """Do one iteration of algorithm 2 (V2-t) and return the mean return of its episodes."""
    rng = np.random.default_rng((seed, state.iteration))
    deltas = rng.standard_normal((search.directions, *state.weights.shape))
    starts = rng.integers(2**30, size=search.directions)
    limit = int(min(search.horizon + search.growth * state.iteration, time_limit(env)))
    returns, bonuses, seen = np.zeros((search.directions, 2)), np.zeros((search.directions, 2)), []
    for i, (delta, start) in enumerate(zip(deltas, starts, strict=True)):
        for j, sign in enumerate((1, -1)):
            policy = state.affine(state.weights + sign * search.noise * delta)
            returns[i, j], observations = play(env, policy, int(start), limit, search.discrete)
            bonuses[i, j] = search.alive_bonus * len(observations)
            seen.append(observations)
    gains = returns - bonuses
    best = np.argsort(-gains.max(1), kind="stable")[: search.best]
    scale = search.best * (gains[best].std() + 1e-8)
    state.weights += search.step_size / scale * np.tensordot(gains[best, 0] - gains[best, 1], deltas[best], 1)
    for observations in seen:
        state.observe(observations)
        state.steps += len(observations)
    state.iteration += 1
    return float(returns.mean())


def snapshot(env: gym.Env, state: State, search: Search, episodes: int = 3) -> float:
    """Keep the policy as it is now, with its mean return over some episodes."""
    policy = state.affine(state.weights)
    limit = time_limit(env)
    # Neither the search's own seeds nor those that scores are reported on.
    returns = [play(env, policy, 2**31 - 1 - episode, limit, search.discrete)[0] for episode in range(episodes)]
    state.snapshots.append(policy)
    state.scores.append(float(np.mean(returns)))
    state.at.append(state.steps)
    return state.scores[-1]


def save(path: Path, state: State) -> None:
    write_arrays(path, vars(state))


def restore(path: Path) -> State:
    with np.load(path, allow_pickle=False) as stored:
        fields: dict[str, Any] = dict(stored)
    fields |= {name: fields[name].item() for name in ("count", "iteration", "steps")}
    fields |= {name: list(fields[name]) for name in ("snapshots", "scores", "at")}
    return State(**fields)
