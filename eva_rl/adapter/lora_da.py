"""LoRA-DA: A and B from the loss's gradient and the inputs' covariance together (arXiv 2510.24561)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eva_rl.adapter.eva import LayerResult
from eva_rl.adapter.eva.observe import as_it_was
from eva_rl.adapter.starts import TaskData, start_at, with_a_loss
from eva_rl.errors import UserError

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftModel

    from eva_rl.adapter.eva.typed import LoraLayer


def _zero() -> Tensor:
    return torch.zeros(())


@dataclass
class Moments:
    """What a layer's inputs x (in,) and the loss's gradients g (out,) at its outputs are on average over the rows that train."""

    covariance: Tensor = field(default_factory=_zero)  #: (in, in) sums of x x^T, uncentred
    squares: Tensor = field(default_factory=_zero)  #: (out,) sums of g^2
    products: Tensor = field(default_factory=_zero)  #: (out, in) sums of g x^T: the gradient of W
    rows: int = 0
    samples: int = 0
    """Windows, or sequences."""

    def add(self, x: Tensor, g: Tensor) -> None:
        """Count a call's inputs (..., in) and gradients (..., out). Rows without a gradient, such as padding, do not count."""
        self.samples += len(x)
        x, g = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()
        trained = g.abs().amax(-1) > 0
        x, g = x[trained], g[trained]
        self.covariance = self.covariance + x.T @ x
        self.squares = self.squares + g.square().sum(0)
        self.products = self.products + g.T @ x
        self.rows += len(x)


def lora_da(
    model: nn.Module, config: LoraConfig, data: TaskData, gamma: float = 1024.0, beta: float = 0.03
) -> tuple[PeftModel, dict[str, LayerResult]]:
    """A and B of the update that lowers the loss most for a given variance, see `directions`.

    W stays as it is. As in the authors' code, A = A_0 / sqrt(gamma) and B = B_0 / sqrt(gamma), with LoRA's alpha at 16
    and the scale of rsLoRA.

    Raises:
        UserError: if there is no loss of a batch, or a layer has no gradient.
    """
    peft_model, layers = with_a_loss(model, config, data, "LoRA-DA")
    with peft_model.disable_adapter():
        moments = _observed(model, [layer for _, layer in layers], data)
    with torch.no_grad():
        for (name, layer), own in zip(layers, moments, strict=True):
            if not own.rows:
                raise UserError(f"LoRA-DA: the loss has no gradient at layer '{name}': leave it out of the adapter.")
            a, b = directions(own, layer.r["default"], beta)
            start_at(layer, a / gamma**0.5, b / gamma**0.5)
    return peft_model, {}


def directions(moments: Moments, rank: int, beta: float) -> tuple[Tensor, Tensor]:
    """A_0 (r, in) of orthonormal rows, and B_0 (out, r) (arXiv 2510.24561).

    Let C = E[x x^T] and D = diag E[g^2], and let G (out, in) be the mean gradient. Then D_i = -C^-1 G^T D^-1 is
    Newton's step under a Fisher matrix of Kronecker form. Here it is divided by its largest singular value s. A_0 are
    the lowest eigenvectors of -D_i D_i^T + beta tr(D^-1) / (N s^2) C^-1: much step, little variance over N samples. B_0
    is D_i^T A_0^T.

    Without a gradient, A_0 are the directions of most uncentred variance, which are EVA's.
    """
    x, rows = moments.covariance, moments.rows
    covariance = x / rows + 1e-6 * torch.eye(len(x), device=x.device)
    squares = moments.squares / rows
    squares = squares.clamp(min=1e-6 * float(squares.max()) or 1.0)  # an output that never gets a gradient
    inverse = torch.linalg.inv(covariance)  # (in, in)
    step = -inverse @ (moments.products / rows).T / squares  # (in, out)
    largest = torch.linalg.matrix_norm(step, 2).clamp(min=torch.finfo(step.dtype).tiny)
    spread = beta * (1 / squares).sum() / (max(moments.samples, 1) * largest**2)
    step = step / largest
    found = torch.linalg.eigh(spread * inverse - step @ step.T).eigenvectors[:, :rank]  # (in, r), the lowest first
    return found.T, step.T @ found


def _observed(model: nn.Module, layers: list[LoraLayer], data: TaskData) -> list[Moments]:
    """The moments of each layer over the first few batches."""
    moments = [Moments() for _ in layers]
    handles = []
    for layer, own in zip(layers, moments, strict=True):

        def read(module: nn.Module, inputs: tuple, output: Tensor, own: Moments = own) -> None:
            seen = inputs[0].detach()
            output.register_hook(lambda gradient: own.add(seen, gradient.detach()))

        handles.append(layer.get_base_layer().register_forward_hook(read))
    weights = [layer.get_base_layer().weight for layer in layers]
    assert data.loss is not None  # `with_a_loss` has looked
    try:
        with as_it_was(model), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            for batch in data.first("LoRA-DA"):
                torch.autograd.grad(data.loss(batch), weights, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return moments
