"""A domain's expert -> Minari dataset: parallel, reproducible from the seed, and safe to interrupt."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import minari
import numpy as np
from filelock import FileLock, Timeout
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

import eva_rl
from eva_rl.cores import GUARD, available_cores, end_with_parent, one_core_each, refuse_while_imported
from eva_rl.envs import find_task
from eva_rl.errors import UserError
from eva_rl.files import check_space, make_folder, replacing, write_arrays
from eva_rl.seeding import episode_rng, episode_seed
from eva_rl.settings import NOISE

EXPERT_ACTION = "expert_action"
"""What the expert would have done, without the noise: an entry of every step's info in a collected dataset."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the content of a collected dataset."""

    task: str
    episodes: int = 40
    noise: tuple[float, ...] = NOISE
    """Standard deviations of the Gaussian noise added to the expert's actions, in units of half the action range.
    Episodes take them in turn."""
    seed: int = 0
    quality: str = "expert"
    """Who plays: one of the task's `Domain.qualities`."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise UserError(f"episodes to collect must be at least 1, got {self.episodes}.")
        if self.seed < 0:
            raise UserError(f"seed must be a whole number of at least 0, got {self.seed}.")
        if not self.noise or not all(0 <= scale <= 100 for scale in self.noise):
            raise UserError(f"noise must be one or more numbers from 0 to 100, got {list(self.noise)}.")

    @property
    def dataset_id(self) -> str:
        """The Minari id this recipe's dataset is stored under, which is equal for equal recipes."""
        noise = "" if self.noise == Recipe.noise else "-noise" + "_".join(f"{100 * s:.12g}" for s in self.noise)
        return f"{self.task}/{self.quality}{noise.replace('.', 'p')}-{self.episodes}-seed{self.seed}-v0"

    @property
    def staging(self) -> Path:
        """Where finished episodes wait until all are there. Recipes that differ in length alone share it."""
        noise = "_".join(f"{s:.12g}" for s in self.noise)
        quality = "" if self.quality == "expert" else f"-{self.quality}"
        return get_dataset_path() / ".collecting" / f"{self.task.replace('/', '.')}{quality}-{noise}-seed{self.seed}"


