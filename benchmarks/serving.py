"""Steps a second of fifty episodes whose adapters differ: all in one batch, and other ways to do the same.

    python -m benchmarks.serving

- one merged model: the fifty episodes with a single adapter in its weights, the speed to come near.
- mixed batch: 1, 10 and 50 adapters in the batch, as `evaluate library=...` acts (`eva_rl.library.serve.MixedDecoder`).
- one after the other: each adapter merged in turn, the episodes of each in a batch of their own (loading and merging
  are not counted).
- peft: the same windows through peft's forward pass with `adapter_names`, one name a row. It keeps no keys and values, so each step
  costs its whole window. `peft, merged` is that pass without adapters: the part that peft's mixing does not explain.

Adapters are random LoRA of rank 8 on all layers of the trunk of the default base. Observations are random, and
everything runs on one core. The ways take turns at each repeat, and the best repeat counts. Memory is that of the
weights, the base's counted once.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from tqdm import tqdm

import eva_rl
from benchmarks.eva_init import RESULTS
from eva_rl.adapter import attach, load_adapter, save_adapter
from eva_rl.batch import Batch
from eva_rl.files import write_text
from eva_rl.library.serve import Adapters, MixedDecoder
from eva_rl.model import NOTES, TRUNK_LAYERS, AdapterNotes, Base, DecisionTransformer, Decoder, load_base
from eva_rl.run import versions
from eva_rl.table import markdown

BASE, INTERFACE, TASK = "mt40-small", "metaworld", "metaworld/reach-v3"
EPISODES, STEPS = 50, 40
ADAPTERS = (1, 10, 50)


def make_library(folder: Path, base: Base, count: int) -> eva_rl.Library:
    """So many random adapters."""
    library = eva_rl.Library(folder / "lib")
    for number in range(count):
        torch.manual_seed(number)
        lora = LoraConfig(r=8, lora_alpha=8, target_modules=list(TRUNK_LAYERS), init_lora_weights=False)
        adapter = attach(copy.deepcopy(base.model), lora)
        notes = AdapterNotes(BASE, base.sha256, TASK, base.model.interfaces[INTERFACE], base.tasks[TASK])
        save_adapter(adapter, folder / f"run{number}", BASE, {NOTES: asdict(notes)})
        library.add(folder / f"run{number}", f"a{number}", sketch=False)
    return library


def steps(decoder: Decoder, observations: Tensor) -> None:
    """All steps (T, n, obs) of the episodes."""
    zeros = torch.zeros(observations.shape[1])
    for row in observations:
        decoder.record(decoder.act(row, zeros), zeros)


def one_after_the_other(models: list[DecisionTransformer], observations: Tensor) -> None:
    for number, model in enumerate(models):
        own = observations[:, number :: len(models)]
        steps(Decoder(model, INTERFACE, own.shape[1]), own)


@torch.no_grad()
def peft_windows(model: torch.nn.Module, context: int, observations: Tensor, names: list[str] | None) -> None:
    """Each step's window through the model, as long as it is by then and `context` at most."""
    for last in range(1, len(observations) + 1):
        seen = observations[max(0, last - context) : last].transpose(0, 1)  # (n, T, obs)
        zeros = torch.zeros(seen.shape[:2])
        batch = Batch(seen, torch.zeros(*zeros.shape, 4), zeros, zeros, zeros == 0, INTERFACE)
        model(batch, **({} if names is None else {"adapter_names": names}))


def ways(library: eva_rl.Library, base: Base, count: int, observations: Tensor) -> dict[str, Callable[[], None]]:
    """What is timed, for this number of adapters."""
    names, context = [f"a{number}" for number in range(count)], base.model.config.context
    merged = [load_adapter(load_base(BASE).model, library.path(name)) for name in names]
    adapters = Adapters.load(library, names)
    rows = [episode % count for episode in range(EPISODES)]
    peft_model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(library.path("a0")), adapter_name="a0")
    for name in names[1:]:
        peft_model.load_adapter(str(library.path(name)), adapter_name=name)
    peft_model.eval()
    return {
        "one merged model": lambda: steps(Decoder(merged[0], INTERFACE, EPISODES), observations),
        "mixed batch": lambda: steps(MixedDecoder(adapters, rows), observations),
        "one after the other": lambda: one_after_the_other(merged, observations),
        "peft": lambda: peft_windows(peft_model, context, observations, [names[row] for row in rows]),
        "peft, merged": lambda: peft_windows(merged[0], context, observations, None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    base = load_base(BASE)
    base = replace(base, model=base.model.requires_grad_(False))
    observations = torch.randn(STEPS, EPISODES, 39, generator=torch.Generator().manual_seed(0))
    table = []
    with tempfile.TemporaryDirectory() as folder:
        library = make_library(Path(folder), base, max(ADAPTERS))
        for count in ADAPTERS:
            timed = ways(library, base, count, observations)
            best = dict.fromkeys(timed, float("inf"))
            for _ in tqdm(range(repeats), f"{count} adapters"):
                for name, run in timed.items():
                    started = time.perf_counter()
                    run()
                    best[name] = min(best[name], time.perf_counter() - started)
            speed = {name: STEPS * EPISODES / seconds for name, seconds in best.items()}
            whole = speed["one merged model"]
            table += [(count, name, f"{own:.0f}", f"{own / whole:.2f}") for name, own in speed.items()]
        each = (library.path("a0") / "adapter_model.safetensors").stat().st_size
        swap = swap_milliseconds(library)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    text = [
        "# Many adapters at once",
        "`python -m benchmarks.serving` (the file says what is compared).",
        markdown(["adapters", "way", "steps a second", "of one merged model"], table),
        f"The base's weights take {weights / 1e6:.1f} MB, each adapter {each / 1e6:.2f} MB more. A swap by `policy.act` takes {swap:.2f} "
        "milliseconds at the beginning of an episode.",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions().items())}.",
    ]
    write_text(RESULTS / "serving.md", "\n\n".join(text) + "\n")
    print("\n".join(text[2:4]))


def swap_milliseconds(library: eva_rl.Library) -> float:
    """The median time that a policy needs to change to another adapter."""
    policy, taken = library.policy(), []
    policy.act(torch.zeros(39).numpy())
    for number in range(100):
        policy.reset()
        started = time.perf_counter()
        policy.use(f"a{number % max(ADAPTERS)}")
        taken.append(time.perf_counter() - started)
    return sorted(taken)[50] * 1000


if __name__ == "__main__":
    main()
