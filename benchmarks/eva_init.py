"""EVA's initialisation: this engine beside peft's, on one model and one list of batches.

    python -m benchmarks.eva_init --preset small
    python -m benchmarks.eva_init --preset paper
    python -m benchmarks.eva_init --model llama-1b --device cuda

`small` is the shipped base. `paper` is the 12-million-parameter Decision Transformer of EVA's experiment, with random
weights. It has fewer windows in a batch, so that batches of both have about the same number of tokens. Batches are
windows of real trajectories of a task the base has not seen, collected on first use. When the list ends, peft goes
through it again.

Every measurement is a process of its own: load, warm up, initialise once. The engines take turns, and medians are
reported. `captured` is the variance that A's rows hold of all rows of all batches, in the worst and in the mean layer.
It is a share of what the best subspace of the same rank holds (an eigendecomposition in float64). `x forward` is the
time over that of as many full forward passes, measured in the same process. The row `as good` takes as many batches as
the streaming engine needs to capture what peft does in the worst layer, without a rule of convergence (tau = 1).

`--model` takes a language model of random weights in place of a Decision Transformer, see `benchmarks/language_model.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import language_model
from benchmarks.measure import Memory, timed
from eva_rl import configs
from eva_rl.adapter.eva import EvaSettings, Reading, eva_init
from eva_rl.batch import Batch
from eva_rl.data import WindowSampler, find_source, interface_of, load_dataset
from eva_rl.files import write_text
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer, ModelConfig, load_base
from eva_rl.run import versions
from eva_rl.table import markdown

TASK = "metaworld/peg-unplug-side-v3"
BATCH_SIZES = {"small": 32, "paper": 8}
POOL = 64
"""Batches in the list."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Job:
    """One measurement."""

    engine: str
    """`peft`, or a method of `EvaSettings`."""
    preset: str
    rank: int
    rho: float
    tau: float
    batches: int
    """The most to be taken, but peft takes what it wants."""
    device: str


def model_config(preset: str) -> ModelConfig:
    """The trunk of `configs/model/<preset>.yaml`."""
    settings = OmegaConf.to_container(OmegaConf.load(Path(configs.__file__).parent / "model" / f"{preset}.yaml"))
    return ModelConfig(**{**settings, "tokens": tuple(settings["tokens"])})


def load(preset: str, count: int, device: str) -> tuple[DecisionTransformer, list[Batch]]:
    source = find_source(TASK, None)
    trajectories = load_dataset(source.dataset(None, 0), TASK, None)
    interface = interface_of(source.interface, [trajectories])
    if preset == "small":
        model = load_base("mt40-small", torch.device(device)).model
    else:
        torch.manual_seed(0)
        model = DecisionTransformer(model_config(preset), [interface]).to(device)
    sampler = WindowSampler([trajectories], interface.name, model.config.context, BATCH_SIZES[preset], 0)
    return model.eval().requires_grad_(False), [sampler.batch(n).to(device) for n in range(count)]


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TRUNK_LAYERS and ".blocks." in name]


