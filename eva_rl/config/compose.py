"""The files in configs/, and what of them Hydra puts together."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from eva_rl.settings import EvaOptions, TrainingConfig

HELP = """Settings are given as key=value; the files in configs/, and eva_rl/settings.py, explain them. `adapter=?`, `optimizer=?`,
`allocator=?`, `model=?` and `study=?` list what there is to choose from, where a command has these.

Settings and their defaults:

$CONFIG"""

# Hydra parses the command line and leaves files, folders and logging to us.
ConfigStore.instance().store(
    name="entry",
    package="_global_",
    node={
        "defaults": [{"override /hydra/job_logging": "none"}, {"override /hydra/hydra_logging": "none"}],
        "hydra": {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": "runs/multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "."},
            "job": {"chdir": False, "name": "${hydra.job.config_name}"},  # what a cluster calls its jobs
            "help": {"template": HELP},
        },
    },
)


# The defaults of sections that commands, Python and engines share: files of configs/ override them.
for section, settings in {"training": TrainingConfig(), "eva": EvaOptions()}.items():
    ConfigStore.instance().store(group="defaults", name=section, node=asdict(settings))

# ${share:0.1,${steps}} in a config
OmegaConf.register_new_resolver("share", lambda part, whole: round(part * whole), replace=True)


SECTIONS = {
    "pretrain": ("model", "optimizer"),
    "finetune": ("adapter", "optimizer", "allocator", "study"),
    "continual": ("adapter",),
}
"""What a command has several files of settings to choose from for."""


def choices(group: str, command: str) -> str:
    """The choices of a command's section such as `adapter`, with the first line of each one's file.

    Raises:
        SystemExit: if it has no such section.
    """
    sections = SECTIONS.get(command, ())
    if group not in sections:
        hint = f"It has {', '.join(sections)}." if sections else "It has none."
        sys.exit(f"error: {command} has no section '{group}' to choose from. {hint}")
    files = sorted(
        (f for f in (resources.files("eva_rl.configs") / group).iterdir() if f.name.endswith(".yaml")), key=str
    )
    texts = {Path(f.name).stem: f.read_text(encoding="utf-8").removeprefix("# @package _global_\n") for f in files}
    lines = [(name, text.partition("\n")[0].removeprefix("# ")) for name, text in texts.items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines)
