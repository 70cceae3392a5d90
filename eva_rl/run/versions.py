"""Which software made a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("eva_rl", "torch", "peft", "minari", "gymnasium", "numpy", "metaworld", "mujoco", "dm_control", "minigrid")
PACKAGES += ("ale_py", "box2d", "gymnasium_robotics")


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a score, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
