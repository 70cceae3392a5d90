"""The Decision Transformer: what it computes, what it may see, and what its loss counts."""

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from omegaconf import OmegaConf
from torch import Tensor, nn

from eva_rl.batch import Batch
from eva_rl.errors import UserError
from eva_rl.interface import OBSERVATION_CLIP, Interface
from eva_rl.model import TRUNK_LAYERS, DecisionTransformer, ModelConfig
from eva_rl.model.attention import attend
from eva_rl.model.decision_transformer import Trunk
from eva_rl.prepared import Exact
from eva_rl.spaces import parts_of, spaces_to_text

PRESETS = files("eva_rl.configs") / "model"
TINY = ModelConfig(layers=2, heads=2, width=32, context=5, dropout=0.0)
WITH_REWARDS = replace(TINY, tokens=("return", "state", "action", "reward"))


def make_interface(name: str = "arm", observations: int = 3, actions: int = 2, discrete: bool = False) -> Interface:
    """Statistics far from 0 and 1, so that a forgotten normalisation shows."""
    return Interface(
        name=name,
        observation_size=observations,
        action_kind="discrete" if discrete else "continuous",
        action_size=actions,
        observation_mean=tuple(1.0 + i for i in range(observations)),
        observation_std=tuple(0.5 + i for i in range(observations)),
        action_mean=() if discrete else tuple(0.5 - i for i in range(actions)),
        action_scale=() if discrete else tuple(2.0 + i for i in range(actions)),
        return_scale=50.0,
        reward_scale=4.0,
    )


