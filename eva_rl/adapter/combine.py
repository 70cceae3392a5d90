"""A start from adapters that are there: one of them, or a weighted sum as peft combines them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file
from torch import nn

from eva_rl.adapter.attach import WEIGHTS
from eva_rl.adapter.safe import check_adapter_config
from eva_rl.adapter.starts import Start, TaskData, lora_layers, plain
from eva_rl.errors import UserError, in_one_line

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel

    from eva_rl.adapter.eva import LayerResult
    from eva_rl.adapter.eva.typed import LoraLayer

COMBINATIONS = ("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties")
"""peft's ways to combine. `cat` is the plain weighted sum of the products."""
SUM = "combined"


def start_from(
    folders: Sequence[Path], weights: Sequence[float], combination: str = "cat", density: float = 0.5
) -> Start:
    """A start at the best approximation of rank r to the weighted sum of these adapters, for each layer of rank r.

    Of the adapters, only LoRA is combined. A task's vector that one may have beside it is not.

    Args:
        folders: of LoRA adapters of the same base.
        weights: one each.
        combination: one of `COMBINATIONS`, as peft's `add_weighted_adapter` takes it.
        density: the share of values that TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099) keep.

    Raises:
        UserError: if the combination is unknown, or there is not one weight for each folder.
    """
    if combination not in COMBINATIONS:
        raise UserError(f"combination must be one of {', '.join(COMBINATIONS)}, got {combination}.")
    if len(folders) != len(weights) or not folders:
        raise UserError(f"There must be a weight for each of the {len(folders)} adapters, got {len(weights)}.")

    @torch.no_grad()
    def start(model: nn.Module, config: LoraConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
        config.init_lora_weights = True
        for own in ("eva_config", "corda_config", "lora_ga_config"):
            if hasattr(config, own):
                setattr(config, own, None)  # of another start than this one
        peft_model, _ = plain(model, config, data)
        names = [f"known{number}" for number in range(len(folders))]
        for name, folder in zip(names, folders, strict=True):
            _add(peft_model, name, folder)
        options = {} if combination in ("cat", "linear", "svd") else {"density": density}
        try:
            peft_model.add_weighted_adapter(names, list(weights), SUM, combination_type=combination, **options)
        except ValueError as error:
            raise UserError(
                f"combination={combination} can't combine these adapters ({in_one_line(error)})."
            ) from error
        for _, layer in lora_layers(model):
            if SUM in layer.lora_A and "default" in layer.lora_A:  # others may adapt more layers
                _take_over(layer)
        for name in (*names, SUM):
            peft_model.delete_adapter(name)
        peft_model.set_adapter("default")
        return peft_model, {}

    return start


def _add(peft_model: PeftModel, name: str, folder: Path) -> None:
    """Put the adapter's LoRA on the model.

    Modules that the adapter trained in full have no sum. The new adapter's own data decide them.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    check_adapter_config(folder)
    config = cast("LoraConfig", PeftConfig.from_pretrained(str(folder)))
    config.modules_to_save, config.init_lora_weights = None, True
    peft_model.add_adapter(name, config)
    lora = {key: value for key, value in load_file(folder / WEIGHTS).items() if ".lora_" in key}
    set_peft_model_state_dict(peft_model, lora, adapter_name=name)


def _take_over(layer: LoraLayer) -> None:
    """A and B of `default` from the leading singular components of what the sum adds to the weight: s B A = U_r S_r V_r^T."""
    rank, scale = layer.r["default"], layer.scaling["default"]
    delta = layer.get_delta_weight(SUM).float()  # (out, in)
    u, s, vt = torch.linalg.svd(delta.T if layer.fan_in_fan_out else delta, full_matrices=False)
    if not s.any():
        return  # nothing was added here: A stays as LoRA begins, so that B can learn
    root = (s[:rank] / scale).sqrt()
    for parameter, value in (
        (layer.lora_A["default"].weight, root[:, None] * vt[:rank]),
        (layer.lora_B["default"].weight, u[:, :rank] * root),
    ):
        parameter.data = value.to(parameter.dtype).contiguous()
