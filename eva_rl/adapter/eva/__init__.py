"""Activation streams -> components -> ranks -> A. Also peft's two functions for EVA, by their names."""

from eva_rl.adapter.eva.drop_in import get_eva_state_dict, initialize_lora_eva_weights
from eva_rl.adapter.eva.engine import LayerResult, Reading, eva_init
from eva_rl.adapter.eva.settings import EvaSettings

__all__ = ["EvaSettings", "LayerResult", "Reading", "eva_init", "get_eva_state_dict", "initialize_lora_eva_weights"]