def make_model(config: ModelConfig, *interfaces: Interface, seed: int = 0) -> DecisionTransformer:
    """A model in evaluation mode whose weights are large enough for every input to matter."""
    torch.manual_seed(seed)
    model = DecisionTransformer(config, interfaces).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def make_batch(interface: Interface, size: int = 4, steps: int = 5, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if interface.action_kind == "discrete":
        actions = torch.randint(interface.action_size, (size, steps), generator=generator)
    else:
        actions = 2 * normal(size, steps, interface.action_size)
    return Batch(
        observations=3 * normal(size, steps, interface.observation_size),
        actions=actions,
        returns_to_go=50 * normal(size, steps),
        rewards=4 * normal(size, steps),
        mask=torch.ones(size, steps, dtype=torch.bool),
        interface=interface.name,
    )


def changed_from(batch: Batch, step: int, columns: tuple[str, ...]) -> Batch:
    """The batch with other values in `columns` from `step` on."""
    columns_of = {name: getattr(batch, name).clone() for name in columns}
    for column in columns_of.values():
        tail = column[:, step:]
        column[:, step:] = 1 - tail if column.dtype == torch.int64 else tail + 5.0  # int: choices 0 and 1
    return replace(batch, **columns_of)


# --- the trunk is GPT-2's


def as_gpt2(trunk: Trunk, config: ModelConfig) -> nn.Module:
    """Hugging Face's GPT-2 with our weights; its layers are Conv1D, whose weight is a Linear's transposed."""
    from transformers import GPT2Config, GPT2Model

    reference = GPT2Model(
        GPT2Config(
            vocab_size=1,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_positions=len(trunk.positions.weight),
            activation_function="gelu",
        )
    ).eval()
    weights = {"wte.weight": torch.zeros(1, config.width), "wpe.weight": trunk.positions.weight}
    weights |= {"ln_f.weight": trunk.norm.weight, "ln_f.bias": trunk.norm.bias}
    for i, block in enumerate(trunk.blocks):
        attention, feed_forward = block.attention, block.feed_forward
        qkv = (attention.q, attention.k, attention.v)
        weights |= {
            f"h.{i}.ln_1.weight": block.attention_norm.weight,
            f"h.{i}.ln_1.bias": block.attention_norm.bias,
            f"h.{i}.attn.c_attn.weight": torch.cat([layer.weight for layer in qkv]).T,
            f"h.{i}.attn.c_attn.bias": torch.cat([layer.bias for layer in qkv]),
            f"h.{i}.attn.c_proj.weight": attention.o.weight.T,
            f"h.{i}.attn.c_proj.bias": attention.o.bias,
            f"h.{i}.ln_2.weight": block.feed_forward_norm.weight,
            f"h.{i}.ln_2.bias": block.feed_forward_norm.bias,
            f"h.{i}.mlp.c_fc.weight": feed_forward.up.weight.T,
            f"h.{i}.mlp.c_fc.bias": feed_forward.up.bias,
            f"h.{i}.mlp.c_proj.weight": feed_forward.down.weight.T,
            f"h.{i}.mlp.c_proj.bias": feed_forward.down.bias,
        }
    reference.load_state_dict(weights)  # strict: every weight of GPT-2 has a counterpart in the trunk
    return reference


@pytest.mark.parametrize(
    "config", [TINY, ModelConfig(layers=3, heads=4, width=64, context=8, tokens=("state", "action"))], ids=str
)
@torch.no_grad()
def test_trunk_gives_the_outputs_of_hugging_face_gpt2_with_the_same_weights(config):
    model = make_model(config)
    for length in (config.context * len(config.tokens), 4):
        x = torch.randn(3, length, config.width)
        expected = as_gpt2(model.trunk, config)(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(model.trunk(x), expected, atol=1e-5, rtol=0)


def test_adapters_find_the_layers_by_their_names():
    model = DecisionTransformer(TINY, [make_interface()])
    linear = [name for name, module in model.trunk.named_modules() if isinstance(module, nn.Linear)]
    assert {name.rpartition(".")[2] for name in linear} == set(TRUNK_LAYERS)
    assert len(linear) == len(TRUNK_LAYERS) * TINY.layers


# --- what a prediction may see


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [TINY.tokens, WITH_REWARDS.tokens, ("state",), ("state", "action")])
def test_what_training_leaves_out_changes_neither_the_loss_nor_its_gradient(tokens, dtype):
    arm = make_interface()
    model, batch = make_model(replace(TINY, tokens=tokens), arm), make_batch(arm)
    found = []
    for training in (False, True):
        model.train(training).zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model.loss(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found[0], found[1], **tolerance)


def test_training_computes_of_the_last_block_what_the_states_need_alone():
    arm, rows = make_interface(), {}
    model, batch = make_model(TINY, arm), make_batch(arm, size=4, steps=5)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TRUNK_LAYERS:
            module.register_forward_hook(lambda m, i, y, name=name: rows.update({name: y.shape[:-1].numel()}))
    model.loss(batch)
    assert set(rows.values()) == {4 * 5 * 3}
    model.train().loss(batch)
    short = {name for name, count in rows.items() if count == 4 * 5}
    assert short == {
        f"trunk.blocks.1.{n}" for n in ("attention.q", "attention.o", "feed_forward.up", "feed_forward.down")
    }
    assert {count for name, count in rows.items() if name not in short} == {4 * 5 * 3}


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("step", range(5))
@torch.no_grad()
def test_a_prediction_sees_its_own_return_and_state_and_nothing_later(step, discrete):
    interface = make_interface(discrete=discrete)
    model, batch = make_model(WITH_REWARDS, interface), make_batch(interface)
    before = model(batch)
    after = model(changed_from(batch, step, ("observations", "returns_to_go")))
    torch.testing.assert_close(after[:, :step], before[:, :step])
    assert (after[:, step] - before[:, step]).abs().amin(0).max() > 1e-3


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("column", ["actions", "rewards"])
@torch.no_grad()
def test_the_action_and_reward_of_a_step_reach_later_predictions_but_not_its_own(column, discrete):
    interface = make_interface(discrete=discrete)
    model, batch = make_model(WITH_REWARDS, interface), make_batch(interface)
    before, after = model(batch), model(changed_from(batch, 2, (column,)))
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3] - before[:, 3]).abs().amax() > 1e-3


