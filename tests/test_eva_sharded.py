"""Two processes that each hold half of every weight (FSDP2) end with the same A, that of one process with all weights and rows."""

import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import EvaConfig, LoraConfig, get_peft_model
from processes import in_two_processes
from safetensors.torch import load_file, save_file
from torch import nn

from eva_rl.adapter.eva import get_eva_state_dict, initialize_lora_eva_weights
from eva_rl.adapter.eva.moments import principal_angle
from eva_rl.errors import UserError

pytestmark = pytest.mark.slow
SECONDS = 900
"""Processes that take longer are taken to wait for each other forever."""
BATCHES = ((0, 1, 2, 3, 4), (5, 6, 7, 8))
"""The numbers of each process' batches: that of which the other has none is left out, as no process can run the model alone."""


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24)) for _ in range(3)]
    with torch.no_grad():  # the last layer needs fewer directions than the others, so that ranks are shared out
        for parameter in layers[2][0].parameters():
            parameter *= 0.3 ** torch.arange(32).view(-1, *(1,) * (parameter.ndim - 1))
    return nn.Sequential(*layers)


def batch(number: int) -> torch.Tensor:
    return torch.randn(300, 24, generator=torch.Generator().manual_seed(number)) * 0.6 ** torch.arange(24)


def config(rho: float) -> LoraConfig:
    eva = EvaConfig(rho=rho, tau=1.0)
    return LoraConfig(r=3, target_modules=r"\d\.[02]", init_lora_weights="eva", eva_config=eva)


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


class Once(list):
    """Batches that `get_eva_state_dict` goes through once: it begins anew where a list ends."""

    def __iter__(self):
        yield from super().__iter__()
        self.clear()


def sharded(whole: nn.Module, layers: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def work(process: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=process, world_size=2, timeout=timedelta(seconds=SECONDS))
    own = [batch(number) for number in BATCHES[process]]
    bare = model()
    bare = sharded(bare, bare)
    assert type(bare[0][0].weight).__name__ == "DTensor"
    found = get_eva_state_dict(bare, Once(own), config(2.0), forward, show_progress_bar=False)
    save_file(found, folder / f"bare {process}.safetensors")
    wrapped = get_peft_model(model(), config(1.0))
    wrapped = sharded(wrapped, wrapped.base_model.model)
    initialize_lora_eva_weights(wrapped, Once(own), None, forward, show_progress_bar=False)
    weights = {name: p.full_tensor() for name, p in wrapped.named_parameters() if "lora_A" in name}
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / f"wrapped {process}.safetensors"
    )
    wrapped = get_peft_model(model(), config(2.0))
    wrapped = sharded(wrapped, wrapped.base_model.model)
    try:
        initialize_lora_eva_weights(wrapped, Once(own), None, forward, show_progress_bar=False)
    except UserError as error:
        (folder / f"shared out {process}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    return in_two_processes(work, tmp_path_factory.mktemp("sharded"), SECONDS)


@pytest.mark.parametrize(("name", "rho"), [("bare", 2.0), ("wrapped", 1.0)])
def test_both_processes_have_the_a_of_one_process_with_all_weights_and_rows(folder, name, rho):
    first, second = (load_file(folder / f"{name} {process}.safetensors") for process in (0, 1))
    numbers = [number for pair in zip(*BATCHES, strict=False) for number in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it stops with layers that have not converged
        alone = get_eva_state_dict(
            model(), Once(batch(number) for number in numbers), config(rho), forward, show_progress_bar=False
        )
    assert first.keys() == second.keys()
    assert len(first) == len(alone) == 6
    for key, rows in first.items():
        assert torch.equal(rows, second[key])
        expected = alone[key.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")]
        assert rows.shape == expected.shape
        assert principal_angle(rows, expected) < 0.01  # degrees


def test_a_rank_that_would_change_after_sharding_is_refused(folder):
    for process in (0, 1):
        assert "take rho=1, or initialise before sharding" in (folder / f"shared out {process}.txt").read_text()
