"""BabyAI's levels: their missions as tokens, their seeds, and the planner that solves them."""

import importlib

import gymnasium as gym
import numpy as np
import pytest

from eva_rl.envs import babyai, expand_tasks, find_task
from eva_rl.envs.babyai import DOMAIN, HELDOUT, MISSION_LENGTH, STEP_LIMITS, VOCABULARY, tokenise
from eva_rl.errors import MissingExtra, UserError

pytest.importorskip("minigrid")

LEFT, RIGHT, FORWARD, PICK_UP, DROP, TOGGLE, DONE = range(7)


@pytest.fixture(scope="module")
def local():
    env = DOMAIN.make("GoToLocal-v0")
    yield env
    env.close()


def words(tokens: np.ndarray) -> str:
    return " ".join(VOCABULARY[token] for token in tokens if token).replace(" ,", ",")


def rollout(env: gym.Env, seed: int | None, name: str = "GoToLocal-v0", noise: float = 0.0, expert: bool = True):
    """An episode's observations, rewards and last success; actions are the expert's but for a share of random ones."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    play = DOMAIN.expert(name, env)
    observations, rewards, ended = [observation], [], False
    while not ended:
        action = play(observation) if expert and rng.random() >= noise else np.int64(rng.integers(7))
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        ended = terminated or truncated
    stacked = {key: np.stack([seen[key] for seen in observations]) for key in observations[0]}
    return stacked | {"rewards": np.array(rewards), "success": np.array(info["success"])}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_a_mission_becomes_the_places_of_its_words_padded_with_zeros():
    tokens = tokenise("go to the red ball, then open a door")
    assert tokens.shape == (MISSION_LENGTH,)
    assert tokens.dtype == np.int64
    assert words(tokens) == "go to the red ball, then open a door"
    assert not tokens[10:].any()


def test_a_word_that_is_not_in_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="'dragon', which is not in BabyAI's vocabulary"):
        tokenise("go to the red dragon")


def test_padding_is_no_word_of_a_mission():
    with pytest.raises(ValueError, match="'<pad>'"):
        tokenise("go to <pad>")


def test_a_mission_of_too_many_words_is_refused():
    with pytest.raises(ValueError, match="has 25 words where at most 24 were expected"):
        tokenise("go " * 25)


def test_the_vocabulary_has_each_word_once():
    assert len(set(VOCABULARY)) == len(VOCABULARY)


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_every_level_fits_the_spaces_the_vocabulary_and_its_step_limit(name):
    env = DOMAIN.make(name)
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        level = env.unwrapped.level
        assert env.observation_space.contains(observation)
        assert words(observation["mission"]) == level.mission.lower()
        assert level.max_steps <= env.spec.max_episode_steps
        assert env.action_space.contains(DOMAIN.expert(name, env)(observation))
    env.close()


def test_all_levels_share_one_interface():
    assert {DOMAIN.interface(name) for name in DOMAIN.tasks} == {"babyai"}


def test_the_splits_are_disjoint_and_make_all():
    assert not set(DOMAIN.splits["train"]) & set(HELDOUT)
    assert sorted((*DOMAIN.splits["train"], *HELDOUT)) == sorted(DOMAIN.splits["all"]) == sorted(DOMAIN.tasks)
    assert expand_tasks("babyai/heldout") == tuple(f"babyai/{name}" for name in HELDOUT)


def test_every_level_has_a_score_scale_on_which_the_expert_is_far_above_chance():
    for name in DOMAIN.tasks:
        scores = DOMAIN.reference_scores(name)
        assert scores.expert > scores.random + 0.1
        assert 0 <= scores.random < scores.expert <= 1


def test_the_same_seed_gives_the_same_episode_whatever_came_before(local):
    first = rollout(local, seed=11)
    rollout(local, seed=12, expert=False)
    assert_same(first, rollout(local, seed=11))
    fresh = DOMAIN.make("GoToLocal-v0")
    assert_same(first, rollout(fresh, seed=11))
    fresh.close()


def test_different_seeds_are_different_rooms(local):
    rooms = {local.reset(seed=seed)[0]["image"].tobytes() for seed in range(10)}
    assert len(rooms) > 5


def test_resets_without_a_seed_go_on_from_the_last_seed(local):
    def rooms() -> list[bytes]:
        return [local.reset(seed=seed)[0]["image"].tobytes() for seed in (5, None, None)]

    first = rooms()
    assert first == rooms()
    assert len(set(first)) > 1


def test_the_mission_stays_the_same_within_an_episode_and_belongs_to_its_observation(local):
    observation, _ = local.reset(seed=0)
    after, *_ = local.step(LEFT)
    np.testing.assert_array_equal(observation["mission"], after["mission"])
    after["mission"][:] = 0
    np.testing.assert_array_equal(local.step(RIGHT)[0]["mission"], observation["mission"])


def test_the_direction_turns_with_the_agent(local):
    observation, _ = local.reset(seed=0)
    after, *_ = local.step(RIGHT)
    assert after["direction"] == (observation["direction"] + 1) % 4


def test_the_spec_makes_the_environment_again(local):
    recreated = gym.make(gym.envs.registration.EnvSpec.from_json(local.spec.to_json()))
    assert_same(rollout(local, seed=4), rollout(recreated, seed=4))
    recreated.close()


def test_an_episode_without_success_is_truncated_at_the_step_limit():
    env = DOMAIN.make("GoToObjS4-v0")
    env.reset(seed=0)
    steps = [env.step(DONE) for _ in range(STEP_LIMITS["GoToObjS4-v0"])]
    env.close()
    assert [truncated for _, _, _, truncated, _ in steps] == [False] * 15 + [True]
    assert not any(terminated or reward or info["success"] for _, reward, terminated, _, info in steps)


def test_levels_draw_in_silence(capsys):
    env = DOMAIN.make("PutNextLocal-v0")
    for seed in range(20):
        env.reset(seed=seed)
    env.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["GoToLocal-v0", "OpenDoor-v0", "PickupLoc-v0", "PutNextLocal-v0", "UnlockPickup-v0"])
def test_the_expert_solves_every_episode_and_random_actions_hardly_any(name):
    env = DOMAIN.make(name)
    episodes = [rollout(env, seed, name) for seed in range(5)]
    chance = [rollout(env, seed, name, expert=False) for seed in range(5)]
    env.close()
    assert all(episode["success"] for episode in episodes)
    for episode in episodes:
        assert 0 < episode["rewards"][-1] <= 1
        assert not episode["rewards"][:-1].any()
    assert sum(e["rewards"].sum() for e in episodes) > 2 * sum(e["rewards"].sum() for e in chance)


def test_the_expert_finds_its_way_back_after_actions_that_were_not_its_own():
    env = DOMAIN.make("UnlockPickup-v0")
    episodes = [rollout(env, seed, "UnlockPickup-v0", noise=0.3) for seed in range(10)]
    env.close()
    assert np.mean([episode["success"] for episode in episodes]) >= 0.5


def test_the_expert_wanders_where_the_planner_fails(local):
    class FailingPlanner:
        def __init__(self, level):
            self.stack, self.vis_mask = [], None

        def replan(self, action_taken):
            raise AssertionError

    observation, _ = local.reset(seed=0)
    wander = babyai._RobustBot(FailingPlanner, local.unwrapped)
    actions = set()
    for _ in range(30):
        actions.add(int(wander(observation)))
        observation, *_ = local.step(LEFT)
    assert actions == {LEFT, RIGHT, FORWARD}


def test_the_expert_goes_on_with_another_planner_where_one_goes_round_in_circles(local):
    class Planner:
        made = 0

        def __init__(self, level):
            type(self).made += 1
            self.stack, self.vis_mask = ["subgoal"], None

        def replan(self, action_taken):
            while self.made == 1:
                self.stack[-1]
            return FORWARD

    observation, _ = local.reset(seed=0)
    bot = babyai._RobustBot(Planner, local.unwrapped)
    bot(observation)
    assert bot(observation) == FORWARD
    assert Planner.made == 2


def test_an_unknown_level_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'babyai/GoToLokal-v0'.*'babyai/GoToLocal-v0'"):
        find_task("babyai/GoToLokal-v0")


def test_tasks_are_listed_without_the_simulator(monkeypatch):
    monkeypatch.setattr(DOMAIN, "require", lambda module: pytest.fail(f"{module} was imported"))
    assert len(expand_tasks("babyai/all")) == 43


@pytest.mark.parametrize("ask", [lambda: DOMAIN.make("GoToLocal-v0"), lambda: DOMAIN.expert("GoToLocal-v0", None)])
def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch, ask):
    def not_installed(module: str):
        raise ModuleNotFoundError(f"No module named '{module}'", name="minigrid")

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingExtra, match=r"'minigrid', which is not installed: .*'eva_rl\[babyai\]'"):
        ask()


@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_expert_solves_nearly_every_episode_of_any_level(name):
    env = DOMAIN.make(name)
    solved = [rollout(env, seed, name)["success"] for seed in range(20)]
    env.close()
    assert np.mean(solved) >= 0.9
