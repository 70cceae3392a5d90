"""Windows -> tokens -> causal trunk -> actions."""

from eva_rl.model.checkpoint import AdapterNotes, Base, load_base, load_notes, save_base, save_notes
from eva_rl.model.decision_transformer import TRUNK_LAYERS, DecisionTransformer, ModelConfig

__all__ = [
    "TRUNK_LAYERS",
    "AdapterNotes",
    "Base",
    "DecisionTransformer",
    "ModelConfig",
    "load_base",
    "load_notes",
    "save_base",
    "save_notes",
]
