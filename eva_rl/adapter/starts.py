"""How an adapter starts: functions (model, peft config, data) -> (peft model with initialised adapter, what EVA found).

`attach` takes the one that the config's `init_lora_weights` asks for, or one that is named. peft's own initialisations
that need no data go through `plain`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva import EvaSettings, LayerResult, Reading, eva_init
from eva_rl.adapter.eva.directions import random_rows
from eva_rl.adapter.eva.kinds import reader
from eva_rl.adapter.eva.load import by_pattern, config_of, load_components, lora_layers
from eva_rl.adapter.eva.observe import as_it_was, discover, masked_rows
from eva_rl.adapter.eva.tokens import IGNORED, TokenRows, call
from eva_rl.errors import UserError, in_one_line

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel

    from eva_rl.adapter.eva.typed import CordaTarget, LoraLayer


@dataclass(frozen=True)
class TaskData:
    """What an initialisation may look at: the new task's batches, and what the model makes of them."""

    batches: Iterable[Any]
    """Each what `forward` takes."""
    token_mask: Callable[[Any], Tensor | Sequence[Tensor]] | None = None
    """A batch's rows that count, see `eva_init`. None: what the batch itself says, see `TokenRows`."""
    loss: Callable[[Any], Tensor] | None = None
    few: int = 16
    """Batches for an initialisation that has no rule of its own for when to stop."""
    progress: bool = False
    forward: Callable[[nn.Module, Any], Any] = call
    """Sends through each layer the rows that training will send through it."""
    strict: bool = False
    """Raise an error rather than warn where a layer can't be initialised from the data."""

    def first(self, what: str) -> Iterator[Any]:
        """The first few batches.

        Raises:
            UserError: if there is none. It names `what`, which needs them.
        """
        empty = True
        for batch in islice(self.batches, self.few):
            empty = False
            yield batch
        if empty:
            raise UserError(f"{what} was given no batch of data: the dataset is empty.")


Start = Callable[[nn.Module, Any, TaskData], "tuple[PeftModel, dict[str, LayerResult]]"]
"""(the model, a peft config of a kind that the start knows, the data) -> what `attach` makes of them."""


def start_of(config: PeftConfig) -> Start:
    """The start that peft's `init_lora_weights` asks for."""
    from_data: dict[object, Start] = {"eva": eva, "corda": corda, "lora_ga": lora_ga}
    return from_data.get(getattr(config, "init_lora_weights", None), plain)


