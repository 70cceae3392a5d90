"""The environment that a dataset names -> that environment, if making it runs nothing that only the dataset brings.

A dataset's metadata may come from a stranger, and a specification in them may name any function of any module. So only
what is installed here as an environment is made (see `approved`).
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import metadata as installed
from importlib.util import find_spec

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from minari.serialization import deserialize_space

from eva_rl.data.collection import datasets_root
from eva_rl.data.metadata import metadata_of, unreadable
from eva_rl.envs import domains
from eva_rl.errors import UserError, in_one_line

OTHERS = frozenset({"GymV21Environment-v0", "GymV26Environment-v0"})
"""Registered ids whose keywords name another environment, by a module to import."""
WRAPPERS = frozenset(
    [
        "AtariPreprocessing",
        "ClipAction",
        "ClipReward",
        "DelayObservation",
        "DiscretizeAction",
        "DiscretizeObservation",
        "DtypeObservation",
        "FilterObservation",
        "FlattenObservation",
        "FrameStackObservation",
        "GrayscaleObservation",
        "MaxAndSkipObservation",
        "NormalizeObservation",
        "NormalizeReward",
        "OrderEnforcing",
        "PassiveEnvChecker",
        "RecordEpisodeStatistics",
        "RepeatAction",
        "RescaleAction",
        "RescaleObservation",
        "ReshapeObservation",
        "ResizeObservation",
        "StickyAction",
        "TimeAwareObservation",
        "TimeLimit",
    ]
)
"""Gymnasium's wrappers that only change what an environment shows and takes. `RecordVideo`, say, also writes files."""
KEPT = ("id", "entry_point", "reward_threshold", "nondeterministic", "max_episode_steps", "order_enforce", "kwargs")
"""What is read of a specification. The rest belongs to other versions of gymnasium, or does not matter here."""


@dataclass
class DatasetEnvironment:
    """Makes the environment that a dataset is to be evaluated in.

    What was approved once goes along to other processes.
    """

    dataset_id: str
    trust: bool = False
    """Whether any environment that the dataset names is made, whatever that runs."""
    spec: EnvSpec | None = None
    """What was approved."""

    def __call__(self, render_mode: str | None = None) -> gym.Env:
        """The environment.

        Raises:
            UserError: if the dataset names none, it may not be made, or it can't.
        """
        if self.spec is None:
            self.spec = approved(spec_of(self.dataset_id), self.dataset_id, self.trust)
        try:
            try:
                return self._made(self.spec, render_mode)
            except Exception as error:
                if isinstance(error, UserError) or not self.spec.additional_wrappers:
                    raise
                self.spec = without(self.spec, self.spec.additional_wrappers, self.dataset_id, in_one_line(error))
                return self._made(self.spec, render_mode)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The environment '{self.spec.id}' of the dataset '{self.dataset_id}' can't be made ({type(error).__name__}: "
                f"{in_one_line(error)[:300]}): install {_needed(self.dataset_id)}, or set episodes=0 to fine-tune without rollouts."
            ) from error

    def _made(self, spec: EnvSpec, render_mode: str | None) -> gym.Env:
        env = gym.make(spec, render_mode=render_mode) if render_mode else gym.make(spec)
        return _as_recorded(env, deserialize_space(metadata_of(self.dataset_id)["observation_space"]))


def environment_of(dataset_id: str, render_mode: str | None = None, trust: bool = False) -> gym.Env:
    """The environment that the dataset says it is to be evaluated in (see `DatasetEnvironment`)."""
    return DatasetEnvironment(dataset_id, trust)(render_mode)


def names_environment(dataset_id: str) -> bool:
    """Whether the dataset is here and names an environment to be evaluated in."""
    if not (datasets_root() / dataset_id / "data").is_dir():
        return False
    metadata = metadata_of(dataset_id)
    return bool(metadata.get("eval_env_spec") or metadata.get("env_spec"))


def spec_of(dataset_id: str) -> EnvSpec:
    """The specification of the environment that the dataset is to be evaluated in.

    Nothing is imported or made.

    Raises:
        UserError: if there is none, or it can't be read.
    """
    metadata = metadata_of(dataset_id)
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if not text:
        raise UserError(
            f"The dataset '{dataset_id}' names no environment: set episodes=0 to fine-tune without rollouts."
        )
    try:
        found = json.loads(text)
        spec = EnvSpec(**{name: found[name] for name in KEPT if name in found}, disable_env_checker=True)
        wrappers = [WrapperSpec(**wrapper) for wrapper in found.get("additional_wrappers") or ()]
    except (ValueError, TypeError, AttributeError, gym.error.Error) as error:
        raise unreadable(dataset_id, error) from error
    if not _of_right_types(spec, wrappers):
        raise unreadable(dataset_id, TypeError("its environment's specification holds values of other types"))
    spec.additional_wrappers = tuple(wrappers)
    return spec


def _of_right_types(spec: EnvSpec, wrappers: Sequence[WrapperSpec]) -> bool:
    names = [spec.id, *([] if spec.entry_point is None else [spec.entry_point])]
    names += [getattr(wrapper, field.name) for wrapper in wrappers for field in fields(wrapper)[:2]]
    keywords = [spec.kwargs, *(wrapper.kwargs for wrapper in wrappers if wrapper.kwargs is not None)]
    limited = spec.max_episode_steps is None or type(spec.max_episode_steps) is int
    return limited and all(isinstance(n, str) for n in names) and all(isinstance(k, dict) for k in keywords)