def scatters(model: DecisionTransformer, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The centred scatter (d, d) of all rows that each layer reads, in float64."""
    total: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    rows = 0
    inputs: dict[str, Tensor] = {}
    names = layers_of(model)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0]))
        for name in names
    ]
    for batch in tqdm(batches, desc="full decomposition", leave=False):
        with torch.no_grad():
            model(batch)
        mask = model.token_mask(batch)
        rows += int(mask.sum())
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for name in names:
            key = id(inputs[name])
            if key not in seen:
                x = inputs[name][mask].double()
                seen[key] = x.T @ x, x.sum(0)
            total[name] = total.get(name, 0) + seen[key][0]
            sums[name] = sums.get(name, 0) + seen[key][1]
    for handle in handles:
        handle.remove()
    return {name: total[name] - torch.outer(sums[name], sums[name]) / rows for name in names}


def initialise(
    job: Job, model: DecisionTransformer, batches: list[Batch], forward: Callable[..., Any]
) -> dict[str, Tensor]:
    names = layers_of(model)
    if job.engine == "peft":
        return get_eva_state_dict(
            model,
            batches,
            LoraConfig(r=job.rank, target_modules=names, eva_config=EvaConfig(rho=job.rho, tau=job.tau)),
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, config: model.token_mask(batch),
            prepare_layer_inputs_fn=lambda inputs, mask, name: inputs[0][mask],
            show_progress_bar=False,
        )
    settings = EvaSettings(rho=job.rho, tau=job.tau, max_batches=job.batches, method=job.engine)
    ranks = dict.fromkeys(names, job.rank)
    return {
        n: x.components
        for n, x in eva_init(model, batches, ranks, settings, Reading(forward, model.token_mask)).items()
    }


def captured(found: dict[str, Tensor], reference: dict[str, Tensor]) -> list[float]:
    """The share of the best subspace's variance in each layer that has a rank."""
    shares = []
    for name, rows in found.items():
        if len(rows):
            rows = rows.double()
            best = reference[name + ".values"][: len(rows)].sum()
            shares.append(float(((rows @ reference[name + ".scatter"]) * rows).sum() / best))
    return shares


def passes_as_good(job: Job, reference: str, worst: float) -> int:
    """The fewest batches after which the engine captures this share in the worst layer, or all there are."""
    warnings.simplefilter("ignore")
    model, batches = load(job.preset, POOL, job.device)
    full = load_file(reference, device=job.device)

    def good(count: int) -> bool:
        found = initialise(replace(job, batches=count), model, batches, lambda model, batch: model(batch))
        return min(captured(found, full)) >= worst

    return 1 + bisect_left(range(1, job.batches), True, key=good)


def measure(job: Job, reference: str) -> dict[str, float]:
    """Seconds, forward passes, memory and captured variance of one initialisation."""
    warnings.simplefilter("ignore")  # about the cap on batches: it is the list's length
    model, batches = load(job.preset, POOL, job.device)
    passes = 0

    def forward(model: nn.Module, batch: Batch) -> Any:
        nonlocal passes
        passes += 1
        return model(batch)

    memory = Memory(job.device)
    initialise(replace(job, rank=1, rho=1.0, tau=0.01, batches=2), model, batches[:2], forward)
    alone = [timed(lambda batch=batch: model(batch), job.device)[0] for batch in batches[:8]]
    passes = 0
    with memory:
        seconds, found = timed(lambda: initialise(job, model, batches, forward), job.device)
    shares = captured(found, load_file(reference, device=job.device))
    return {
        "seconds": seconds,
        "passes": passes,
        "forward": seconds / (passes * statistics.median(alone)),
        "memory": memory.peak,
        "worst": min(shares),
        "mean": statistics.mean(shares),
    }


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compare(preset: str, rank: int, rho: float, device: str, repeats: int, reference: str) -> list[list]:
    """Rows of the table for one rank and rho."""

    def job(engine: str, tau: float = EvaSettings.tau) -> Job:
        return Job(engine, preset, rank, rho, tau, POOL, device)

    peft = in_own_process(measure, job("peft"), reference)
    enough = in_own_process(passes_as_good, job("streaming", 1.0), reference, peft["worst"])
    jobs = {
        "streaming": job("streaming"),
        "streaming, as good": replace(job("streaming", 1.0), batches=enough),
        "covariance": replace(job("covariance", 1.0), batches=enough),
        "peft": job("peft"),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    runs["peft"].append(peft)
    for _ in range(repeats):
        for name in jobs:
            if len(runs[name]) < repeats:
                runs[name].append(in_own_process(measure, jobs[name], reference))
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in peft} for name, found in runs.items()
    }
    return [
        [
            rank,
            rho,
            name,
            f"{jobs[name].tau:g}",
            f"{found['seconds']:.2f}",
            f"{medians['peft']['seconds'] / found['seconds']:.1f}",
            int(found["passes"]),
            f"{found['forward']:.2f}",
            f"{found['memory']:.0f}",
            f"{found['worst']:.4f}",
            f"{found['mean']:.4f}",
        ]
        for name, found in medians.items()
    ]


HEADER = [
    "r",
    "rho",
    "engine",
    "tau",
    "seconds",
    "x faster",
    "passes",
    "x forward",
    "MiB",
    "captured, worst",
    "captured, mean",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(BATCH_SIZES), default="small")
    parser.add_argument("--model", choices=list(language_model.MODELS), help="in place of a preset")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--rhos", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", type=int, default=32, help="in the list, with --model")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds that peft has, with --model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that the tables go to")
    a = parser.parse_args()
    if a.model:
        cases = [language_model.Case(a.model, r, rho, a.batches, a.device, a.cap) for r in a.ranks for rho in a.rhos]
        language_model.tabulate(cases, a.results)
        return
    model, batches = load(a.preset, POOL, a.device)
    full = scatters(model, batches)
    head = (
        f"python -m benchmarks.eva_init --preset {a.preset} --ranks {' '.join(map(str, a.ranks))} "
        f"--rhos {' '.join(f'{rho:g}' for rho in a.rhos)} --repeats {a.repeats} --device {a.device}"
    )
    machine = (
        torch.cuda.get_device_name()
        if a.device == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    rows: list[list] = []
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference.safetensors")
        tensors = {f"{name}.scatter": scatter.clone() for name, scatter in full.items()}
        tensors |= {f"{name}.values": torch.linalg.eigvalsh(x).flip(0).contiguous() for name, x in full.items()}
        save_file(tensors, reference)
        for rank, rho in tqdm([(rank, rho) for rank in a.ranks for rho in a.rhos], unit="row", desc="compare"):
            rows += compare(a.preset, rank, rho, a.device, a.repeats, reference)
            used = ", ".join(f"{name} {version}" for name, version in versions().items())
            text = f"`{head}`\n\n{machine}; {used}\n\n{markdown(HEADER, rows)}\n"
            write_text(a.results / f"eva_init-{a.preset}-{a.device}.md", text)
    print(text)


if __name__ == "__main__":
    main()
