"""Activation streams -> covariances -> components -> ranks -> A."""

from eva_rl.adapter.eva.engine import EvaSettings, LayerResult, eva_init

__all__ = ["EvaSettings", "LayerResult", "eva_init"]
