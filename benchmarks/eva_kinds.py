"""Which kinds of models EVA can be initialised on: peft and this project, each tried with one call.

    python -m benchmarks.eva_kinds

Models are tiny, and made from configs with random weights. Both peft's `initialize_lora_eva_weights` and our `attach`
get the same model, config and batches, and no functions of their own. Where peft fails this way, it gets what a user
could write: a forward function that gives the model its batch, and all rows of a layer's first input. What either says
when it fails is cut short in the table. Each call of peft has five seconds of processor time, because it goes on for
ever where a batch has fewer rows than components.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import peft
import torch
import transformers
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.utils import logging

from eva_rl.adapter import attach
from eva_rl.adapter.eva.tokens import call
from eva_rl.errors import in_one_line

VOCABULARY, COUNT, BATCH = 40, 6, 8
TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Kind:
    """A model, its batches, and which of the rows (B, T) that a layer reads count."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    targets: list[str] | str
    mask: Callable[[Any, str], Tensor | None] = lambda batch, name: None
    more: dict[str, Any] = field(default_factory=dict)


def tokens(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) of a skewed distribution, and which of them are no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = (VOCABULARY * torch.rand(BATCH, length, generator=generator) ** 3).long()
    lengths = torch.randint(length // 2, length + 1, (BATCH, 1), generator=generator)
    return ids, torch.arange(length) < lengths


def of_decoder(seed: int) -> dict[str, Tensor]:
    ids, mask = tokens(seed, 10 + seed % 2)
    labels = torch.where(mask & (torch.arange(ids.shape[1]) > 2), ids, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def of_both(length: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(seed: int) -> dict[str, Tensor]:
        ids, mask = tokens(seed, 8)
        answers, counted = tokens(100 + seed, length)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(counted, answers, -100)}

    return batch


def mask_of_both(batch: dict[str, Tensor], name: str) -> Tensor:
    reads_encoder = name.startswith("encoder") or ("EncDecAttention" in name and name[-1] in "kv")
    return batch["attention_mask"].bool() if reads_encoder else batch["labels"] != -100


def images(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator).cumsum(-1) / 4}


def sounds(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    answers, counted = tokens(seed, 6)
    return {
        "input_features": torch.randn(BATCH, 8, 20, generator=generator).cumsum(-1) / 4,
        "labels": torch.where(counted, answers, -100),
    }


def mask_of_whisper(batch: dict[str, Tensor], name: str) -> Tensor | None:
    reads_encoder = "encoder" in name and name.rpartition(".")[2] in ("k_proj", "v_proj", "q_proj", "fc1")
    return None if reads_encoder and "encoder_attn.q" not in name else batch["labels"] != -100


def vectors(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 7, 16, generator=generator) * 0.7 ** torch.arange(16)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes))


def whisper() -> nn.Module:
    sizes = {side + name: n for side in ("encoder", "decoder") for name, n in (("_layers", 1), ("_attention_heads", 2))}
    sizes |= {
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "d_model": 16,
        "num_mel_bins": 8,
        "max_source_positions": 10,
    }
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = transformers.WhisperConfig(vocab_size=VOCABULARY, max_target_positions=12, **sizes, **special)
    return transformers.WhisperForConditionalGeneration(config)


class Attentive(nn.Module):
    """`nn.MultiheadAttention` of three sorts: of itself, of another sequence, and inside torch's own layer."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(x, x, x, need_weights=False)[0]
        z = self.other(y[:, :3].transpose(0, 1), key=x.transpose(0, 1), value=x.transpose(0, 1))[0]
        return self.layer(y) + z.mean(0)[:, None]


def vit_config() -> transformers.ViTConfig:
    sizes = {name: size for name, size in TINY.items() if name != "vocab_size"}
    return transformers.ViTConfig(**sizes, intermediate_size=48, image_size=16, patch_size=4)


KINDS = {
    "gpt2": Kind(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        ),
        of_decoder,
        ["c_attn", "c_fc", "c_proj"],
        lambda batch, name: batch["labels"] != -100,
        {"fan_in_fan_out": True},
    ),
    "llama": Kind(
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**TINY, intermediate_size=48, num_key_value_heads=1)
        ),
        of_decoder,
        "all-linear",
        lambda batch, name: batch["labels"] != -100,
    ),
    "t5": Kind(t5, of_both(6), ["q", "k", "v", "wi", "wo"], mask_of_both),
    "t5 of equal lengths": Kind(t5, of_both(8), ["q", "k", "v", "wi", "wo"], mask_of_both),
    "vit": Kind(
        lambda: transformers.ViTForImageClassification(vit_config()),
        images,
        "all-linear",
    ),
    "vit's patches": Kind(
        lambda: transformers.ViTModel(vit_config()),
        images,
        ["projection"],
    ),
    "whisper": Kind(whisper, sounds, ["q_proj", "k_proj", "v_proj", "fc1"], mask_of_whisper),
    "mixtral": Kind(
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**TINY, intermediate_size=48, num_key_value_heads=1, num_local_experts=4)
        ),
        of_decoder,
        "all-linear",
        lambda batch, name: batch["labels"] != -100,
    ),
    "attention": Kind(Attentive, vectors, ["own", "other", "self_attn", "linear1", "linear2"]),
    "convolutions": Kind(
        lambda: nn.Sequential(
            nn.Conv1d(7, 8, 3, padding="same", padding_mode="circular"),
            nn.GELU(),
            nn.Conv1d(8, 8, 3, stride=2, padding=1, groups=2),
            nn.Unflatten(2, (2, 4)),
            nn.Conv2d(8, 6, (1, 3), padding=(1, 0)),
            nn.Flatten(),
            nn.Linear(48, 5),
        ),
        vectors,
        ["0", "2", "4", "6"],
        more={"r": 4},
    ),
}


class Recurrent(nn.Module):
    """A layer that runs once a step."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(h + x[:, t]))
        return h