def plain(model: nn.Module, config: PeftConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """As the config alone says."""
    from peft import get_peft_model

    with warnings.catch_warnings(), _fitting():
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")  # for models near the memory's limit
        peft_model = get_peft_model(model, config)
    put_on = getattr(config, "put_on", None)
    if put_on is not None:  # a form of LoRA that peft does not have
        put_on(peft_model)
    return peft_model, {}


@contextmanager
def _fitting() -> Iterator[None]:
    """Turns what peft raises into a `UserError`, as it is a mistake in the config.

    This goes around calls of peft alone: what the user's functions raise is theirs.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"The adapter does not fit the model: {in_one_line(error)}") from error


def eva(
    model: nn.Module, config: LoraConfig, data: TaskData, settings: EvaSettings | None = None
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """A from the components of the layers' inputs, and B zero, see `eva_init`.

    Without `settings`, rho and tau are those of the config's `eva_config`, and the rest are our defaults.
    """
    given = config.eva_config
    linear = _only_linear(model, config)
    config.init_lora_weights = "eva" if linear else True  # peft's convolutions and embeddings take no "eva"
    if config.use_rslora and given is not None:
        # peft would multiply alpha by r' / r where a layer gets r' ranks, which keeps alpha / r: rsLoRA's scale, alpha / sqrt(r'),
        # (Kalajdzievski 2023, arXiv 2312.03732) follows from the rank by itself.
        given.adjust_scaling_factors = False
    peft_model, _ = plain(model, config, data)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(model)}
    settings = settings or (EvaSettings() if given is None else EvaSettings(rho=given.rho, tau=given.tau))
    rows = TokenRows(model, _ignored(given)) if data.token_mask is None else None
    with peft_model.disable_adapter(), rows.watching() if rows else nullcontext():
        found = eva_init(
            model,
            data.batches,
            ranks,
            settings,
            Reading(data.forward, data.token_mask, rows, loss=data.loss),
            progress=data.progress,
            strict=data.strict,
        )
    load_components(peft_model, {name: layer.components for name, layer in found.items()}, "default")
    if not linear:
        config_of(peft_model).eva_config = None  # which peft reads with "eva" alone
    return peft_model, found


def _only_linear(model: nn.Module, config: LoraConfig) -> bool:
    """Whether LoRA would be put on no embedding and no convolution."""
    from peft.tuners.tuners_utils import check_target_module_exists

    other = nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return config.target_modules is None or not any(
        isinstance(module, other) and check_target_module_exists(config, name) for name, module in model.named_modules()
    )


def _ignored(config: EvaConfig | None) -> int | None:
    """The label that keeps a token out, or None, by peft's config of EVA."""
    if config is None:
        return IGNORED
    return config.label_mask_value if config.use_label_mask else None


def orthogonal(model: nn.Module, config: LoraConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """Random orthonormal rows in A, B zero: rows as long as EVA's, in directions that know nothing of the task."""
    config.init_lora_weights = True
    peft_model, _ = plain(model, config, data)
    for _, layer in lora_layers(model):
        weight = layer.lora_A["default"].weight
        weight.data = random_rows(len(weight), weight[0].numel()).reshape(weight.shape).to(weight)
    return peft_model, {}


LEAVE_THE_BASE = (eva, orthogonal)
"""Starts that change no weight of the base."""


@torch.no_grad()
def milora(model: nn.Module, config: LoraConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """A and B from W's minor singular components, taken out of W (Wang et al. 2024, arXiv 2406.09044, eq. 4-6).

    Let W = U S V^T, of which S_r has the r smallest singular values. Then s B A = U_r S_r V_r^T, with
    A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s), where s is LoRA's scale. W - s B A stays frozen.
    """
    config.init_lora_weights = True
    peft_model, _ = plain(model, config, data)
    for _, layer in lora_layers(model):
        base = layer.get_base_layer().weight
        rank, scale = layer.r["default"], layer.scaling["default"]
        u, s, vt = torch.linalg.svd(oriented(layer, base).float(), full_matrices=False)  # (out, m), (m,), (m, in)
        root = (s[-rank:] / scale).sqrt()
        take_out(layer, root[:, None] * vt[-rank:], u[:, -rank:] * root)
    return peft_model, {}


def with_a_loss(
    model: nn.Module, config: LoraConfig, data: TaskData, what: str
) -> tuple[PeftModel, list[tuple[str, LoraLayer]]]:
    """The model with plain LoRA, and its layers by name, for a start named `what` that looks at the loss.

    Raises:
        UserError: if there is no loss of a batch.
    """
    if data.loss is None:
        raise UserError(f"{what} needs the loss of a batch: give `loss`.")
    config.init_lora_weights = True
    peft_model, _ = plain(model, config, data)
    return peft_model, lora_layers(model)


def with_gradients(
    model: nn.Module, config: LoraConfig, data: TaskData, what: str, squared: bool = False
) -> tuple[PeftModel, list[LoraLayer], list[Tensor]]:
    """`with_a_loss`, its layers alone, and the loss's gradient in each one's weight, summed over the first few batches.

    squared: sum the gradients' squares, entry by entry.

    Raises:
        UserError: if there is no loss of a batch, or no batch.
    """
    peft_model, named = with_a_loss(model, config, data, what)
    layers = [layer for _, layer in named]
    return peft_model, layers, _gradients(model, peft_model, layers, data, what, squared)


def _gradients(
    model: nn.Module, peft_model: PeftModel, layers: list[LoraLayer], data: TaskData, what: str, squared: bool
) -> list[Tensor]:
    assert data.loss is not None  # `with_a_loss` has looked
    weights = [layer.get_base_layer().weight for layer in layers]
    gradients = [torch.zeros_like(weight) for weight in weights]
    with as_it_was(model), peft_model.disable_adapter(), torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        for batch in data.first(what):
            for total, gradient in zip(gradients, torch.autograd.grad(data.loss(batch), weights), strict=True):
                total += gradient.square() if squared else gradient
        for weight in weights:
            weight.requires_grad_(False)
    return gradients


def lora_one(
    model: nn.Module, config: LoraConfig, data: TaskData, gamma: float = 128.0
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """A and B from the loss's mean gradient, -G = U S V^T (Zhang et al. 2025, arXiv 2502.01235).

    B = U_r (S_r / S_1 / gamma)^(1/2) and A = (S_r / S_1 / gamma)^(1/2) V_r^T. W stays as it is, so that the model
    starts a step of full fine-tuning away from the base. The best approximation of rank r to that step is s B A, of
    spectral norm s / gamma, where s is LoRA's scale. The paper's text leaves out the roots and S_1. This follows the
    authors' code.
    """
    peft_model, layers, gradients = with_gradients(model, config, data, "LoRA-One")
    with torch.no_grad():
        for layer, gradient in zip(layers, gradients, strict=True):
            rank = layer.r["default"]
            u, s, vt = torch.linalg.svd(-oriented(layer, gradient).float(), full_matrices=False)
            root = (s[:rank] / (s[0].clamp(min=torch.finfo(s.dtype).tiny) * gamma)).sqrt()
            start_at(layer, root[:, None] * vt[:rank], u[:, :rank] * root)
    return peft_model, {}


def lora_ga(model: nn.Module, config: LoraConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """A and B from the singular vectors of the loss's mean gradient G = U S V^T (Wang et al. 2024, arXiv 2407.05000,
    algorithm 1): A = c V_[1..r]^T and B = c U_[r+1..2r] with c = d_out^(1/4) / sqrt(gamma), and W loses s B A.

    Written anew because peft's scales B by the singular values, and so with the loss, and A not at all.
    """
    gamma = config.lora_ga_config.stable_gamma if config.lora_ga_config else 16
    config.lora_ga_config = None
    peft_model, layers, gradients = with_gradients(model, config, data, "LoRA-GA")
    with torch.no_grad():
        for layer, gradient in zip(layers, gradients, strict=True):
            rank = layer.r["default"]
            u, _, vt = torch.linalg.svd(oriented(layer, gradient).float(), full_matrices=False)
            if 2 * rank > len(vt):
                raise UserError(
                    f"LoRA-GA needs twice the rank in dimensions; {rank} was asked for where there are {len(vt)}."
                )
            c = u.shape[0] ** 0.25 / gamma**0.5
            take_out(layer, c * vt[:rank], c * u[:, rank : 2 * rank])
    return peft_model, {}


def oriented(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The weight as (out, in), also where the layer keeps its transpose."""
    return weight.T if layer.fan_in_fan_out else weight


def start_at(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Start LoRA at A (r, in) and B (out, r)."""
    pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, value in zip(pair, (a, b), strict=True):
        parameter.data = value.to(parameter.dtype).contiguous()


def take_out(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Start LoRA at A (r, in) and B (out, r), and take their product out of the base's weight."""
    start_at(layer, a, b)
    base = layer.get_base_layer().weight
    base.data = (base.data.float() - layer.get_delta_weight("default")).to(base.dtype)


@torch.no_grad()
def abba(model: nn.Module, config: PeftConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """LoHa, W + s (B1 A1) * (B2 A2) entry by entry, from W = U S V^T (Singhal et al. 2025, arXiv 2505.14238).

    B1 = U_r sqrt(S_r), A1 = sqrt(S_r) V_r^T, A2 is Kaiming's and B2 is zero, as in the authors' code.
    """
    from peft.tuners.loha import LoHaLayer

    peft_model, _ = plain(model, config, data)
    for layer in (module for module in model.modules() if isinstance(module, LoHaLayer)):
        b1, a1, b2, a2 = (getattr(layer, f"hada_{name}")["default"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        u, s, vt = torch.linalg.svd(layer.get_base_layer().weight.float(), full_matrices=False)
        root = s[: len(a1)].sqrt()
        b1.copy_(u[:, : len(a1)] * root)
        a1.copy_(root[:, None] * vt[: len(a1)])
        nn.init.zeros_(b2)
        nn.init.kaiming_uniform_(a2)
    return peft_model, {}


@torch.no_grad()
def corda(model: nn.Module, config: LoraConfig, data: TaskData) -> tuple[PeftModel, dict[str, LayerResult]]:
    """A and B from the singular vectors of W C, C being the inputs' covariance: peft's `preprocess_corda`.

    Only the covariances are ours: peft's hooks take batches of one sequence, and padding for data.
    """
    from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens, target_modules

    assert config.corda_config is not None  # peft sees to it where `init_lora_weights` is "corda"
    layers = dict(cast("Iterable[tuple[str, CordaTarget]]", target_modules(model, config)))
    readers = {name: reader(model, name) for name in layers}
    sums: dict[str, Tensor] = {}
    rows = 0
    with as_it_was(model):
        for batch in data.first("CorDA"):
            chosen = masked_rows(data.token_mask(batch) if data.token_mask else None)
            groups, seen = discover(model, readers, lambda batch=batch: data.forward(model, batch), chosen)
            for group in groups:
                x = seen[group.layers[0]].rows
                if not seen[group.layers[0]].calls:
                    raise UserError(
                        f"The layer '{group.layers[0]}' did not run in the forward pass: leave it out of the adapter."
                    )
                product = x.float().T @ x.float()  # (d, d)
                for name in group.layers:
                    sums[name] = sums.get(name, 0) + product
            rows += len(seen[groups[0].layers[0]].rows)
    for name, layer in layers.items():
        layer.rank = by_pattern(config.rank_pattern, name, config.r)
        layer.corda_method = config.corda_config.corda_method
        layer.covariance_matrix = sums[name] / rows
    with _fitting():
        collect_eigens(model, config, verbose=False)
        crop_corda_eigens(model, config)
    for layer in layers.values():
        del layer.rank, layer.corda_method, layer.covariance_matrix
    return plain(model, config, data)
