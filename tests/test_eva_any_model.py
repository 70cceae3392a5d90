"""EVA on kinds of models, tiny and made from configs: against the full SVD of what each layer read, recorded by other hooks."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import BatchEncoding

from benchmarks.eva_kinds import COUNT, KINDS, Kind, vectors
from eva_rl.adapter import attach, save_adapter
from eva_rl.adapter.eva import EvaSettings, get_eva_state_dict
from eva_rl.adapter.eva.kinds import patches
from eva_rl.adapter.starts import eva, orthogonal
from eva_rl.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped after:UserWarning"),
    pytest.mark.filterwarnings("ignore:The inputs of:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*low_cpu_mem_usage:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def lora(kind: Kind, rho: float = 1.0) -> LoraConfig:
    options = {"r": 3, "lora_alpha": 3, "target_modules": kind.targets, "eva_config": EvaConfig(rho=rho)}
    return LoraConfig(**(options | {"init_lora_weights": "eva"} | kind.more))


def fresh(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    return kind.model().eval()


def give(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def recorded(kind: Kind, names: list[str]) -> dict[str, Tensor]:
    """All rows (n, d) that each of these linear layers or convolutions of the base read, and that count."""
    model, read = fresh(kind), {name: [] for name in names}
    for batch in map(kind.batch, range(COUNT)):

        def hook(module: nn.Module, arguments: tuple, keywords: dict, name: str, batch: Any = batch) -> None:
            x = (*arguments, *keywords.values())[0].detach()
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                x = unfolded(module, x)
            mask = kind.mask(batch, name)
            if mask is not None and x.ndim == 2 and len(x) == mask.numel():
                mask = mask.flatten()
            read[name].append(x.flatten(0, -2) if mask is None else x[mask])

        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, a, k, name=name, hook=hook: hook(m, a, k, name), with_kwargs=True
            )
            for name in names
        ]
        with torch.no_grad():
            give(model, batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in read.items()}


def unfolded(conv: nn.Module, x: Tensor) -> Tensor:
    """(B, O, C k1 k2) by torch's own im2col, with the zeros that peft's A is given for padding of any mode."""
    size, stride = conv.kernel_size, conv.stride
    padding = [k // 2 for k in size] if conv.padding == "same" else list(conv.padding)
    if len(size) == 1:
        x, size, stride, padding = x[:, :, None], (1, *size), (1, *stride), [0, *padding]
    return nn.functional.unfold(x, size, padding=padding, stride=stride).mT


def share_held(components: Tensor, read: Tensor) -> float:
    """The variance these rows hold, as a share of what the best subspace of their number does."""
    read = read.double() - read.double().mean(0)
    best = torch.linalg.svdvals(read)[: len(components)].square().sum()
    return float((read @ components.double().T).square().sum() / best)


everything = partial(eva, settings=EvaSettings(rho=1.0, tau=1.0, max_batches=COUNT, method="covariance"))
"""EVA that takes all batches in, with exact covariances."""


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        found = give(model.eval(), batch)
    return found if isinstance(found, Tensor) else getattr(found, "logits", found[0])


@pytest.mark.filterwarnings("ignore:Some layers keep:UserWarning")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"attention"}))
def test_a_holds_the_leading_right_singular_vectors_of_what_each_layer_read(name):
    kind = KINDS[name]
    adapter = attach(fresh(kind), lora(kind), map(kind.batch, range(COUNT)), start=everything)
    assert adapter.eva
    read = recorded(kind, list(adapter.eva))
    for layer, found in adapter.eva.items():
        assert found.rows == len(read[layer])
        assert share_held(found.components, read[layer]) > 0.9999, layer
        weight = adapter.model.base_model.model.get_submodule(layer).lora_A["default"].weight
        torch.testing.assert_close(weight.detach().flatten(1), found.components)
    batch = kind.batch(0)
    torch.testing.assert_close(output(adapter.model, batch), output(fresh(kind), batch), rtol=0, atol=1e-5)


def values(attention: nn.MultiheadAttention, query: Tensor, other: Tensor) -> Tensor:
    """The heads' outputs side by side (B, T, d), from the textbook."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, H, T, d / H)
        for x, w, b in zip((query, other, other), weights, biases, strict=True)
    )
    mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)


