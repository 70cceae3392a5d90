"""Actions by kept keys and values are those of the whole model on the same windows."""

import pytest
import torch
from torch import Tensor

from eva_rl.batch import Batch
from eva_rl.interface import Interface
from eva_rl.model import DecisionTransformer, Decoder, ModelConfig

CONTINUOUS = Interface("toy", 3, "continuous", 2, (0.5,) * 3, (2.0,) * 3, (0.1, 0.2), (2.0, 3.0), 10.0, 1.0)
DISCRETE = Interface("toy", 3, "discrete", 4, (0.5,) * 3, (2.0,) * 3, (), (), 10.0, 1.0)
TOKENS = [
    ("return", "state", "action"),
    ("state",),
    ("state", "action", "reward", "return"),
    ("return", "state", "reward"),
]
EPISODES, STEPS = 5, 200


def make_model(tokens=TOKENS[0], interface=CONTINUOUS, context=8) -> DecisionTransformer:
    torch.manual_seed(0)
    model = DecisionTransformer(ModelConfig(3, 2, 16, context, 0.1, tokens), [interface])
    for p in model.parameters():  # larger than at a start, so that every token matters
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def environment(step: int, actions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Observations (n, 3) and rewards (n,) that depend on what was done."""
    generator = torch.Generator().manual_seed(step)
    moved = 0 if actions is None else actions.float().reshape(EPISODES, -1).mean(1)
    return torch.randn(EPISODES, 3, generator=generator) + torch.sin(torch.as_tensor(moved))[
        ..., None
    ], torch.as_tensor(moved).cos() * torch.ones(EPISODES)


@torch.no_grad()
def uncached(model: DecisionTransformer, history: list[dict[str, Tensor]], anchor: int) -> Tensor:
    """The action for the newest step, by a full pass over the steps from `anchor` on."""
    columns = {name: torch.stack([step[name] for step in history[anchor:]], 1) for name in history[0]}
    batch = Batch(**columns, mask=torch.ones(columns["rewards"].shape, dtype=torch.bool), interface="toy")
    count = batch.mask.shape[1]
    return model.act(batch, torch.full((EPISODES,), count - 1))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("interface", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("context", [7, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 2, 8, 20))])
@pytest.mark.parametrize("alone", [False, True], ids=["beside", "alone"])
def test_over_two_hundred_steps_the_actions_are_those_without_a_cache(tokens, interface, context, alone):
    model = make_model(tokens, interface, context)
    decoder = Decoder(model, "toy", EPISODES, alone)
    history, anchor = [], 0
    observations, rewards = environment(0, None)
    wanted = torch.full((EPISODES,), 20.0)
    for step in range(STEPS):
        if step - anchor == context:
            anchor = step - context // 2
        nothing = torch.zeros(EPISODES, dtype=torch.int64) if interface is DISCRETE else torch.zeros(EPISODES, 2)
        history.append(
            {
                "observations": observations,
                "returns_to_go": wanted,
                "actions": nothing,
                "rewards": torch.zeros(EPISODES),
            }
        )
        expected = uncached(model, history, anchor)
        found = decoder.act(observations, wanted)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        observations, rewards = environment(step + 1, expected)
        history[-1] |= {"actions": expected, "rewards": rewards}
        decoder.record(expected, rewards)
        wanted = wanted - rewards


def test_the_toy_models_actions_depend_on_the_past():
    model = make_model()
    first, second = Decoder(model, "toy", EPISODES), Decoder(model, "toy", EPISODES)
    for step in range(4):
        first.act(torch.randn(EPISODES, 3), torch.full((EPISODES,), 20.0 - step))
        second.act(torch.randn(EPISODES, 3), torch.full((EPISODES,), 20.0 - step))
    now = torch.ones(EPISODES, 3), torch.zeros(EPISODES)
    assert (first.act(*now) - second.act(*now)).abs().min() > 1e-3


@pytest.mark.parametrize("alone", [False, True], ids=["beside", "alone"])
def test_episodes_that_leave_change_nothing_for_those_that_stay(alone):
    model = make_model()
    whole, shrinking = Decoder(model, "toy", EPISODES), Decoder(model, "toy", EPISODES, alone)
    stay = torch.arange(EPISODES)
    for step in range(30):
        if step in (3, 12):
            left = torch.tensor([0, 2, 3][: len(stay) - 1])
            shrinking.keep(left)
            stay = stay[left]
        observations, rewards = environment(step, None)
        wanted = torch.arange(EPISODES) - step / 10
        expected = whole.act(observations, wanted)
        found = shrinking.act(observations[stay], wanted[stay])
        torch.testing.assert_close(found, expected[stay], rtol=0, atol=1e-5)
        whole.record(expected, rewards)
        shrinking.record(expected[stay], rewards[stay])


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 256])  # wider models take other kernels
def test_an_episodes_actions_do_not_depend_by_a_bit_on_how_many_are_beside_it(width, precision):
    model = DecisionTransformer(ModelConfig(2, width // 8, width, 8, 0.1, TOKENS[0]), [CONTINUOUS]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        whole, *others = (Decoder(model, "toy", count) for count in (50, 1, 3, 15, 17, 34))
        for _ in range(12):
            observations, rewards = torch.randn(50, 3, generator=generator), torch.rand(50, generator=generator)
            expected = whole.act(observations, 20.0 - rewards)
            whole.record(expected, rewards)
            for decoder in others:
                own = slice(decoder.episodes)
                assert torch.equal(decoder.act(observations[own], 20.0 - rewards[own]), expected[own])
                decoder.record(expected[own], rewards[own])


def test_under_autocast_the_actions_are_nearly_those_in_float32():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Decoder(model, "toy", EPISODES)
    exact = Decoder(model, "toy", EPISODES)
    assert rounded.caches[0].dtype == torch.bfloat16
    for step in range(30):
        observations, rewards = environment(step, None)
        expected = exact.act(observations, 20.0 - rewards)
        with torch.autocast("cpu", torch.bfloat16):
            found = rounded.act(observations, 20.0 - rewards)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
        for decoder in (exact, rounded):
            decoder.record(expected, rewards)


def test_an_adapter_that_is_not_merged_is_refused():
    peft = pytest.importorskip("peft")
    model = make_model()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q"]))
    with pytest.raises(TypeError, match="merge the adapter"):
        Decoder(model, "toy", EPISODES)


def test_alone_each_step_computes_its_own_tokens_for_both_windows():
    model = make_model(context=20)
    computed = []
    decoder = Decoder(model, "toy", 1, alone=True)
    extend = decoder._extend
    decoder._extend = lambda *pieces: (computed.append(sum(own.shape[1] for _, own in pieces)), extend(*pieces))[1]
    for _ in range(60):
        decoder.act(torch.ones(1, 3), torch.ones(1))
        decoder.record(torch.ones(1, 2), torch.ones(1))
    assert max(computed) == 6  # three tokens for each window; at once the next window would be thirty
    assert len(computed) == 60


def test_no_gradient_is_kept():
    decoder = Decoder(make_model(), "toy", EPISODES)
    assert not decoder.act(torch.ones(EPISODES, 3), torch.ones(EPISODES)).requires_grad
    assert not decoder.caches[0].requires_grad