class Experts(nn.Module):
    """Two experts, of which a batch reaches one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.mean() > 0)](x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.a(x) * scale


SITUATIONS = KINDS | {
    "a layer run once a step, 3 to 7 steps": Kind(Recurrent, lambda n: vectors(n)[:, : 3 + n % 5], ["step"]),
    "an expert that some batches do not reach": Kind(Experts, lambda n: vectors(n) + (-1) ** n, ["0", "1"]),
    "batches that are tuples": Kind(Pair, lambda n: (vectors(n), torch.tensor(2.0)), ["a"]),
    "an embedding beside linear layers": Kind(
        lambda: nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16)), lambda n: tokens(n, 8)[0], ["0", "1"]
    ),
    "fewer rows in a batch than components": replace(
        KINDS["llama"], batch=lambda n: {k: v[:1, :2] for k, v in of_decoder(n).items() if k == "input_ids"}
    ),
    "gpt2, compiled and run before": replace(KINDS["gpt2"], model=lambda: compiled("gpt2")),
}


def compiled(name: str) -> nn.Module:
    model = KINDS[name].model().eval()
    model.compile(backend="eager")
    with torch.no_grad():
        model(**KINDS[name].batch(0))
    return model


def config_of(kind: Kind) -> LoraConfig:
    options = {"r": 3, "target_modules": kind.targets, "eva_config": EvaConfig(rho=2.0)}
    return LoraConfig(**(options | {"init_lora_weights": "eva"} | kind.more))


class TimeIsUp(Exception):
    """It goes on and on."""


@contextmanager
def seconds(count: int) -> Iterator[None]:
    """End the block with `TimeIsUp` after so many seconds of processor time."""

    def ring(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, count)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(run: Callable[[], Any]) -> str:
    """`yes`, or what was said instead."""
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings(), seconds(5):
            warnings.simplefilter("ignore")
            left = run()
    except TimeIsUp:
        return "no: goes on for ever"
    except Exception as error:  # noqa: BLE001 (the table tells of it)
        said = in_one_line(error).replace("|", "/")
        if TimeIsUp.__name__ in said:  # as torch.compile reports it
            return "no: goes on for ever"
        return f"no: {type(error).__name__}: {said[:90]}{'...' if len(said) > 90 else ''}"
    return f"yes{f', but for {left}' if left else ''}"


def pefts(kind: Kind, **functions: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(kind.model(), config_of(kind))
    batches = [kind.batch(number) for number in range(COUNT)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False, **functions)


def best_of_pefts(kind: Kind) -> str:
    """What peft says by itself, or with a user's functions where that is better."""
    found = outcome(lambda: pefts(kind))
    if found.startswith("yes") or "for ever" in found:
        return found
    functions = {
        "forward_fn": call,
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": lambda inputs, _, name: inputs[0].flatten(0, -2),
    }
    with_functions = outcome(lambda: pefts(kind, **functions))
    return "with functions of one's own, all rows" if with_functions == "yes" else with_functions


def ours(kind: Kind) -> str:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(kind.model(), config_of(kind), map(kind.batch, range(COUNT)))
    said = [str(w.message) for w in caught if "usual initialisation" in str(w.message)]
    return said[0].partition("for them: ")[2].partition(". EVA adapts")[0] if said else ""


def main() -> None:
    from benchmarks.eva_init import RESULTS  # what tests take from this file needs no datasets
    from eva_rl.files import write_text
    from eva_rl.run import versions
    from eva_rl.table import markdown

    logging.set_verbosity_error()
    rows = [[name, best_of_pefts(kind), outcome(lambda kind=kind: ours(kind))] for name, kind in SITUATIONS.items()]
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    table = markdown(["model or batches", "peft", "here"], rows)
    write_text(RESULTS / "eva_kinds.md", f"`python -m benchmarks.eva_kinds`\n\n{used}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
