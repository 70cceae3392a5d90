"""Windows -> tokens -> causal trunk -> actions."""

from eva_rl.model.checkpoint import (
    NOTES,
    AdapterNotes,
    Base,
    base_name,
    check_output,
    find_adapter,
    find_base,
    load_base,
    load_base_of,
    load_notes,
    save_base,
)
from eva_rl.model.cloning import CloningConfig, CloningMLP
from eva_rl.model.decision_transformer import TRUNK_LAYERS, DecisionTransformer, ModelConfig
from eva_rl.model.decoder import Decoder
from eva_rl.model.policies import policy_in, policy_of

__all__ = [
    "NOTES",
    "TRUNK_LAYERS",
    "AdapterNotes",
    "Base",
    "CloningConfig",
    "CloningMLP",
    "DecisionTransformer",
    "Decoder",
    "ModelConfig",
    "base_name",
    "check_output",
    "find_adapter",
    "find_base",
    "load_base",
    "load_base_of",
    "load_notes",
    "policy_in",
    "policy_of",
    "save_base",
]
