"""How long a step of a control loop takes: `eva_rl.load_policy` beside a plain Hugging Face GPT-2 loop, on one core.

    python -m benchmarks.latency --tokens state

- ours: `policy.act` and `policy.observe` of a model of the preset's size with Meta-World's interface: the environment's observation
  in, the environment's action out, keys and values kept.
- gpt2: what one would write with `transformers`: a GPT-2 of that size from a config, the tokens of a step embedded,
  keys and values kept by the library (`past_key_values`). When the window is full, it starts anew with the later half,
  in one pass.
- gpt2, whole window: the same without kept keys and values, the last `context` steps at every step, as Hugging Face's Decision
  Transformer is used.

Weights are random, and all is in float32. The three take turns at each repeat. Times are in milliseconds, over all
steps: wall time, and the process's own time on its core, which leaves out what other work on the machine takes.
`longest` is the longest step of the calmest repeat.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2Model

import eva_rl
from benchmarks.eva_init import RESULTS, model_config
from eva_rl.files import write_text
from eva_rl.model import DecisionTransformer, ModelConfig, load_base, save_base
from eva_rl.policy import ActingPolicy
from eva_rl.run import versions
from eva_rl.table import markdown

TASK = "metaworld/reach-v3"
OBSERVATION, ACTION = 39, 4
SIZES = {"return": 1, "state": OBSERVATION, "action": ACTION}
WARM = 50
"""Steps before those that count."""

Step = Callable[[np.ndarray, float], np.ndarray]
"""An observation, and what the step before earned -> an action."""


def ours(config: ModelConfig) -> Step:
    base = load_base("mt40-small")
    model = DecisionTransformer(config, [base.model.interfaces["metaworld"]])
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder, "model"), model, {TASK: base.tasks[TASK]}, TASK)
        policy = eva_rl.load_policy(Path(folder, "model"))
    policy.reset(target_return=1000.0)
    return _Ours(policy)


@dataclass
class _Ours:
    policy: ActingPolicy

    def __call__(self, observation: np.ndarray, reward: float) -> np.ndarray:
        action = self.policy.act(observation)
        self.policy.observe(reward)
        return action


class Plain(nn.Module):
    """A step's tokens through Hugging Face's GPT-2."""

    def __init__(self, config: ModelConfig, cached: bool):
        super().__init__()
        self.kinds, self.longest, self.cached = config.tokens, len(config.tokens) * config.context, cached
        self.half = len(config.tokens) * (config.context // 2)
        sizes = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads, "vocab_size": 1}
        self.trunk = GPT2Model(GPT2Config(**sizes, n_positions=self.longest))
        self.embed = nn.ModuleDict({kind: nn.Linear(SIZES[kind], config.width) for kind in config.tokens})
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, ACTION)
        self.window: list[torch.Tensor] = []  # (1, d) each
        self.past, self.wanted = None, 1000.0

    def _token(self, kind: str, value: np.ndarray) -> torch.Tensor:
        return self.norm(self.embed[kind](torch.as_tensor(value, dtype=torch.float32)[None]))

    @torch.inference_mode()
    def forward(self, observation: np.ndarray, reward: float) -> np.ndarray:
        if len(self.window) == self.longest:
            self.window = self.window[-self.half if self.cached else len(self.kinds) :]
            self.past = None
        if "return" in self.kinds:
            self.window.append(self._token("return", np.array([self.wanted / 1000])))
        self.window.append(self._token("state", observation))
        done = self.past.get_seq_length() if self.past is not None else 0
        new = torch.cat(self.window[done:])[None]  # (1, m, d)
        found = self.trunk(inputs_embeds=new, past_key_values=self.past, use_cache=self.cached)
        self.past = found.past_key_values
        action = np.clip(self.head(found.last_hidden_state[0, -1]).numpy(), -1, 1)
        if "action" in self.kinds:
            self.window.append(self._token("action", action))
        self.wanted -= reward
        return action


def milliseconds(step: Step, steps: int) -> np.ndarray:
    """The wall time of each step, and the process's own, (2, steps), with new observations at each."""
    rng, taken = np.random.default_rng(0), np.zeros((2, steps))
    observations = rng.normal(size=(WARM + steps, OBSERVATION))
    for number, observation in enumerate(observations):
        start = time.perf_counter(), time.process_time()
        step(observation, 0.5)
        if number >= WARM:
            taken[:, number - WARM] = time.perf_counter() - start[0], time.process_time() - start[1]
    return 1000 * taken


def summary(taken: list[np.ndarray], clock: int) -> list[float]:
    """Median, 99th percentile and longest by one of the two clocks."""
    joined = np.concatenate([own[clock] for own in taken])
    return [np.median(joined), np.quantile(joined, 0.99), min(own[clock].max() for own in taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=["small", "paper"], default=["small"])
    parser.add_argument("--tokens", nargs="+", choices=SIZES, help="of a step; by default the preset's")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.md")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for preset in a.presets:
        config = model_config(preset)
        config = replace(config, tokens=tuple(a.tokens)) if a.tokens else config
        loops = {
            "ours": ours(config),
            "gpt2": Plain(config, cached=True).eval(),
            "gpt2, whole window": Plain(config, cached=False).eval(),
        }
        taken: dict[str, list[np.ndarray]] = {name: [] for name in loops}
        for _ in tqdm(range(a.repeats), desc=preset):
            for name, loop in loops.items():
                taken[name].append(milliseconds(loop, a.steps))
        plain = summary(taken["gpt2"], 0)[0]
        for name, found in taken.items():
            numbers = summary(found, 0), summary(found, 1)
            cells = [f"{number:.2f}" for number in (*numbers[0], *numbers[1])]
            rows.append([preset, name, *cells, f"{plain / numbers[0][0]:.1f}"])
    header = [f"{what}{own} ms" for own in ("", ", own") for what in ("median", "99 %", "longest")]
    table = markdown(["preset", "what", *header, "x gpt2"], rows)
    tokens = f"--tokens {' '.join(a.tokens)} " if a.tokens else ""
    command = (
        f"python -m benchmarks.latency --presets {' '.join(a.presets)} {tokens}--steps {a.steps} --repeats {a.repeats}"
    )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    load = os.getloadavg()[0]
    beside = f"Other work ran beside it (load {load:.1f}): its numbers are too high.\n\n" if load > 0.5 else ""
    head = f"`{command}`\n\n{platform.machine()}, one of {os.cpu_count()} cores; {used}\n\n{beside}"
    write_text(a.output, f"{head}{table}\n")
    print(table)


if __name__ == "__main__":
    main()
