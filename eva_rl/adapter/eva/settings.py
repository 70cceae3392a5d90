"""EVA's settings, which stand with all others in `eva_rl/settings.py`."""

from eva_rl.settings import EvaSettings

__all__ = ["EvaSettings"]
