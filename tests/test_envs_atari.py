"""The Atari games: their pictures, their seeds, and the experts that look into the console's memory."""

import importlib

import gymnasium as gym
import numpy as np
import pytest

from eva_rl.envs import atari, expand_tasks, find_task
from eva_rl.envs.atari import DOMAIN, EPISODE_LENGTH, EXPERTS
from eva_rl.errors import MissingExtra, UserError

pytest.importorskip("ale_py")


@pytest.fixture(scope="module")
def pong():
    env = DOMAIN.make("Pong")
    yield env
    env.close()


class FilmedConsole:
    """A console that shows evenly grey screens of the given values, one a step, and pays 1 for each."""

    def __init__(self, greys: list[int], ends_after: int | None = None):
        self.greys, self.ends_after, self.shown = greys, ends_after, 0

    def step(self, action: int):
        screen = np.full((210, 160), self.greys[self.shown], np.uint8)
        self.shown += 1
        return screen, 1.0, self.shown == self.ends_after, False, {}


def film(monkeypatch: pytest.MonkeyPatch, env: gym.Env, greys: list[int], ends_after: int | None = None):
    console = FilmedConsole(greys, ends_after)
    monkeypatch.setattr(env.unwrapped, "_console", console)
    return console


def rollout(env: gym.Env, seed: int | None, steps: int = 25) -> dict[str, np.ndarray]:
    """An episode's start under random actions, the same for every seed."""
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=seed)
    observations, rewards = [observation], []
    for _ in range(steps):
        observation, reward, *_ = env.step(int(rng.integers(18)))
        observations.append(observation)
        rewards.append(reward)
    return {"observations": np.stack(observations), "rewards": np.array(rewards)}


def episode_return(name: str, expert: bool, seed: int, steps: int = EPISODE_LENGTH) -> float:
    env = DOMAIN.make(name)
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    play = DOMAIN.expert(name, env)
    total, ended = 0.0, False
    while not ended and steps > 0:
        action = play(observation) if expert else env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended, steps = total + reward, terminated or truncated, steps - 1
    env.close()
    return total


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_every_game_has_an_expert_and_a_score_scale_on_which_it_is_far_above_chance():
    assert set(EXPERTS) == set(DOMAIN.tasks)
    for name in DOMAIN.tasks:
        scores = DOMAIN.reference_scores(name)
        assert scores.expert > scores.random + 10


def test_the_splits_are_disjoint_and_make_all():
    assert not set(DOMAIN.splits["train"]) & set(DOMAIN.splits["heldout"])
    assert sorted(DOMAIN.splits["train"] + DOMAIN.splits["heldout"]) == sorted(DOMAIN.splits["all"])
    assert expand_tasks("atari/heldout") == ("atari/Breakout",)


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_observations_and_the_experts_actions_are_those_of_the_spaces(name):
    env = DOMAIN.make(name)
    observation, _ = env.reset(seed=0)
    play = DOMAIN.expert(name, env)
    for _ in range(5):
        action = play(observation)
        assert env.action_space.contains(action)
        observation, *_ = env.step(action)
        assert env.observation_space.contains(observation)
    env.close()
    assert observation.shape == (4, 84, 84)
    assert env.action_space == gym.spaces.Discrete(18)


def test_all_games_share_one_interface():
    assert {DOMAIN.interface(name) for name in DOMAIN.tasks} == {"atari"}


def test_the_same_seed_gives_the_same_episode_whatever_came_before(pong):
    first = rollout(pong, seed=11)
    rollout(pong, seed=12, steps=7)
    assert_same(first, rollout(pong, seed=11))
    fresh = DOMAIN.make("Pong")
    assert_same(first, rollout(fresh, seed=11))
    fresh.close()


def test_resets_without_a_seed_follow_from_the_last_seed(pong):
    def episodes() -> list[np.ndarray]:
        return [rollout(pong, seed)["observations"] for seed in (5, None, None)]

    first = episodes()
    np.testing.assert_array_equal(first, episodes())
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[1], first[2])


def test_different_seeds_are_different_episodes_under_the_same_actions(pong):
    episodes = {rollout(pong, seed)["observations"].tobytes() for seed in range(8)}
    assert len(episodes) == 8


def test_an_action_sticks_now_and_then(pong):
    def moved(seed: int) -> int:  # Pong's paddle (memory 51) rests until it is moved
        pong.reset(seed=seed)
        before = int(pong.unwrapped.ram()[51])
        for action in (atari.LEFT, atari.NO_OP, atari.NO_OP, atari.NO_OP):
            pong.step(action)
        return int(pong.unwrapped.ram()[51]) - before

    distances = [moved(seed) for seed in range(12)]
    assert min(distances) > 0
    assert len(set(distances)) > 1


