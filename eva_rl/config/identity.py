"""What a run is: the settings that decide it, and how it writes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from eva_rl.config.folder import run_folder
from eva_rl.settings import ADAMW, NO_ALLOCATOR, NOISE, FinetuneConfig


@dataclass(frozen=True)
class Plan:
    """What a run is and where it writes, decided once before it begins."""

    folder: Path
    yaml: str
    """Its settings, as config.yaml states them."""
    identity: dict[str, Any]
    """The settings that must be the same for one run to continue another."""
    protocol: dict[str, Any]
    """The settings that decide a fine-tuning run's result, as result.json states them. Other runs have none."""

    @property
    def checkpoints(self) -> Path:
        """The states of its training."""
        return self.folder / "checkpoints"


def plan(config: Any, what: str, how: str | None = None) -> Plan:
    """The run that these settings describe.

    `what` and `how` name its folder where the settings don't, see `run_folder`.
    """
    return Plan(
        run_folder(config.run_dir, what, how),
        to_yaml(config),
        identity(config) if hasattr(config, "optimizer") else {},
        protocol(config) if isinstance(config, FinetuneConfig) else {},
    )


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML that its entry point reads again: `--config-dir <run> --config-name config`."""
    return OmegaConf.to_yaml(OmegaConf.create({"defaults": ["entry", "_self_"], **_plain(config)}))


FREE = frozenset(
    [
        "run_dir",
        "tracker",
        "output",
        "resume",
        "device",
        "episodes",
        "zero_shot",
        "target_return",
        "video",
        "trust_environment",
        "max_episode_steps",
        "workers",
    ]
)
"""The settings that may change where one run continues another."""


AS_BEFORE = {
    "optimizer": ADAMW,
    "allocator": NO_ALLOCATOR,
    "mirror": False,
    "filter": "all",
    "task_vectors": False,
    "noise": NOISE,
    "start_from": None,
}
"""Settings that runs of former versions did not have, and the value at which a run is one of those."""


def identity(config: Any) -> dict[str, Any]:
    """The settings that must be the same for one run to continue another."""
    left_out = FREE | {name for name, value in AS_BEFORE.items() if getattr(config, name, None) == value}
    settings = {name: value for name, value in finite(_plain(config)).items() if name not in left_out}
    settings["training"] = {k: v for k, v in settings["training"].items() if not k.endswith("_every")}
    return settings


def protocol(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that decide a run's result, as result.json states them."""
    settings = identity(config) | {"episodes": config.episodes, "target_return": config.target_return}
    if config.max_episode_steps is not None:  # runs of before it could be set have none
        settings["max_episode_steps"] = config.max_episode_steps
    if config.trust_environment:  # the dataset's own wrappers
        settings["trust_environment"] = True
    return json.loads(json.dumps(settings | {"evaluate_every": config.training.evaluate_every}, allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def finite(value: Any) -> Any:
    """Plain settings with infinite numbers as text, since JSON has none: training.gradient_clip=inf is a setting."""
    if isinstance(value, dict):
        return {name: finite(own) for name, own in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
