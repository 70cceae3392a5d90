"""Two processes, each with data of its own, find what one process finds in the data of both."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes
from safetensors.torch import load_file, save_file
from torch import nn

from eva_rl.adapter.eva import EvaSettings, LayerResult, Reading, engine, eva_init
from eva_rl.adapter.eva.moments import principal_angle
from eva_rl.errors import UserError

WIDTHS = {"first": 24, "second": 24, "last": 16}
RANKS = {"first": 3, "second": 3, "last": 2}
SECONDS = 120
"""Processes that take longer are taken to wait for each other forever."""
SENDERS = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single")
SENDERS += ("broadcast", "gather", "isend", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send")


class Layers(nn.Module):
    """Three layers that each read another tensor, two of them of one width."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(number: int, rows: int) -> torch.Tensor:
    """Rows of decaying variance; those of batches from 4 on lie elsewhere, so that processes differ by more than chance."""
    turned = torch.linalg.qr(random(99, 24, 24)).Q
    return random(number, rows, 24) * 0.7 ** torch.arange(24) @ turned.T + random(100 + (number >= 4), 24) / 5


def hesitant(number: int, rows: int) -> torch.Tensor:
    """The same; those of batches from 3 on come late, when other processes may have moved on."""
    time.sleep(0.05 * (number >= 3))
    return decaying(number, rows)


def unlike(number: int, rows: int) -> torch.Tensor:
    """Rows whose leading directions are soon known from even batches, and late from odd ones."""
    return random(number, rows, 24) * (0.95 if number % 2 else 0.6) ** torch.arange(24)


def broken(number: int, rows: int) -> torch.Tensor:
    """The same; one of the second process' batches is not finite."""
    return decaying(number, rows) * (torch.nan if number == 5 else 1)


def unreadable(number: int, rows: int) -> torch.Tensor:
    """The same; one of the second process' batches cannot be read."""
    if number == 5:
        raise OSError("the disk is gone")
    return decaying(number, rows)


def misshapen(number: int, rows: int) -> torch.Tensor:
    """The same; one of the second process' batches does not fit the model."""
    return decaying(number, rows)[:, : 3 if number == 5 else None]


def constant(number: int, rows: int) -> torch.Tensor:
    return random(number, 24).expand(rows, 24)


def same(number: int, rows: int) -> torch.Tensor:
    """A row that is the same in every batch; how often differs."""
    return constant(7, rows + number)


@dataclass(frozen=True)
class Scenario:
    """What two processes do with which batches."""

    settings: dict[str, Any]
    batches: tuple[range, range] = (range(4), range(4, 8))
    """The numbers of each process' batches."""
    rows: int = 300
    make: Callable[[int, int], torch.Tensor] = decaying
    silent: str = ""
    """A layer none of whose rows count; `all`: none of any layer."""
    silent_in: tuple[int, ...] = (0, 1)
    """The processes where that is so."""
    own: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    """Settings of each process alone."""
    beside: bool = False
    """Whether updates run in a thread beside the next forward pass, as on a GPU."""
    together: bool = True
    processes: tuple[int, ...] = (0, 1)
    """Those that call `eva_init`."""

    def all_batches(self) -> list[torch.Tensor]:
        return [self.make(number, self.rows) for numbers in self.batches for number in numbers]

    def run(self, batches: Iterable[torch.Tensor], most: int, process: int = 0) -> dict[str, LayerResult]:
        def rows(batch: torch.Tensor, room: Any) -> Callable[[tuple[Any, ...], str], torch.Tensor]:
            silent = self.silent if process in self.silent_in else ""
            return lambda inputs, layer: inputs[0][: 0 if silent in (layer, "all") else None].clone()

        settings = EvaSettings(**{"tau": 1.0, "max_batches": most} | self.settings | self.own[process])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._Updates, "_beside", staticmethod(lambda device: self.beside))
            return eva_init(Layers(), batches, RANKS, settings, Reading(rows=rows), together=self.together)