def test_the_spec_makes_the_environment_again(pong):
    recreated = gym.make(gym.envs.registration.EnvSpec.from_json(pong.spec.to_json()))
    assert recreated.spec.max_episode_steps == EPISODE_LENGTH
    assert_same(rollout(pong, seed=4), rollout(recreated, seed=4))
    recreated.close()


def test_the_four_frames_are_those_of_the_last_steps_with_the_newest_last(pong):
    observation, _ = pong.reset(seed=0)
    assert (observation == observation[0]).all()
    for _ in range(6):
        after, *_ = pong.step(atari.FIRE)
        np.testing.assert_array_equal(after[:-1], observation[1:])
        observation = after


def test_an_observation_does_not_change_with_the_next_step(pong):
    observation, _ = pong.reset(seed=0)
    before = observation.copy()
    pong.step(atari.UP)
    np.testing.assert_array_equal(observation, before)


def test_a_step_is_four_screens_whose_rewards_are_added_and_whose_last_two_are_seen(pong, monkeypatch):
    pong.reset(seed=0)
    console = film(monkeypatch, pong, [90, 80, 30, 50, 60, 20])
    observation, reward, terminated, *_ = pong.step(atari.NO_OP)
    assert (console.shown, reward, terminated) == (4, 4.0, False)
    assert (observation[-1] == 50).all()


def test_an_object_drawn_on_every_other_screen_is_seen(pong, monkeypatch):
    pong.reset(seed=0)
    film(monkeypatch, pong, [0, 70, 0, 70, 0, 70, 0, 70, 0])
    pong.unwrapped._console.step(atari.NO_OP)
    assert (pong.step(atari.NO_OP)[0][-1] == 70).all()


def test_a_game_that_ends_within_a_step_ends_there(pong, monkeypatch):
    pong.reset(seed=0)
    console = film(monkeypatch, pong, [10, 20, 30, 40], ends_after=2)
    observation, reward, terminated, truncated, _ = pong.step(atari.NO_OP)
    assert (console.shown, reward, terminated, truncated) == (2, 2.0, True, False)
    assert (observation[-1] == 20).all()


def test_a_picture_is_shrunk_by_the_mean_over_each_pixels_area():
    picture = np.random.default_rng(0).integers(0, 256, (210, 160)).astype(np.uint8)
    fine = picture.astype(np.int64).repeat(2, axis=0).repeat(21, axis=1)  # (420, 3360), of which 5 x 40 are a pixel
    means = fine.reshape(84, 5, 84, 40).mean((1, 3))
    np.testing.assert_array_equal(atari._shrink_to(84, 210, 160)(picture), np.floor(means + 0.5))


@pytest.mark.parametrize("grey", [0, 1, 128, 255])
def test_an_even_picture_stays_as_it_is(grey):
    assert (atari._shrink_to(84, 210, 160)(np.full((210, 160), grey, np.uint8)) == grey).all()


def test_a_game_has_no_success_to_report(pong):
    _, info = pong.reset(seed=0)
    assert "success" not in info
    assert "success" not in pong.step(atari.NO_OP)[-1]


def test_an_episode_is_truncated_after_a_thousand_steps():
    env = DOMAIN.make("Freeway")
    env.reset(seed=0)
    ends = [env.step(atari.NO_OP)[2:4] for _ in range(EPISODE_LENGTH)]
    env.close()
    assert not any(terminated or truncated for terminated, truncated in ends[:-1])
    assert ends[-1] == (False, True)


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_expert_plays_better_than_chance_from_the_start(name):
    assert episode_return(name, expert=True, seed=1, steps=300) > episode_return(name, expert=False, seed=1, steps=300)


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("Boxing", 15),
        ("Breakout", 25),
        ("Freeway", 13),
        ("Pong", 1),
    ],
)
@pytest.mark.slow
def test_the_expert_earns_its_score(name, at_least):
    assert np.mean([episode_return(name, expert=True, seed=seed) for seed in range(4)]) >= at_least


def test_a_ball_is_reflected_at_both_walls():
    places = [atari._reflected(position, 10, 30) for position in (5, 10, 20, 30, 35, 55, -15)]
    assert places == [15, 10, 20, 30, 25, 15, 25]


def test_an_unknown_game_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'atari/Brakeout'.*'atari/Breakout'"):
        find_task("atari/Brakeout")


def test_tasks_are_listed_without_the_simulator(monkeypatch):
    monkeypatch.setattr(DOMAIN, "require", lambda module: pytest.fail(f"{module} was imported"))
    assert len(expand_tasks("atari/all")) == 4


@pytest.mark.parametrize("ask", [lambda: DOMAIN.make("Pong"), lambda: DOMAIN.expert("Pong", None)])
def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch, ask):
    def not_installed(module: str):
        raise ModuleNotFoundError(f"No module named '{module}'", name="ale_py")

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingExtra, match=r"'ale_py', which is not installed: .*'eva_rl\[atari\]'"):
        ask()