@pytest.mark.parametrize("tokens", [("state",), ("return", "state"), ("return", "state", "action")], ids=str)
@torch.no_grad()
def test_a_kind_of_token_left_out_is_not_looked_at(tokens):
    interface = make_interface()
    model, batch = make_model(replace(TINY, tokens=tokens), interface), make_batch(interface)
    columns = {"return": "returns_to_go", "action": "actions", "reward": "rewards"}
    absent = tuple(column for kind, column in columns.items() if kind not in tokens)
    torch.testing.assert_close(model(changed_from(batch, 0, absent)), model(batch))
    for kind in set(tokens) - {"state"}:
        assert (model(changed_from(batch, 0, (columns[kind],))) - model(batch)).abs().max() > 1e-3


@torch.no_grad()
def test_padding_on_the_right_leaves_the_predictions_of_real_steps_alone():
    interface = make_interface()
    model, batch = make_model(TINY, interface), make_batch(interface)
    short = Batch(**{k: v[:, :3] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
    torch.testing.assert_close(model(batch)[:, :3], model(short))


@torch.no_grad()
def test_dropout_acts_in_training_only():
    interface = make_interface()
    model, batch = make_model(replace(TINY, dropout=0.5), interface), make_batch(interface)
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.allclose(model(batch), model(batch))


# --- the loss


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@torch.no_grad()
def test_loss_is_the_mean_over_real_steps_whatever_the_padding_holds(discrete):
    interface = make_interface(discrete=discrete)
    model, batch = make_model(TINY, interface), make_batch(interface, size=3)
    lengths = (5, 2, 1)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    batch = replace(batch, mask=mask)

    errors = []
    for row, length in enumerate(lengths):  # each episode alone, without padding
        alone = Batch(
            **{k: v[row : row + 1, :length] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()},
        )
        predicted, actions = model(alone)[0], alone.actions[0]
        if discrete:
            errors.append(-torch.log_softmax(predicted, -1)[torch.arange(length), actions])
        else:
            scale, mean = torch.tensor(interface.action_scale), torch.tensor(interface.action_mean)
            errors.append(((predicted - (actions - mean) / scale) ** 2).flatten())
    expected = torch.cat(errors).mean()

    torch.testing.assert_close(model.loss(batch), expected)
    columns = ("observations", "returns_to_go", "rewards", "actions")
    noisy = {c: getattr(batch, c).clone() for c in columns}
    for column in noisy.values():
        column[~mask] = 1 if column.dtype == torch.int64 else 1e3
    torch.testing.assert_close(model.loss(replace(batch, **noisy)), expected)


def test_discrete_loss_is_cross_entropy():
    interface = make_interface(actions=4, discrete=True)
    model, batch = make_model(TINY, interface), make_batch(interface)
    torch.testing.assert_close(model.loss(batch), F.cross_entropy(model(batch).flatten(0, 1), batch.actions.flatten()))


def test_loss_of_a_fresh_discrete_head_is_near_that_of_guessing():
    interface = make_interface(actions=7, discrete=True)
    torch.manual_seed(0)
    loss = DecisionTransformer(TINY, [interface]).loss(make_batch(interface, size=32))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(7.0)).item(), abs=0.05)


def test_predictions_are_float32_under_autocast():
    interface = make_interface()
    model, batch = make_model(TINY, interface), make_batch(interface)
    with torch.autocast("cpu", torch.bfloat16):
        predicted, loss = model(batch), model.loss(batch)
    assert predicted.dtype == loss.dtype == torch.float32
    assert predicted.shape == batch.actions.shape


# --- normalisation