def approved(spec: EnvSpec, dataset_id: str, trust: bool = False) -> EnvSpec:
    """The specification, as far as it may be made.

    The environment must be registered under its id, with the very entry point that the specification names, or be a
    task of this project's domains. Of its wrappers, only those that do nothing but change what is seen and done are
    kept. The others are left out with a warning.

    If the id is not registered yet, and the entry point belongs to an installed package that builds on gymnasium, that
    package is imported, so that it registers its environments. Nothing else is imported.

    Raises:
        UserError: for any other environment, unless it is trusted.
    """
    if trust:
        return spec
    registered = spec if _ours(spec) else _registered(spec)
    if registered is None and not _is_here(spec.entry_point):
        raise UserError(
            f"The environment '{spec.id}' of the dataset '{dataset_id}' can't be made (no installed package has it): install "
            f"{_needed(dataset_id)}, or set episodes=0 to fine-tune without rollouts."
        )
    if registered is None or spec.id in OTHERS or spec.entry_point not in (None, registered.entry_point):
        what = "is not registered in gymnasium" if registered is None else "is registered in gymnasium otherwise"
        raise UserError(
            f"The environment '{spec.id}' of the dataset '{dataset_id}' {what}, and making it would run '{spec.entry_point}': set "
            "trust_environment=true if you trust whoever made the dataset, or episodes=0 to fine-tune without rollouts."
        )
    spec.entry_point = registered.entry_point
    strange = [wrapper for wrapper in spec.additional_wrappers if not _harmless(wrapper, spec)]
    unknown = "not known to do nothing else, or to be made again; trust_environment=true tries"
    return without(spec, strange, dataset_id, unknown)


def without(spec: EnvSpec, wrappers: Sequence[WrapperSpec], dataset_id: str, why: str) -> EnvSpec:
    """The specification without these wrappers, which is said if there are any."""
    if wrappers:
        names = ", ".join(wrapper.name for wrapper in wrappers)
        warnings.warn(
            f"The environment '{spec.id}' of the dataset '{dataset_id}' is made without {names} ({why[:200]}): its scores "
            "may differ from those of the environment that the data are from.",
            stacklevel=2,
        )
        spec.additional_wrappers = tuple(w for w in spec.additional_wrappers if w not in wrappers)
    return spec


def _as_recorded(env: gym.Env, space: gym.Space) -> gym.Env:
    """The environment, showing those keys of its Dict alone that the dataset keeps."""
    shown = env.observation_space
    if not (isinstance(space, gym.spaces.Dict) and isinstance(shown, gym.spaces.Dict)):
        return env
    if space.keys() < shown.keys() and all(space[key].shape == shown[key].shape for key in space):
        return gym.wrappers.FilterObservation(env, list(space))
    return env


def _ours(spec: EnvSpec) -> bool:
    """Whether the specification is of a task of this project's domains."""
    module, _, name = str(spec.entry_point).partition(":")
    for domain in domains().values():
        if type(domain).__module__ == module and module.startswith("eva_rl.envs."):
            maker = getattr(importlib.import_module(module), name, None)
            plain = all(isinstance(value, str | int | float) for value in spec.kwargs.values())
            known = spec.kwargs.get("name") in domain.tasks
            return known and plain and isinstance(maker, type) and issubclass(maker, gym.Env)
    return False


def _registered(spec: EnvSpec) -> EnvSpec | None:
    if spec.id not in gym.registry and isinstance(spec.entry_point, str):
        package = spec.entry_point.partition(":")[0].partition(".")[0]
        if _builds_on_gymnasium(package):
            try:
                importlib.import_module(package)
            except Exception as error:
                raise UserError(
                    f"The package '{package}' of the environment '{spec.id}' can't be imported ({in_one_line(error)[:200]}): install it "
                    "again, or set episodes=0 to fine-tune without rollouts."
                ) from error
    return gym.registry.get(spec.id)


def _is_here(entry_point: object) -> bool:
    """Whether there is a module to take the entry point from, without importing it."""
    if not isinstance(entry_point, str):
        return False
    try:
        return find_spec(entry_point.partition(":")[0].partition(".")[0] or "?") is not None
    except ValueError:  # a module that was not imported from a file, such as __main__
        return True


def _needed(dataset_id: str) -> str:
    return ", ".join(map(str, metadata_of(dataset_id).get("requirements") or ["what its page names"]))


def _builds_on_gymnasium(package: str) -> bool:
    """Whether a module of this name was installed by a package that requires gymnasium."""
    names = installed.packages_distributions().get(package, ())
    return any(line.startswith("gymnasium") for name in names for line in installed.requires(name) or ())


def _harmless(wrapper: WrapperSpec, spec: EnvSpec) -> bool:
    """Whether a wrapper is one of gymnasium's that touch nothing else, or one of the environment's own package.

    A wrapper of that package must already be imported.
    """
    module, _, name = wrapper.entry_point.partition(":")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, gym.Wrapper)) or wrapper.kwargs is None:
        return False
    if module.startswith("gymnasium.wrappers"):
        return name in WRAPPERS
    own = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
    return module.partition(".")[0] == own.partition(":")[0].partition(".")[0] != "gymnasium"
