"""Windows -> tokens -> causal trunk -> actions."""

from eva_rl.model.checkpoint import Base, find_base, interface_from_json, load_base, save_base
from eva_rl.model.decision_transformer import TRUNK_LAYERS, DecisionTransformer, ModelConfig

__all__ = [
    "TRUNK_LAYERS",
    "Base",
    "DecisionTransformer",
    "ModelConfig",
    "find_base",
    "interface_from_json",
    "load_base",
    "save_base",
]