STREAMING, COVARIANCE = {"method": "streaming"}, {"method": "covariance"}
ABOUT_ZERO = {"center": False}
UNEVEN = (range(3), range(3, 8))
MANY = (range(0, 80, 2), range(1, 80, 2))
SCENARIOS = {
    "covariance": Scenario(COVARIANCE),
    "covariance about zero": Scenario(COVARIANCE | ABOUT_ZERO),
    "covariance of 3 and 5 batches": Scenario(COVARIANCE, UNEVEN),
    "covariance of 5 and 3 batches about zero": Scenario(COVARIANCE | ABOUT_ZERO, UNEVEN[::-1]),
    "streaming": Scenario(STREAMING),
    "streaming about zero": Scenario(STREAMING | ABOUT_ZERO),
    "streaming of 3 and 5 batches": Scenario(STREAMING, UNEVEN),
    "streaming of large batches": Scenario(STREAMING, rows=1200),
    "streaming in a thread": Scenario(STREAMING, UNEVEN, make=hesitant, beside=True),
    "subspaces converge": Scenario(STREAMING | {"tau": 0.99}, MANY, 100, unlike),
    "components converge": Scenario(STREAMING | {"tau": 0.9, "convergence": "components"}, MANY, 100, unlike),
    "covariance of two constants": Scenario(COVARIANCE, (range(1), range(1, 2)), make=constant),
    "streaming of two constants": Scenario(STREAMING, (range(1), range(1, 2)), make=constant),
    "covariance of one constant": Scenario(COVARIANCE, UNEVEN, make=same),
    "streaming of one constant": Scenario(STREAMING, UNEVEN, make=same),
    "no rows for a layer": Scenario(STREAMING, silent="second"),
    "no rows in the first": Scenario(STREAMING, silent="all", silent_in=(0,)),
    "no rows in either": Scenario(STREAMING, silent="all"),
    "not finite in the second": Scenario(STREAMING, make=broken),
    "not finite in the second, in a thread": Scenario(STREAMING, make=broken, beside=True),
    "unreadable in the second": Scenario(STREAMING, make=unreadable),
    "misshapen in the second": Scenario(STREAMING, make=misshapen),
    "misshapen in the second, in a thread": Scenario(STREAMING, make=misshapen, beside=True),
    "other caps": Scenario(STREAMING, own=({"max_batches": 3}, {"max_batches": 4})),
    "other rho": Scenario(STREAMING, own=({"rho": 1.0}, {})),
    "not together": Scenario(COVARIANCE, together=False, processes=(0,)),
    "no batch in the first": Scenario(STREAMING, (range(0), range(4))),
    "no batch in the second": Scenario(STREAMING, (range(4), range(0))),
}


@dataclass
class Sent:
    """How many numbers this process' messages held."""

    messages: list[int] = field(default_factory=list)

    def listen(self) -> None:
        for name in SENDERS:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            given = [x for a in (*arguments, *options.values()) for x in (a if isinstance(a, list) else [a])]
            assert any(isinstance(x, torch.Tensor) for x in given)  # no objects, whose size this does not see
            self.messages.append(max(x.numel() for x in given if isinstance(x, torch.Tensor)))
            return send(*arguments, **options)

        return counted


def work(process: int, folder: Path) -> None:
    """One process: all scenarios in turn; what each gave goes into a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=process,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    sent = Sent()
    sent.listen()
    for name, scenario in SCENARIOS.items():
        if process not in scenario.processes:
            continue
        sent.messages.clear()
        drawn = []
        batches = (drawn.append(n) or scenario.make(n, scenario.rows) for n in scenario.batches[process])
        try:
            found = scenario.run(batches, max(len(numbers) for numbers in scenario.batches), process)
        except (UserError, OSError, RuntimeError) as error:
            (folder / f"{name} {process}.txt").write_text(str(error))
            continue
        tensors = {"drawn": torch.tensor(len(drawn)), "sent": torch.tensor(sent.messages)}
        for layer, result in found.items():
            tensors[f"{layer}.components"] = result.components.contiguous()
            tensors[f"{layer}.explained"] = result.explained
            tensors[f"{layer}.values"] = result.squared_singular_values
            tensors[f"{layer}.totals"] = torch.tensor([result.total, result.rows], dtype=torch.float64)
        save_file(tensors, folder / f"{name} {process}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found in every scenario."""
    return in_two_processes(work, tmp_path_factory.mktemp("distributed"), SECONDS)


