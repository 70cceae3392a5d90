"""Tokens a second of a training step, and windows a second of sampling: ours and what others run.

    python -m benchmarks.training

- ours: `DecisionTransformer.loss` with AdamW, in float32 and in the precision that `auto` chooses here.
- Hugging Face: `DecisionTransformerModel` of the same width, depth, window and batch, in float32 and under the same
  autocast, with the masked mean squared error of the actions, as its own guide trains it.
- d3rlpy: its Decision Transformer of that size, as it is run (`update`), where it is installed.

All have dropout 0.1, AdamW and clipping by the global norm. The arithmetic of a step is 6 multiplications and additions
for each weight of the trunk and each token. The share of the peak is this arithmetic a second, over that of the best of
a few large matrix products in the same type, timed in the same run. Figures are medians of the repeats, all in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import minari
import numpy as np
import torch
from tqdm import tqdm
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from benchmarks.eva_init import RESULTS, model_config
from benchmarks.measure import timed
from eva_rl.batch import Batch
from eva_rl.data import WindowSampler, find_source, interface_of, load_dataset
from eva_rl.files import write_text
from eva_rl.model import DecisionTransformer, ModelConfig
from eva_rl.run import versions
from eva_rl.table import markdown
from eva_rl.training import autocast

TASK = "metaworld/push-back-v3"
BATCH_SIZES = {"small": 64, "paper": 32}
TOKENS = ("return", "state", "action")
"""Those of the others, which our model takes too, so that all have as many."""
LONGEST = 200  # steps of an episode
STEPS = 3
"""Optimiser steps of one timing."""


def peak(dtype: torch.dtype, device: str) -> float:
    """Multiplications and additions a second of the best of a few matrix products."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(6))


def optimiser_step(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(model: DecisionTransformer, batches: list[Batch], precision: str, device: str) -> Callable[[], None]:
    model.train().to(device)
    turns = iter(range(10**9))

    def loss() -> torch.Tensor:
        with autocast(precision, torch.device(device)):
            return model.loss(batches[next(turns) % len(batches)])

    return optimiser_step(list(model.parameters()), loss)


def hugging_face(config: ModelConfig, batches: list[Batch], precision: str, device: str) -> Callable[[], None]:
    model = DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=39,
            act_dim=4,
            hidden_size=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_positions=3 * config.context,
            max_ep_len=LONGEST,
        )
    ).train()
    model.to(device)
    positions = torch.arange(config.context, device=device).expand(len(batches[0].mask), -1)
    turns = iter(range(10**9))

    def loss() -> torch.Tensor:
        batch = batches[next(turns) % len(batches)]
        with autocast(precision, torch.device(device)):
            found = model(
                states=batch.observations,
                actions=batch.actions,
                rewards=batch.rewards[..., None],
                returns_to_go=batch.returns_to_go[..., None],
                timesteps=positions,
                attention_mask=batch.mask.long(),
            ).action_preds
        return (found.float() - batch.actions)[batch.mask].square().mean()

    return optimiser_step(list(model.parameters()), loss)


def d3rlpy(config: ModelConfig, batches: list[Batch]) -> Callable[[], None] | None:
    try:
        from d3rlpy.algos import DecisionTransformerConfig as Config
        from d3rlpy.dataset import TrajectoryMiniBatch
        from d3rlpy.models import VectorEncoderFactory
        from d3rlpy.optimizers import AdamWFactory
    except ImportError as error:
        print(f"d3rlpy is left out: {error}")
        return None
    algorithm = Config(
        batch_size=len(batches[0].mask),
        context_size=config.context,
        max_timestep=LONGEST,
        num_heads=config.heads,
        num_layers=config.layers,
        encoder_factory=VectorEncoderFactory([config.width], exclude_last_activation=True),
        optim_factory=AdamWFactory(clip_grad_norm=0.25),
    ).create(device=False)
    algorithm.create_impl((39,), 4)
    turns = iter(range(10**9))
    theirs = [
        TrajectoryMiniBatch(
            observations=batch.observations.numpy(),
            actions=batch.actions.numpy(),
            rewards=batch.rewards[..., None].numpy(),
            returns_to_go=batch.returns_to_go[..., None].numpy(),
            terminals=np.zeros((*batch.mask.shape, 1), np.float32),
            timesteps=np.broadcast_to(np.arange(1.0, config.context + 1, dtype=np.float32), batch.mask.shape).copy(),
            masks=batch.mask.float().numpy(),
            length=config.context,
        )
        for batch in batches
    ]
    return lambda: algorithm.update(theirs[next(turns) % len(theirs)])


