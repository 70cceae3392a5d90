"""The gradient that reaches B at the first step, |dL/dB|_F, under LoRA's initialisations of A.

    python -m benchmarks.first_gradient

The model is the shipped base, on trajectories of a task it has not seen. The figure is the mean over batches of the
Frobenius norm over all layers, on the batches that the initialisation saw and on as many fresh ones. EVA's ranks are
not shared out (rho = 1) and alpha = r, so that every method has the same layers, ranks and scale.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from tqdm import tqdm

from benchmarks.eva_init import RESULTS, TASK, load
from eva_rl.adapter import EvaSettings, attach, starts
from eva_rl.batch import Batch
from eva_rl.files import write_text
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer
from eva_rl.run import versions
from eva_rl.table import markdown

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    # name                            init_lora_weights, settings of EVA
    "EVA, weighting=gradient, about 0": ("eva", {"weighting": "gradient", "center": False}),
    "EVA, about 0": ("eva", {"center": False}),
    "EVA": ("eva", {}),
    "OLoRA": ("olora", {}),
    "PiSSA": ("pissa", {}),
    "orthogonal": ("orthogonal", {}),
    "LoRA": (True, {}),
}


def gradient(model: DecisionTransformer, batches: Sequence[Batch]) -> float:
    """The mean over batches of |dL/dB|_F."""
    norms = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        model.loss(batch).backward()
        squares = [p.grad.square().sum() for name, p in model.named_parameters() if "lora_B" in name]
        norms.append(float(sum(squares)) ** 0.5)
    return statistics.mean(norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16)
    a = parser.parse_args()
    warnings.simplefilter("ignore")  # about the cap on batches, which is meant
    rows = []
    for name, (init, options) in tqdm(METHODS.items()):
        model, batches = load("small", 2 * a.batches, "cpu")
        seen, fresh = batches[: a.batches], batches[a.batches :]
        config = LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules=list(TRUNK_LAYERS), init_lora_weights=init)
        start = None
        if init == "eva":
            config.eva_config = EvaConfig(rho=1.0)
            settings = EvaSettings(rho=1.0, tau=1.0, max_batches=a.batches, **options)
            start = partial(starts.eva, settings=settings)
        forward = DecisionTransformer.as_trained
        attach(model, config, seen, model.token_masks, start=start, loss=model.loss, forward=forward)
        model.eval()
        a_rows = [p.norm(dim=1) for n, p in model.named_parameters() if "lora_A" in n]
        rows.append(
            [
                name,
                f"{float(torch.cat(a_rows).mean()):.2f}",
                f"{gradient(model, seen):.4f}",
                f"{gradient(model, fresh):.4f}",
            ]
        )
    head = f"`python -m benchmarks.first_gradient --rank {a.rank} --batches {a.batches}` ({TASK})"
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    table = markdown(["A", "norm of A's rows", "batches EVA saw", "fresh batches"], rows)
    write_text(RESULTS / "first_gradient.md", f"{head}\n\n{used}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