def test_attention_has_directions_for_both_projections():
    kind = KINDS["attention"]
    adapter = attach(fresh(kind), lora(kind, rho=2.0), map(kind.batch, range(COUNT)), start=everything)
    model, read = fresh(kind), {}
    with torch.no_grad():
        for x in map(kind.batch, range(COUNT)):
            y = model.own(x, x, x)[0]
            for name, rows in {
                "own": [x],
                "own.base_layer.out_proj": [values(model.own, x, x)],
                "other": [y[:, :3], x],
                "other.base_layer.out_proj": [values(model.other, y[:, :3], x)],
                "layer.self_attn": [y],
                "layer.self_attn.base_layer.out_proj": [values(model.layer.self_attn, y, y)],
            }.items():
                read.setdefault(name, []).extend(part.flatten(0, 1) for part in rows)
    for name, parts in read.items():
        assert share_held(adapter.eva[name].components, torch.cat(parts)) > 0.9999, name
    assert adapter.eva.keys() == read.keys() | {"layer.linear1", "layer.linear2"}
    batch = kind.batch(0)
    torch.testing.assert_close(output(adapter.model, batch), output(fresh(kind), batch), rtol=0, atol=1e-5)


def test_an_adapter_that_attention_would_never_call_is_named():
    config = LoraConfig(r=3, target_modules=["out_proj", "linear1"], init_lora_weights="eva", eva_config=EvaConfig())
    with pytest.warns(UserWarning, match=r"own\.out_proj.*LoRA has no effect there: target 'own' itself"):
        adapter = attach(fresh(KINDS["attention"]), config, map(vectors, range(COUNT)))
    assert list(adapter.eva) == ["layer.linear1"]


def test_experts_held_as_three_dimensional_parameters_keep_their_start_and_are_named():
    kind = KINDS["mixtral"]
    with pytest.warns(UserWarning, match=r"usual initialisation.*mlp\.experts"):
        adapter = attach(fresh(kind), lora(kind), map(kind.batch, range(COUNT)))
    assert {name.rpartition(".")[2] for name in adapter.eva} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UserError, match="leave it out"):
        attach(fresh(kind), lora(kind), map(kind.batch, range(COUNT)), strict=True)


def test_embeddings_keep_their_start_and_layers_beside_them_get_theirs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    again = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva", eva_config=EvaConfig())
    with pytest.warns(UserWarning, match=r"usual initialisation.*: 0\. .*Embedding"):
        adapter = attach(model, config, [torch.arange(10)] * 4)
    assert list(adapter.eva) == ["1"]
    save_adapter(adapter, tmp_path / "adapter", "base")
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(torch.arange(10)), adapter.model(torch.arange(10)))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_random_rows_of_convolutions_are_orthonormal_too():
    kind = KINDS["convolutions"]
    adapter = attach(fresh(kind), lora(kind), start=orthogonal)
    factors = [p.detach().flatten(1) for name, p in adapter.model.named_parameters() if "lora_A" in name]
    assert len(factors) == len(adapter.model.targeted_module_names)
    for rows in factors:
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)))


