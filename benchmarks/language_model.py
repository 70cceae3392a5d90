"""EVA's initialisation of a language model with random weights, this engine beside peft's.

    python -m benchmarks.language_model --model llama-1b --device cuda

It needs torch, peft and transformers alone. `python -m benchmarks.eva_init --model llama-1b` is the same.

`llama-1b` has the form of a model of 1.2 billion parameters, `llama-tiny` the same in small. Weights are random, from a
config. Batches are token ids whose frequencies fall as in texts (Zipf's law). All linear layers but the output's have
an adapter. When the cap is over, peft is stopped at its next forward pass, and then has no result to be judged.

`captured` is as in `eva_init`, over all rows of all batches, for two layers of the first, the middle and the last
block. One of the two reads as many numbers as the model is wide, the other as many as the feed-forward layer is. The
best subspace of the same rank is that of a subspace iteration on the scatter in float64, to the end. `MiB` are in use
at the peak beyond the weights.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Memory, timed
from eva_rl.adapter.eva import EvaSettings
from eva_rl.adapter.eva import get_eva_state_dict as ours
from eva_rl.files import write_text

MODELS = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
SHAPES = {"llama-1b": (4, 512), "llama-tiny": (2, 64)}
"""Sequences and tokens of a batch."""
EXACT = 2048
"""The widest scatter that is decomposed as a whole."""
HEADER = [
    "r", "rho", "engine", "seconds", "passes", "x forward", "MiB", "MiB of a forward pass", "captured, worst", "captured, mean",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is compared."""

    model: str
    rank: int
    rho: float
    batches: int
    device: str
    cap: float
    """Seconds, of peft."""


class TimeIsUp(Exception):
    """peft has had its time."""


def load(case: Case) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model, in bfloat16 on CUDA, and the batches."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    with torch.device(case.device):
        model = LlamaForCausalLM(LlamaConfig(**MODELS[case.model])).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, model.config.vocab_size + 1).double()
    count = SHAPES[case.model][0] * SHAPES[case.model][1]
    ids = [torch.multinomial(frequencies, count, True, generator=generator) for _ in range(case.batches)]
    return model, [{"input_ids": x.view(SHAPES[case.model]).to(case.device)} for x in ids]


def judged_layers(model: nn.Module) -> list[str]:
    """Two layers of the first, the middle and the last block."""
    blocks = sorted({0, len(model.model.layers) // 2, len(model.model.layers) - 1})
    return [f"model.layers.{i}.{layer}" for i in blocks for layer in ("self_attn.q_proj", "mlp.down_proj")]


@torch.no_grad()
def scatters(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The centred scatter (d, d) of all rows that each judged layer reads, in float64."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        new = [x.T @ x, x.sum(0), torch.tensor(float(len(x)), device=x.device)]
        found[name] = [a + b for a, b in zip(found[name], new, strict=True)] if name in found else new

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: hook(name, x[0]))
        for name in judged_layers(model)
    ]
    for batch in tqdm(batches, desc="scatters", leave=False):
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: square - torch.outer(total, total) / rows for name, (square, total, rows) in found.items()}


def best(scatter: Tensor, most: int, rounds: int = 60) -> Tensor:
    """The largest eigenvalues of a symmetric matrix, in descending order."""
    if len(scatter) <= EXACT:
        return torch.linalg.eigvalsh(scatter).flip(0)[:most]
    basis = torch.randn(len(scatter), 2 * most + 16, dtype=scatter.dtype, device=scatter.device)
    for _ in range(rounds):
        basis = torch.linalg.qr(scatter @ basis).Q
    return torch.linalg.eigvalsh(basis.T @ scatter @ basis).flip(0)[:most]


def captured(found: dict[str, Tensor], reference: dict[str, Tensor]) -> list[float]:
    """The share of the best subspace's variance that A's rows hold, in each judged layer that has any."""
    shares = []
    for name, scatter in reference.items():
        rows = found[name].double()
        if len(rows):
            shares.append(float(((rows @ scatter) * rows).sum() / best(scatter, len(rows)).sum()))
    return shares


