"""Windows -> tokens -> causal trunk -> actions."""

from eva_rl.model.checkpoint import (
    NOTES,
    AdapterNotes,
    Base,
    base_name,
    check_output,
    find_adapter,
    load_base,
    load_base_of,
    load_notes,
    save_base,
)
from eva_rl.model.decision_transformer import TRUNK_LAYERS, DecisionTransformer, ModelConfig
from eva_rl.model.decoder import Decoder

__all__ = [
    "NOTES",
    "TRUNK_LAYERS",
    "AdapterNotes",
    "Base",
    "DecisionTransformer",
    "Decoder",
    "ModelConfig",
    "base_name",
    "check_output",
    "find_adapter",
    "load_base",
    "load_base_of",
    "load_notes",
    "save_base",
]