@pytest.mark.filterwarnings("ignore:EVA stopped after:UserWarning")
def test_where_the_config_says_nothing_of_eva_its_defaults_hold():
    found = []
    for start in (eva, partial(eva, settings=EvaSettings())):
        torch.manual_seed(0)
        model, config = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), LoraConfig(r=2, target_modules=["0", "1"])
        found.append(attach(model, config, map(vectors, range(COUNT)), start=start).eva)
    for name, layer in found[0].items():
        torch.testing.assert_close(layer.components, found[1][name].components, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_an_adapter_of_convolutions_with_shared_ranks_loads_in_peft(tmp_path):
    kind = KINDS["convolutions"]
    adapter = attach(fresh(kind), lora(kind, rho=2.0), map(kind.batch, range(COUNT)))
    ranks = {name: len(layer.components) for name, layer in adapter.eva.items()}
    assert sum(ranks.values()) == 16
    assert ranks["2"] == 4  # its groups have to divide the rank
    for name, parameter in adapter.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    save_adapter(adapter, tmp_path / "adapter", "base")
    loaded = PeftModel.from_pretrained(fresh(kind), str(tmp_path / "adapter"))
    torch.testing.assert_close(output(loaded, vectors(0)), output(adapter.model, vectors(0)))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.b(self.a(x) * scale + (0 if shift is None else shift))


@pytest.mark.parametrize(
    "batch",
    [
        lambda x, s: (x, s),
        lambda x, s: [x, s],
        lambda x, s: (x, s, None, "a label that the model does not take"),
        lambda x, s: {"x": x, "scale": s, "labels": s},
        lambda x, s: BatchEncoding({"x": x, "scale": s}),
    ],
)
def test_batches_of_any_container_are_given_as_the_model_takes_them(batch):
    config = LoraConfig(r=3, target_modules=["a", "b"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    found = attach(Sum(), config, (batch(vectors(seed), torch.tensor(2.0)) for seed in range(COUNT))).eva
    assert share_held(found["a"].components, torch.cat([vectors(seed).flatten(0, 1) for seed in range(COUNT)])) > 0.98


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, parts: dict[str, list[Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.a(torch.cat(parts["x"]))


def test_nested_batches_are_given_as_they_are():
    config = LoraConfig(r=3, target_modules=["a"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    batches = [{"parts": {"x": [vectors(2 * seed), vectors(2 * seed + 1)]}} for seed in range(3)]
    for found in (
        {name: layer.components for name, layer in attach(Nested(), config, batches).eva.items()},
        get_eva_state_dict(Nested(), batches, config, show_progress_bar=False),
    ):
        assert share_held(found["a"], torch.cat([vectors(seed).flatten(0, 1) for seed in range(6)])) > 0.98


def test_where_a_mask_can_not_choose_rows_all_count_and_a_warning_says_so():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)[:, ::2]).mean(1))

    batches = [{"x": vectors(seed), "attention_mask": torch.arange(7).expand(8, 7) < 5} for seed in range(COUNT)]
    config = LoraConfig(r=2, target_modules=["a", "b", "c"], init_lora_weights="eva", eva_config=EvaConfig(tau=1.0))
    with pytest.warns(UserWarning, match=r"1 layers read inputs of other shapes.*'b' \(8, 4, 16\) where \(8, 7\)"):
        found = attach(Halved(), config, batches).eva
    assert {name: layer.rows for name, layer in found.items()} == {"a": 6 * 8 * 5, "b": 6 * 8 * 4, "c": 6 * 8}


@pytest.mark.parametrize("name", ["vit", "t5", "t5 of equal lengths", "whisper"])
@pytest.mark.filterwarnings("ignore:Some layers keep:UserWarning")
def test_the_drop_in_takes_these_models_without_functions_of_their_own(name):
    kind = KINDS[name]
    batches = [kind.batch(seed) for seed in range(COUNT)]
    found = get_eva_state_dict(fresh(kind), batches, lora(kind), show_progress_bar=False)
    read = recorded(kind, list(found))
    for layer, rows in found.items():
        assert share_held(rows.flatten(1), read[layer]) > 0.99, layer


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(4, 2, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"), (3, 4, 9)),
        (nn.Conv2d(2, 3, (2, 3), padding="same"), (3, 2, 5, 4)),
        (nn.Conv2d(2, 3, 3, padding="valid", stride=(1, 2)), (2, 5, 7)),
        (nn.Conv3d(2, 3, 2, padding=(0, 1, 1)), (2, 2, 3, 3, 3)),
    ],
)
def test_a_convolution_is_its_weight_times_its_patches(conv, shape):
    x = torch.randn(shape)
    rows = patches(x, conv)
    product = rows @ conv.weight.flatten(1).T + conv.bias  # (B, O1, ..., out)
    expected = conv(x if x.ndim == conv.weight.ndim else x[None]).movedim(1, -1)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pairs() -> list:
    """Every kind, dtype, checkpointing and compilation with each other; by default each of them once."""
    default = {
        "gpt2": (torch.bfloat16, False, False),
        "t5": (torch.float32, True, False),
        "vit": (torch.float16, False, True),
    }
    return [
        pytest.param(
            name,
            dtype,
            checkpointing,
            compiled,
            marks=() if default.get(name) == (dtype, checkpointing, compiled) else pytest.mark.slow,
        )
        for name in KINDS
        for dtype in DTYPES
        for checkpointing in (False, True)
        for compiled in (False, True)
    ]


@pytest.mark.filterwarnings("ignore:Some layers keep:UserWarning")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize(("name", "dtype", "checkpointing", "compiled"), pairs())
def test_precision_checkpointing_and_compilation_leave_the_directions(name, dtype, checkpointing, compiled):
    kind = KINDS[name]
    model = fresh(kind).to(dtype)
    if (
        name == "mixtral" and dtype == torch.float64
    ):  # torch's grouped products, which its experts take otherwise, know no float64
        model.set_experts_implementation("eager")
    if checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        model.train()
        model.gradient_checkpointing_enable()
    if compiled:
        model.compile(backend="eager")
        batch = cast(kind.batch(0), dtype)
        with torch.no_grad():
            give(model.eval(), batch)  # so that there is compiled code, which would call no hook
    batches = (cast(kind.batch(seed), dtype) for seed in range(COUNT))
    found = attach(model, lora(kind), batches, start=everything).eva
    read = recorded(kind, [layer for layer in found if name != "attention"])
    assert found
    for layer, rows in read.items():
        assert found[layer].rows == len(rows)
        assert share_held(found[layer].components, rows) > 0.98, layer


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    return batch.to(dtype) if batch.is_floating_point() else batch