def found_in(folder: Path, scenario: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{scenario} {process}.safetensors") for process in SCENARIOS[scenario].processes]


def found_alone(scenario: Scenario) -> dict[str, LayerResult]:
    batches = scenario.all_batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it stops with layers that have not converged
        return scenario.run(batches, len(batches))


@torch.no_grad()
def inputs(scenario: Scenario) -> dict[str, torch.Tensor]:
    """What each layer reads in all batches, about the mean unless the scenario says otherwise."""
    model, x = Layers(), torch.cat(scenario.all_batches())
    hidden = torch.tanh(model.first(x))
    read = {"first": x, "second": hidden, "last": torch.tanh(model.second(hidden))}
    center = scenario.settings.get("center", True)
    return {name: x.double() - x.double().mean(0) * center for name, x in read.items()}


def held(components: torch.Tensor, rows: torch.Tensor) -> float:
    """The share of the rows' variance in the span of orthonormal components."""
    return float((rows @ components.double().T).square().sum() / rows.square().sum())


def radians(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.deg2rad(torch.tensor(principal_angle(a, b))))


FAILING = {
    "no rows in either": "no rows",
    "not finite in the second": "NaN",
    "not finite in the second, in a thread": "NaN",
    "unreadable in the second": "the disk is gone",
    "misshapen in the second": "shape",
    "misshapen in the second, in a thread": "shape",
    "other caps": "other ranks or settings",
    "other rho": "other ranks or settings",
    "no batch in the first": "no batch of data in one of the processes",
    "no batch in the second": "no batch of data in one of the processes",
}
TOGETHER = [name for name, s in SCENARIOS.items() if s.together and not s.silent and name not in FAILING]
OF_DECAYING_ROWS = [name for name in TOGETHER if SCENARIOS[name].make in (decaying, hesitant)]


@pytest.mark.parametrize("name", TOGETHER)
def test_all_processes_get_the_same_components(folder, name):
    a, b = found_in(folder, name)
    for layer in RANKS:
        assert torch.equal(a[f"{layer}.components"], b[f"{layer}.components"])
        assert torch.equal(a[f"{layer}.totals"], b[f"{layer}.totals"])
    assert sum(len(a[f"{layer}.components"]) for layer in RANKS) == sum(RANKS.values())


@pytest.mark.parametrize("name", OF_DECAYING_ROWS)
def test_totals_are_those_of_all_rows(folder, name):
    found, *_ = found_in(folder, name)
    for layer, rows in inputs(SCENARIOS[name]).items():
        total, count = found[f"{layer}.totals"].tolist()
        assert count == len(rows)
        assert total == pytest.approx(rows.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in OF_DECAYING_ROWS if name.startswith("covariance")])
def test_exact_components_are_those_one_process_finds_in_all_batches(folder, name):
    found, *_ = found_in(folder, name)
    alone, rows = found_alone(SCENARIOS[name]), inputs(SCENARIOS[name])
    for layer in RANKS:
        components = found[f"{layer}.components"]
        assert len(components) == len(alone[layer].components) > 0
        assert radians(components, alone[layer].components) <= 1e-5
        _, singular, vectors = torch.linalg.svd(rows[layer], full_matrices=False)
        assert radians(components, vectors[: len(components)]) <= 1e-5
        values = found[f"{layer}.values"]
        torch.testing.assert_close(values, singular[: len(values)].square(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in OF_DECAYING_ROWS if name.startswith("streaming")])
def test_streamed_components_capture_what_those_of_one_process_capture(folder, name):
    found, *_ = found_in(folder, name)
    alone, rows = found_alone(SCENARIOS[name]), inputs(SCENARIOS[name])
    for layer in RANKS:
        components = found[f"{layer}.components"]
        assert len(components) == len(alone[layer].components) > 0
        assert held(components, rows[layer]) == pytest.approx(held(alone[layer].components, rows[layer]), abs=1e-3)
        singular = torch.linalg.svdvals(rows[layer])
        best = singular[: len(components)].square().sum() / singular.square().sum()
        assert held(components, rows[layer]) == pytest.approx(float(best), abs=1e-3)