def seconds_each(step: Callable[[], object], count: int, device: str = "cpu") -> float:
    """Seconds a call."""

    def several() -> None:
        for _ in range(count):
            with torch.enable_grad():
                step()

    return timed(several, device)[0] / count


def minari_windows(dataset: minari.MinariDataset, count: int, context: int) -> None:
    """So many windows by Minari's `sample_episodes` and slicing."""
    rng = np.random.default_rng(0)
    columns: list[list[np.ndarray]] = [[], [], []]
    episodes = [episode for _ in range(count) for episode in dataset.sample_episodes(1)]  # 40 hold no 64 different ones
    for episode in episodes:
        first = int(rng.integers(len(episode) - context + 1))
        own = slice(first, first + context)
        for column, values in zip(columns, (episode.observations, episode.actions, episode.rewards), strict=True):
            column.append(values[own])
    for column in columns:
        np.stack(column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(BATCH_SIZES), default=list(BATCH_SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda leaves d3rlpy out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that the table goes to")
    a = parser.parse_args()
    source = find_source(TASK)
    dataset_id = source.dataset(None, 0)
    trajectories = load_dataset(dataset_id, TASK)
    interface, dataset = interface_of(source.interface, [trajectories]), minari.load_dataset(dataset_id)
    peaks = {name: peak(getattr(torch, name), a.device) for name in ("float32", "bfloat16")}
    with autocast("auto", torch.device(a.device)):
        auto = "bfloat16" if torch.is_autocast_enabled(a.device) else "float32"
    rows, sampling = [], []
    for preset in a.presets:
        config, size = replace(model_config(preset), tokens=TOKENS), BATCH_SIZES[preset]
        sampler = WindowSampler([trajectories], interface.name, config.context, size, 0)
        batches = [sampler.batch(number).to(a.device) for number in range(4)]
        model = DecisionTransformer(config, [interface])
        weights = sum(
            p.numel() for name, p in model.trunk.named_parameters() if p.ndim == 2 and "positions" not in name
        )
        steps = {
            ("Hugging Face", "float32"): hugging_face(config, batches, "float32", a.device),
            ("Hugging Face", "bfloat16"): hugging_face(config, batches, "bfloat16", a.device),
            ("d3rlpy", "float32"): d3rlpy(config, batches) if a.device == "cpu" else None,
            ("ours", "float32"): ours(model, batches, "float32", a.device),
            ("ours", "bfloat16"): ours(DecisionTransformer(config, [interface]), batches, "bfloat16", a.device),
        }
        steps = {name: step for name, step in steps.items() if step is not None}
        seconds: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in tqdm(range(a.repeats), desc=preset):
            for name, step in steps.items():
                seconds[name].append(seconds_each(step, STEPS, a.device))
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        for (who, precision), found in medians.items():
            tokens = size * config.context * 3
            rows.append(
                [
                    f"{preset}, {size} x {config.context}",
                    who,
                    precision + (", auto" if who == "ours" and precision == auto else ""),
                    f"{1000 * found:.0f}",
                    f"{tokens / found:,.0f}",
                    f"{6 * weights * tokens / found / peaks[precision]:.0%}",
                    f"{medians['Hugging Face', 'float32'] / found:.2f}",
                    f"{medians['Hugging Face', precision] / found:.2f}",
                ]
            )
        own = statistics.median(seconds_each(lambda s=sampler: s.batch(7), 50) for _ in range(a.repeats))
        theirs = statistics.median(
            seconds_each(lambda n=size, t=config.context: minari_windows(dataset, n, t), 1) for _ in range(a.repeats)
        )
        sampling.append(
            [f"{preset}, {size} x {config.context}", f"{1e6 * own:.0f}", f"{1e6 * theirs:,.0f}", f"{theirs / own:.0f}"]
        )
    header = ["preset", "who", "precision", "ms a step", "tokens a second", "of peak", "x HF float32", "x HF same"]
    table = markdown(header, rows)
    second = markdown(["preset", "ours, µs a batch", "Minari, µs a batch", "ratio"], sampling)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    place = torch.cuda.get_device_name() if a.device == "cuda" else platform.machine()
    text = (
        f"`python -m benchmarks.training --presets {' '.join(a.presets)} --repeats {a.repeats} --device {a.device}`\n\n"
        f"{place}, {os.cpu_count()} cores, matrix products at "
        f"{' and '.join(f'{speed / 1e9:.0f} GFLOP/s in {name}' for name, speed in peaks.items())}; {used}\n\n{table}\n\n"
        f"Sampling windows, against Minari's `sample_episodes` and slicing:\n\n{second}\n"
    )
    write_text(a.results / ("training.md" if a.device == "cpu" else f"training-{a.device}.md"), text)
    print(text)


if __name__ == "__main__":
    main()