def collect(recipes: Sequence[Recipe], workers: int = 0) -> list[str]:
    """Collect each recipe's dataset unless it is there already, and return their Minari ids.

    Finished episodes survive an interruption and are not collected again. A dataset appears under its id only when it
    is whole. Its content does not depend on `workers` (0: one process for each core). If several processes collect at
    once, one does the work and the others wait for it.

    Raises:
        UserError: if there are fewer than 0 workers, if one dies (as in a script without `if __name__ == "__main__":`),
            or if a task doesn't have the quality.
    """
    refuse_while_imported()
    if workers < 0:
        raise UserError(f"workers must be at least 0, got {workers}.")
    recipes = list(recipes)
    for recipe in (missing := _missing(recipes)):
        domain, name = find_task(recipe.task)
        if recipe.quality not in (known := domain.qualities(name)):
            raise UserError(f"quality of {recipe.task} must be {' or '.join(known)}, got {recipe.quality}.")
        domain.make(name).close()  # a missing extra is met here, before anything is written
    if missing:
        lock = FileLock(make_folder(get_dataset_path()) / ".collecting.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print("Another process is collecting; waiting for it to end.", file=sys.stderr)
            lock.acquire()
        try:
            _collect(_missing(recipes), workers)
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it makes another
        finally:
            lock.release()
    return [recipe.dataset_id for recipe in recipes]


def _missing(recipes: Sequence[Recipe]) -> list[Recipe]:
    root = datasets_root()
    return [recipe for recipe in dict.fromkeys(recipes) if not (root / recipe.dataset_id / "data").is_dir()]


def _collect(missing: Sequence[Recipe], workers: int) -> None:
    for recipe in missing:
        make_folder(recipe.staging)
    jobs = [
        (recipe, episode)
        for recipe in missing
        for episode in range(recipe.episodes)
        if not _staged(recipe, episode).is_file()
    ]
    total = sum(recipe.episodes for recipe in missing)
    workers = min(workers or available_cores(), max(len(jobs), 1))
    with tqdm(total=total, initial=total - len(jobs), desc="collect", unit="episode", disable=not missing) as bar:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _begin_worker)
        try:
            unfinished = {recipe: sum(r == recipe for r, _ in jobs) for recipe in missing}
            for recipe in missing:
                if not unfinished[recipe]:  # interrupted between its last episode and its assembly
                    _assemble(recipe)
            with one_core_each():
                futures = {pool.submit(_stage_episode, *job, _staged(*job)): job[0] for job in jobs}
            for future in as_completed(futures):
                future.result()
                bar.update()
                recipe = futures[future]
                unfinished[recipe] -= 1
                if not unfinished[recipe]:
                    _assemble(recipe)
        except BrokenProcessPool as error:
            raise UserError(f"A worker process ended without a word: {GUARD}, or see what killed it.") from error
        else:
            for recipe in missing:  # only now: recipes that differ in length alone share their episodes
                shutil.rmtree(recipe.staging, ignore_errors=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _staged(recipe: Recipe, episode: int) -> Path:
    return recipe.staging / f"episode-{episode:05d}.npz"


@cache
def _environment(task: str) -> gym.Env:
    domain, name = find_task(task)
    return domain.make(name)


def _stage_episode(recipe: Recipe, episode: int, path: Path) -> None:
    """Roll out one episode of the noisy expert and write it to `path` (runs in a worker process)."""
    domain, name = find_task(recipe.task)
    env = _environment(recipe.task)
    rng = episode_rng(recipe.task, recipe.seed, episode)
    noise = recipe.noise[episode % len(recipe.noise)]
    observation, info = env.reset(seed=episode_seed("collect", recipe.task, recipe.seed, episode))
    expert = domain.demonstrator(name, env, recipe.quality, episode)
    observations, successes = [observation], [info.get("success", np.nan)]
    intended, actions, rewards, terminations, truncations = [], [], [], [], []
    while not actions or not (terminations[-1] or truncations[-1]):
        intended.append(np.asarray(expert(observation), env.action_space.dtype))
        action = _perturbed(intended[-1], noise, env.action_space, rng)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(bool(terminated))
        truncations.append(bool(truncated))
        successes.append(info.get("success", np.nan))
    columns = {
        **_columns(env.observation_space, observations),  # (T + 1, ...)
        "actions": np.stack(actions),  # (T, ...)
        "expert_actions": np.stack(intended),  # (T, ...) before the noise
        "rewards": np.array(rewards),  # (T,)
        "terminations": np.array(terminations),
        "truncations": np.array(truncations),
        "success": np.array(successes, np.float32),  # (T + 1,), NaN where the environment does not say
    }
    write_arrays(path, columns)


def _columns(space: gym.Space, observations: Sequence[Any], name: str = "observations") -> dict[str, np.ndarray]:
    """Observations as one array, or one for each key of a Dict."""
    if isinstance(space, gym.spaces.Tuple):
        raise UserError(f"Observations of {space} can't be collected: make them a Dict.")
    if not isinstance(space, gym.spaces.Dict):
        return {name: np.stack(observations)}
    parts = (_columns(member, [o[key] for o in observations], f"{name}/{key}") for key, member in space.items())
    return {key: column for part in parts for key, column in part.items()}


def _joined(space: gym.Space, columns: Mapping[str, np.ndarray], name: str = "observations") -> Any:
    """The inverse of `_columns`, as Minari wants observations."""
    if not isinstance(space, gym.spaces.Dict):
        return columns[name]
    return {key: _joined(member, columns, f"{name}/{key}") for key, member in space.items()}


def _perturbed(action: np.ndarray, noise: float, space: gym.Space, rng: np.random.Generator) -> np.ndarray | np.int64:
    """`action` with Gaussian noise (continuous), or replaced by a random one with probability `noise` (discrete)."""
    if noise == 0:
        return np.asarray(action, space.dtype)
    if isinstance(space, gym.spaces.Box) and space.is_bounded():
        half_range = (space.high - space.low) / 2
        noisy = action + noise * half_range * rng.standard_normal(space.shape)
        return np.clip(noisy, space.low, space.high).astype(space.dtype)
    if isinstance(space, gym.spaces.Discrete):
        return np.int64(space.start + rng.integers(space.n)) if rng.random() < noise else np.int64(action)
    if isinstance(space, gym.spaces.MultiDiscrete):
        drawn = space.start + rng.integers(space.nvec)
        return np.where(rng.random(space.shape) < noise, drawn, action).astype(space.dtype)
    raise UserError(f"Noise can't be added to actions of {space}: set noise=[0].")


def _read_staged(recipe: Recipe, episode: int) -> dict[str, Any]:
    with np.load(_staged(recipe, episode), allow_pickle=False) as arrays:
        return dict(arrays)


def _assemble(recipe: Recipe) -> None:
    """Turn the staged episodes into the Minari dataset."""
    domain, _ = find_task(recipe.task)
    buffers, says = _buffers(recipe)
    about = {
        "expert": f"{type(domain).__module__}.{type(domain).__name__}.expert",
        "recipe": asdict(recipe) | {"noise": list(recipe.noise)},
        "success_rate": float(np.mean([np.max((b.infos or {})["success"]) > 0 for b in buffers])) if says else None,
        "episode_return_mean": float(np.mean([np.sum(b.rewards) for b in buffers])),
    }
    write_whole(recipe.dataset_id, buffers, about, **_described(recipe))


def write_whole(dataset_id: str, buffers: Iterable[EpisodeBuffer], about: Mapping[str, Any], **described: Any) -> None:
    """Write a Minari dataset that appears whole or not at all: under a root of its own first.

    Args:
        about: further metadata.
        described: what Minari keeps of a dataset besides its episodes.
    """
    with replacing(get_dataset_path(dataset_id)) as folder:
        folder.mkdir()
        with datasets_root_at(folder / "root"), warnings.catch_warnings():
            # Minari asks for an author, an address, a permalink and an environment; data made on the spot have none.
            warnings.filterwarnings("ignore", message=".*(is set to None|env_spec is None)")
            # Minari asks for a list, and takes any iterable.
            each = cast("list[EpisodeBuffer]", _that_fit(buffers, folder))
            dataset = minari.create_dataset_from_buffers(dataset_id, each, **described)
            dataset.storage.update_metadata({**about, "eva_rl_version": eva_rl.__version__})
        os.replace(folder / "root" / dataset_id / "data", folder / "data")
        shutil.rmtree(folder / "root")


def _that_fit(buffers: Iterable[EpisodeBuffer], folder: Path) -> Iterator[EpisodeBuffer]:
    """The episodes, each after a look whether the disk has space for it, since HDF5 crashes on a full one."""
    for buffer in buffers:
        content = (
            buffer.observations,
            buffer.actions,
            buffer.rewards,
            buffer.terminations,
            buffer.truncations,
            buffer.infos,
        )
        check_space(folder, 2**16 + 5 * _size(content) // 4)  # HDF5's own notes; chunks that are not filled
        yield buffer


def _size(value: Any) -> int:
    """Bytes of the arrays and texts in nested dicts, tuples and lists."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict | tuple | list):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    array = np.asarray(value)
    return sum(map(_size, array.ravel().tolist())) if array.dtype.kind in "OU" and array.ndim else array.nbytes


def _buffers(recipe: Recipe) -> tuple[list[EpisodeBuffer], bool]:
    """The staged episodes as Minari wants them, and whether the environment says which succeeded."""
    env = _environment(recipe.task)
    staged, buffers = [_read_staged(recipe, episode) for episode in range(recipe.episodes)], []
    # Some environments mention success only where there is one, or not at the reset: what is not said is none, if any says.
    says = any(not np.isnan(fields["success"]).all() for fields in staged)
    for episode, fields in enumerate(staged):
        successes = np.nan_to_num(fields.pop("success"))
        infos = {"success": successes} if says else {}
        intended = fields.pop("expert_actions", None)  # files of earlier versions have none
        if intended is not None:  # none follows the last observation; Minari wants as many infos as observations
            infos[EXPERT_ACTION] = np.concatenate([intended, intended[-1:]])
        buffers.append(
            EpisodeBuffer(
                id=episode,
                seed=episode_seed("collect", recipe.task, recipe.seed, episode),
                observations=_joined(env.observation_space, fields),
                infos=infos or None,
                **{name: values for name, values in fields.items() if not name.startswith("observations")},
            )
        )
    return buffers, says


def _described(recipe: Recipe) -> dict[str, Any]:
    """What Minari keeps of a dataset besides its episodes."""
    domain, name = find_task(recipe.task)
    env, scores = _environment(recipe.task), domain.reference_scores(name)
    return {
        "env": env.spec,
        "eval_env": env.spec,
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "algorithm_name": f"{recipe.quality} of the domain with action noise",
        "description": f"{recipe.episodes} episodes of {recipe.task} by the domain's demonstrator of quality '{recipe.quality}'; the "
        f"actions carry noise of scale {list(recipe.noise)}, in turn.",
        "requirements": [f"eva_rl[{domain.extra}]"],
        "ref_min_score": scores.random if scores else None,
        "ref_max_score": scores.expert if scores else None,
    }


def datasets_root() -> Path:
    """Minari's folder of datasets.

    Raises:
        UserError: if it can't be written to.
    """
    try:
        return make_folder(get_dataset_path())
    except OSError as error:
        raise UserError(
            f"Minari's folder of datasets can't be made ({error.strerror}: '{error.filename}'): set MINARI_DATASETS_PATH."
        ) from error


@contextmanager
def datasets_root_at(path: Path) -> Iterator[None]:
    """Point Minari at another root folder for the length of a `with` block."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