@pytest.mark.parametrize("method", ["covariance", "streaming"])
def test_what_varies_only_between_the_processes_is_found(folder, method):
    found, *_ = found_in(folder, f"{method} of two constants")
    apart = constant(1, 1)[0] - constant(0, 1)[0]
    assert found["first.explained"].tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-5)
    cosine = found["first.components"][0] @ apart / apart.norm()
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)
    assert found["first.totals"][0] == pytest.approx(2 * 300 / 4 * float(apart.square().sum()), rel=1e-5)


@pytest.mark.parametrize("method", ["covariance", "streaming"])
def test_what_is_constant_in_all_processes_alike_is_worth_no_rank(folder, method):
    found, *_ = found_in(folder, f"{method} of one constant")
    assert not found["first.explained"].any()
    assert not found_alone(SCENARIOS[f"{method} of one constant"])["first"].explained.any()


@pytest.mark.parametrize("name", ["subspaces converge", "components converge"])
def test_all_processes_stop_after_the_same_batch(folder, name):
    a, b = (int(found["drawn"]) for found in found_in(folder, name))
    assert a == b
    assert 2 <= a < len(MANY[0])


def test_a_process_that_is_not_together_with_others_neither_waits_nor_sends(folder):
    [found] = found_in(folder, "not together")  # the other process never called
    assert len(found["sent"]) == 0
    own = inputs(Scenario(COVARIANCE, (range(4), range(0))))
    for layer, rows in own.items():
        components = found[f"{layer}.components"]
        assert found[f"{layer}.totals"][1] == len(rows)
        assert radians(components, torch.linalg.svd(rows, full_matrices=False).Vh[: len(components)]) <= 1e-5


def test_a_layer_without_rows_in_any_process_leaves_the_others_as_they_are(folder):
    for process in (0, 1):
        found = load_file(folder / f"no rows for a layer {process}.safetensors")
        assert not [key for key in found if key.startswith("second")]
        for layer, rows in inputs(SCENARIOS["no rows for a layer"]).items():
            if layer != "second":
                components = found[f"{layer}.components"]
                best = torch.linalg.svd(rows, full_matrices=False).Vh[: len(components)]
                assert held(components, rows) == pytest.approx(held(best, rows), abs=1e-3)


def test_a_process_without_rows_gets_what_the_other_finds(folder):
    for found in found_in(folder, "no rows in the first"):
        for layer, rows in inputs(Scenario(STREAMING, (range(0), range(4, 8)))).items():
            components = found[f"{layer}.components"]
            best = torch.linalg.svd(rows, full_matrices=False).Vh[: len(components)]
            assert held(components, rows) == pytest.approx(held(best, rows), abs=1e-3)


@pytest.mark.parametrize("name", FAILING)
def test_an_error_in_one_process_is_raised_in_every_process(folder, name):
    first, second = ((folder / f"{name} {process}.txt").read_text() for process in (0, 1))
    assert FAILING[name] in second
    assert FAILING[name] in first or "EVA was ended by an error in 1 of 2 processes" in first


def test_no_message_holds_activations_or_grows_with_them(folder):
    for small, large in zip(found_in(folder, "streaming"), found_in(folder, "streaming of large batches"), strict=True):
        activations = min(SCENARIOS["streaming"].rows * width for width in WIDTHS.values())
        assert 0 < small["sent"].max() < activations / 4
        assert torch.equal(small["sent"], large["sent"])


def test_covariances_cross_once_and_not_with_every_batch(folder):
    matrices = 2 * WIDTHS["first"] ** 2  # of the two layers of one width
    for found in found_in(folder, "covariance"):
        assert (found["sent"] >= WIDTHS["last"] ** 2).sum() == 2
        assert found["sent"].max() == matrices