@torch.no_grad()
def test_inputs_are_normalised_with_the_statistics_of_the_interface():
    interface = make_interface()
    unit = replace(
        interface,
        observation_mean=(0.0,) * 3,
        observation_std=(1.0,) * 3,
        action_mean=(0.0,) * 2,
        action_scale=(1.0,) * 2,
        return_scale=1.0,
        reward_scale=1.0,
    )
    model, normalised = make_model(WITH_REWARDS, interface), make_model(WITH_REWARDS, unit)
    normalised.load_state_dict(model.state_dict())  # the statistics are not weights
    batch = make_batch(interface)
    by_hand = replace(
        batch,
        observations=(batch.observations - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([0.5, 1.5, 2.5]),
        actions=(batch.actions - torch.tensor([0.5, -0.5])) / torch.tensor([2.0, 3.0]),
        returns_to_go=batch.returns_to_go / 50.0,
        rewards=batch.rewards / 4.0,
    )
    torch.testing.assert_close(model(batch), normalised(by_hand))
    torch.testing.assert_close(model.loss(batch), normalised.loss(by_hand))


@torch.no_grad()
def test_observations_far_outside_the_statistics_are_clipped():
    interface = make_interface()
    model, batch = make_model(TINY, interface), make_batch(interface)
    edge = torch.tensor(interface.observation_mean) + OBSERVATION_CLIP * torch.tensor(interface.observation_std)
    at_edge = replace(batch, observations=edge.expand_as(batch.observations))
    beyond = replace(batch, observations=100 * at_edge.observations)
    torch.testing.assert_close(model(beyond), model(at_edge))


@torch.no_grad()
def test_act_returns_units_of_the_environment():
    interface = make_interface()
    model = make_model(TINY, interface)
    model.heads["arm"].weight.zero_()
    model.heads["arm"].bias.copy_(torch.tensor([1.0, -2.0]))
    actions = model.act(make_batch(interface), torch.full((4,), 4))
    torch.testing.assert_close(actions, torch.tensor([1.0 * 2.0 + 0.5, -2.0 * 3.0 - 0.5]).expand(4, 2))


@torch.no_grad()
def test_act_reads_the_step_asked_for_of_each_row():
    interface = make_interface()
    model, batch = make_model(TINY, interface), make_batch(interface)
    together = model.act(batch, torch.tensor([0, 2, 4, 1]))
    for row, step in enumerate((0, 2, 4, 1)):
        alone = Batch(
            **{k: v[row : row + 1, : step + 1] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
        )
        torch.testing.assert_close(together[row], model.act(alone, torch.tensor([step]))[0])
    assert not model.act(batch, torch.tensor([0, 2, 4, 1])).requires_grad


def test_discrete_act_returns_the_likeliest_choice_as_an_integer():
    interface = make_interface(actions=4, discrete=True)
    model, batch = make_model(TINY, interface), make_batch(interface, size=16)
    actions = model.act(batch, torch.full((16,), 4))
    assert actions.dtype == torch.int64
    assert actions.shape == (16,)
    assert torch.equal(actions, model(batch)[:, 4].argmax(-1))


# --- several interfaces


def test_two_interfaces_of_different_sizes_share_one_trunk():
    arm, game = make_interface("arm"), make_interface("game", observations=6, actions=4, discrete=True)
    model = make_model(TINY, arm, game)
    assert model.interfaces == {"arm": arm, "game": game}
    assert model(make_batch(arm)).shape == (4, 5, 2)
    assert model(make_batch(game)).shape == (4, 5, 4)

    model.loss(make_batch(game)).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, _ in model.named_parameters() if name.startswith("trunk.")} <= reached
    assert not any("arm" in name for name in reached)
    assert any(name.startswith("embedders.game.") for name in reached)


@torch.no_grad()
def test_adding_an_interface_leaves_the_others_alone():
    arm, game = make_interface("arm"), make_interface("game", observations=6, actions=4, discrete=True)
    model, batch = make_model(TINY, arm), make_batch(arm)
    before = model(batch)
    model.add_interface(game)
    torch.testing.assert_close(model(batch), before)
    assert model(make_batch(game)).shape == (4, 5, 4)


@torch.no_grad()
def test_connecting_makes_modules_for_a_new_interface_only():
    arm, game = make_interface("arm"), make_interface("game", observations=6, actions=4, discrete=True)
    model = make_model(TINY, arm)
    assert model.connect(replace(arm, return_scale=1.0), "the dataset") == ()
    assert model.interfaces["arm"] == arm
    made = model.connect(game, "the dataset")
    assert model(make_batch(game)).shape == (4, 5, 4)
    assert {name for name, _ in model.named_modules()} >= set(made) == {"embedders.game", "heads.game"}


def test_what_was_kept_in_float64_stays_so_whatever_newer_data_shows():
    box = Box(-np.inf, np.inf, (3,), np.float64)
    wide, narrow = (
        replace(make_interface("arm"), parts=parts_of(own), spaces=spaces_to_text(own, Box(-1, 1, (2,))))
        for own in (Exact(box), box)
    )
    for first, then in ((wide, narrow), (narrow, wide)):
        model = make_model(TINY, first)
        model.connect(then, "the dataset")
        assert model.interfaces["arm"].observation_dtype == "float64"
        assert model.interfaces["arm"].spaces == wide.spaces


def test_connecting_an_interface_of_other_sizes_is_refused():
    model = make_model(TINY, make_interface("arm"))
    with pytest.raises(UserError, match="the dataset 'x'"):
        model.connect(make_interface("arm", observations=6), "the dataset 'x'")


def test_token_mask_marks_the_real_tokens_of_a_kind():
    interface = make_interface()
    model = make_model(TINY, interface)
    batch = replace(
        make_batch(interface, size=2, steps=3), mask=torch.tensor([[True, True, True], [True, False, False]])
    )
    assert model.token_mask(batch).tolist() == [[True] * 9, [True] * 3 + [False] * 6]
    assert model.token_mask(batch, "state").tolist() == [
        [False, True, False] * 3,
        [False, True, False] + [False] * 6,
    ]


# --- sizes


@pytest.mark.parametrize(
    ("preset", "least", "most"),
    [("tiny", 20e3, 40e3), ("small", 2.9e6, 3.5e6), ("paper", 11.5e6, 13.5e6)],
)
def test_presets_have_the_stated_number_of_parameters(preset, least, most):
    settings = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{preset}.yaml"))
    config = ModelConfig(**settings | {"tokens": tuple(settings["tokens"])})
    with torch.device("meta"):
        model = DecisionTransformer(config, [make_interface(observations=39, actions=4)])
    assert least < sum(p.numel() for p in model.parameters()) < most


def test_the_paper_preset_is_the_trunk_of_the_paper():
    settings = OmegaConf.load(PRESETS / "paper.yaml")
    assert (settings.layers, settings.heads, settings.width, settings.context) == (4, 8, 512, 50)
    assert set(settings.tokens) == {"return", "state", "action", "reward"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 30, "heads": 4},
        {"layers": 0},
        {"heads": 0},
        {"width": -32},
        {"context": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"tokens": ("return", "state", "actoin")},
        {"tokens": ("return", "action")},
        {"tokens": ("state", "state")},
        {"tokens": ()},
        {"tokens": ("action", "state")},
        {"tokens": ("return", "reward", "state")},
    ],
    ids=str,
)
def test_impossible_sizes_and_tokens_are_refused_in_one_sentence(wrong):
    with pytest.raises(UserError) as error:
        ModelConfig(**wrong)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(
    ("queries", "keys", "start", "stride"),
    [(17, 17, 0, 1), (3, 31, 20, 1), (2, 48, 40, 1), (20, 60, 1, 3), (32, 150, 100, 1)],
)
def test_a_query_sees_the_keys_up_to_its_own_and_no_others(queries, keys, start, stride, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, count, 8, generator=generator).to(dtype) for count in (queries, keys, keys))
    found = attend(q, k, v, start, stride)
    assert found.dtype == dtype
    for i in range(queries):
        seen = start + i * stride + 1
        scores = q[..., i : i + 1, :].double() @ k[..., :seen, :].double().mT / 8**0.5
        expected = scores.softmax(-1) @ v[..., :seen, :].double()
        torch.testing.assert_close(found[..., i : i + 1, :].double(), expected, rtol=0, atol=tolerance)
