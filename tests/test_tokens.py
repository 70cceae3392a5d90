"""Which of the model's tokens an interface reads: one trunk serves robots without past actions and games with them."""

from dataclasses import replace

import pytest
import torch
from test_mixture import ARM, GAME, make_batch

from eva_rl.batch import Mixture
from eva_rl.errors import UserError
from eva_rl.model import DecisionTransformer, Decoder, ModelConfig, load_base, save_base
from eva_rl.rollout import TargetReturn

BLIND = replace(ARM, name="blind", tokens=("return", "state"))


def make_model(*interfaces) -> DecisionTransformer:
    torch.manual_seed(0)
    model = DecisionTransformer(ModelConfig(2, 2, 16, 4, 0.0), interfaces).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


def test_an_interface_that_leaves_actions_out_does_not_look_at_them():
    model, batch = make_model(BLIND, GAME), make_batch(BLIND)
    other = replace(batch, actions=batch.actions + 1)
    assert torch.equal(model(batch), model(other))
    assert not torch.equal(model(batch), model(replace(batch, returns_to_go=batch.returns_to_go + 1)))
    assert "action" not in dict(model.embedders["blind"].named_children())
    game = make_batch(GAME)
    assert not torch.equal(model(game), model(replace(game, actions=(game.actions + 1) % 5)))


def test_interfaces_of_unlike_tokens_in_one_batch_get_what_they_get_alone():
    model = make_model(BLIND, GAME, ARM)
    parts = [make_batch(interface) for interface in (BLIND, GAME, ARM)]
    for own, part in zip(model.predict(Mixture(tuple(parts))), parts, strict=True):
        torch.testing.assert_close(own, model(part), rtol=0, atol=1e-5)


def test_a_step_keeps_its_place_in_the_window_whatever_tokens_are_left_out():
    model = make_model(BLIND, GAME)
    whole = model.trunk.places(("return", "state", "action")).view(4, 3, 16)
    assert torch.equal(model.trunk.places(("return", "state")).view(4, 2, 16), whole[:, :2])
    assert torch.equal(model.trunk.places(("state",)).view(4, 1, 16), whole[:, 1:2])


@torch.no_grad()
def test_the_decoder_acts_as_the_model_does_without_the_tokens_that_are_left_out():
    model, batch = make_model(GAME, BLIND), make_batch(BLIND)
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    decoder = Decoder(model, "blind", len(batch.mask))
    for step in range(4):
        found = decoder.act(batch.observations[:, step], batch.returns_to_go[:, step])
        expected = model.act(batch, torch.full((len(batch.mask),), step))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        decoder.record(batch.actions[:, step], batch.rewards[:, step])


def test_the_mask_of_tokens_has_those_that_the_interface_reads():
    model, batch = make_model(BLIND, GAME), make_batch(BLIND)
    assert model.token_mask(batch).shape == (6, 8)
    assert torch.equal(model.token_mask(batch, "state")[:, 1::2], batch.mask)
    assert model.check_token("action", "game") == "action"
    with pytest.raises(UserError, match=r"tokens must be one of \['all', 'return', 'state'\], got action"):
        model.check_token("action", "blind")


def test_a_new_interface_reads_what_those_of_its_kind_of_action_read():
    model = make_model(GAME, BLIND)
    model.connect(replace(ARM, name="new"), "it")
    assert model.interfaces["new"].tokens == BLIND.tokens
    model.connect(replace(GAME, name="other"), "it")
    assert model.embedders["other"].tokens == model.config.tokens


@pytest.mark.parametrize("tokens", [("return",), ("state", "return"), ("state", "reward"), ("word", "state")])
def test_tokens_that_the_model_does_not_have_in_that_order_are_refused(tokens):
    with pytest.raises(UserError, match="tokens of the interface 'arm' must be some of the model's"):
        make_model(replace(ARM, tokens=tokens))


def test_a_checkpoint_keeps_what_each_interface_reads(tmp_path):
    model, batch = make_model(BLIND, GAME), make_batch(BLIND)
    save_base(tmp_path / "model", model, {})
    again = load_base(str(tmp_path / "model")).model
    assert again.interfaces == model.interfaces
    assert torch.equal(again(batch), model(batch))


def test_a_task_nobody_has_seen_needs_a_return_only_where_returns_are_read():
    assert TargetReturn("auto").wanted("arm", None, ("state",)) == [0.0]
    assert TargetReturn("5").wanted("arm", None, ("return", "state")) == [5.0]
    with pytest.raises(UserError, match="not what return to ask for"):
        TargetReturn("auto").wanted("arm", None, ("return", "state"))