def initialise(
    engine: str, case: Case, model: nn.Module, batches: list[dict[str, Tensor]]
) -> tuple[dict[str, Tensor] | None, int]:
    """A's rows for each layer, or None if the time was up, and how many forward passes that took."""
    tau = EvaSettings.tau
    config = LoraConfig(
        r=case.rank,
        target_modules=[n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=case.rho, tau=tau),
    )
    passes, start = 0, time.perf_counter()

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        nonlocal passes
        if engine == "peft" and time.perf_counter() - start > case.cap:
            raise TimeIsUp
        passes += 1
        return model(**batch)

    options = {"peft_config": config, "forward_fn": forward, "show_progress_bar": False}
    try:
        if engine == "peft":
            return get_eva_state_dict(model, batches, **options), passes
        settings = EvaSettings(rho=case.rho, tau=tau, max_batches=case.batches)
        return ours(model, batches, settings=settings, **options), passes
    except TimeIsUp:
        return None, passes


def compare(case: Case) -> list[list]:
    """A row of the table for each engine."""
    warnings.simplefilter("ignore")  # about the cap on batches: it is the list's length
    model, batches = load(case)
    reference = scatters(model, batches)
    with torch.no_grad(), Memory(case.device) as forward:
        alone = [timed(lambda batch=batch: model(**batch), case.device)[0] for batch in batches[:8]]
    initialise("ours", Case(case.model, 1, 1.0, 2, case.device, case.cap), model, batches[:2])  # warm
    rows = []
    for engine in ("ours", "peft"):
        with Memory(case.device) as memory:
            seconds, (found, passes) = timed(lambda e=engine: initialise(e, case, model, batches), case.device)
        shares = captured(found, reference) if found else []
        rows.append(
            [
                case.rank,
                case.rho,
                engine,
                f"{seconds:.2f}" if found else f"stopped after {seconds:.0f}",
                passes,
                f"{seconds / (passes * statistics.median(alone)):.2f}",
                f"{memory.peak:.0f}",
                f"{forward.peak:.0f}",
                f"{min(shares):.4f}" if shares else "",
                f"{statistics.mean(shares):.4f}" if shares else "",
            ]
        )
    return rows


def describe(case: Case) -> str:
    """The line below the command."""
    settings, (sequences, length) = MODELS[case.model], SHAPES[case.model]
    where = torch.cuda.get_device_name() if case.device == "cuda" else f"{platform.machine()}, CPU"
    return (
        f"{where}, torch {torch.__version__}: {settings['num_hidden_layers']} blocks, {settings['hidden_size']} wide, random weights; "
        f"{case.batches} batches of {sequences} x {length} tokens; peft's time is {case.cap:g} s"
    )


def tabulate(cases: Sequence[Case], results: Path) -> None:
    """Compare in each case, write the table so far after each, and print the whole."""
    rows: list[list] = []
    first = cases[0]
    ranks, rhos = sorted({case.rank for case in cases}), sorted({case.rho for case in cases})
    command = (
        f"python -m benchmarks.language_model --model {first.model} --ranks {' '.join(map(str, ranks))} --rhos "
        f"{' '.join(f'{rho:g}' for rho in rhos)} --batches {first.batches} --cap {first.cap:g} --device {first.device}"
    )
    for case in tqdm(cases, unit="row", desc="compare"):
        rows += compare(case)
        lines = [HEADER, ["---"] * len(HEADER), *rows]
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        text = f"`{command}`\n\n{describe(case)}\n\n{table}\n"
        write_text(results / f"eva_init-{case.model}-{case.device}.md", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-1b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--rhos", type=float, nargs="+", default=[2.0])
    parser.add_argument("--batches", type=int, default=32, help="in the list")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds that peft has")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="the table's folder")
    a = parser.parse_args()
    tabulate([Case(a.model, r, rho, a.batches, a.device, a.cap) for r in a.ranks for rho in a.rhos], a.results)


if __name__ == "__main__":
    main()
