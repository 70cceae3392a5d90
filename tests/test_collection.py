"""Collecting the expert's episodes: reproducible, whole or absent, and continued after an interruption."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import ContinuousDummyEnv
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from minari.dataset.minari_dataset import parse_dataset_id

import eva_rl
from eva_rl.data import Recipe, collect, collection, load_dataset
from eva_rl.envs import find_task
from eva_rl.errors import MissingExtra, UserError
from eva_rl.seeding import HALF

REACH = Recipe("metaworld/reach-v3", episodes=3, noise=(0.0, 0.2))
STEPS = Recipe("dummy/Steps-v0", episodes=4, noise=(0.0, 0.1, 0.5))


@pytest.fixture(scope="module")
def reach(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets root after two workers collected `REACH` into it."""
    root = tmp_path_factory.mktemp("reach")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        assert collect([REACH], workers=2) == [REACH.dataset_id]
    return root


@pytest.fixture
def staged(dummy_domain, monkeypatch) -> list[int]:
    """The numbers of the episodes that are collected while the test runs."""
    numbers: list[int] = []
    stage = collection._stage_episode

    def counted(*job) -> None:
        numbers.append(next(part for part in job if isinstance(part, int)))
        stage(*job)

    monkeypatch.setattr(collection, "_stage_episode", counted)
    return numbers


def contents(root: Path, recipe: Recipe) -> dict[str, np.ndarray]:
    """Every array and attribute of the dataset's HDF5 file, by its path within."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
        found.update({f"{name}@{key}": np.asarray(value) for key, value in node.attrs.items()})
        if isinstance(node, h5py.Dataset):
            found[name] = node[()]

    with h5py.File(root / recipe.dataset_id / "data/main_data.hdf5") as file:
        file.visititems(visit)
    return found


def assert_same_content(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def files_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def interrupt_at(monkeypatch, episode: int, error: type[BaseException] = RuntimeError) -> Callable[[], None]:
    """Make collecting this episode fail; the function returned lets it succeed again."""
    stage = collection._stage_episode

    def fail(*job) -> None:
        if episode in job:
            raise error("interrupted")
        stage(*job)

    monkeypatch.setattr(collection, "_stage_episode", fail)
    return lambda: monkeypatch.setattr(collection, "_stage_episode", stage)


def test_the_content_does_not_depend_on_the_number_of_workers(reach, datasets_root):
    collect([REACH], workers=1)
    assert_same_content(contents(reach, REACH), contents(datasets_root, REACH))


def test_episodes_are_whole_and_start_from_collection_seeds(reach):
    content = contents(reach, REACH)
    env = find_task(REACH.task)[0].make("reach-v3")
    for episode in range(3):
        assert content[f"episode_{episode}/observations"].shape == (201, 39)
        assert content[f"episode_{episode}/actions"].shape == (200, 4)
        assert content[f"episode_{episode}/infos/success"].shape == (201,)
        assert content[f"episode_{episode}/truncations"].nonzero()[0].tolist() == [199]
        assert not content[f"episode_{episode}/terminations"].any()
        seed = int(content[f"episode_{episode}@seed"])
        assert 0 <= seed < HALF
        np.testing.assert_array_equal(env.reset(seed=seed)[0], content[f"episode_{episode}/observations"][0])
    env.close()


def test_recorded_actions_lead_to_the_recorded_observations_again(reach):
    content = contents(reach, REACH)
    env = find_task(REACH.task)[0].make("reach-v3")
    env.reset(seed=int(content["episode_1@seed"]))
    for step, action in enumerate(content["episode_1/actions"][:30]):
        observation, reward, *_ = env.step(action)
        np.testing.assert_array_equal(observation, content["episode_1/observations"][step + 1])
        assert reward == content["episode_1/rewards"][step]
    env.close()


def test_metadata_say_how_the_dataset_was_made(reach, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(reach))
    dataset = minari.load_dataset(REACH.dataset_id)
    metadata = dataset.storage.metadata
    returns = [episode.rewards.sum() for episode in dataset]
    solved = [episode.infos["success"].max() > 0 for episode in dataset]
    assert metadata["dataset_id"] == REACH.dataset_id
    assert metadata["recipe"] == {
        "task": REACH.task,
        "episodes": 3,
        "noise": [0.0, 0.2],
        "seed": 0,
        "quality": "expert",
    }
    assert metadata["success_rate"] == np.mean(solved) > 0
    assert metadata["episode_return_mean"] == pytest.approx(np.mean(returns))
    assert metadata["eva_rl_version"] == eva_rl.__version__
    assert "MetaWorld" in metadata["expert"]
    assert metadata["requirements"] == ["eva_rl[metaworld]"]
    assert REACH.task in metadata["description"]
    assert (metadata["total_episodes"], metadata["total_steps"]) == (3, 600)
    assert metadata["algorithm_name"]


@pytest.mark.parametrize("eval_env", [False, True])
def test_the_environment_is_recovered_from_the_dataset(reach, monkeypatch, eval_env):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(reach))
    dataset = minari.load_dataset(REACH.dataset_id)
    env = dataset.recover_environment(eval_env=eval_env)
    episode = next(dataset.iterate_episodes([0]))
    assert env.spec.max_episode_steps == 200
    assert env.observation_space == dataset.observation_space
    assert env.action_space == dataset.action_space
    observation, _ = env.reset(seed=int(next(dataset.storage.get_episode_metadata([0]))["seed"]))
    np.testing.assert_array_equal(observation, episode.observations[0])
    env.close()


def test_a_collected_dataset_loads_as_trajectories(reach, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(reach))
    statistics = load_dataset(REACH.dataset_id, REACH.task).statistics()
    assert statistics.episodes == 3
    assert statistics.success_rate > 0
    assert statistics.return_max >= statistics.return_mean > 0


def test_nothing_but_the_dataset_is_left_in_the_datasets_root(reach, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(reach))
    data = f"{REACH.dataset_id}/data"
    assert files_in(reach) == {f"{data}/main_data.hdf5", f"{data}/metadata.json"}
    assert list(minari.list_local_datasets()) == [REACH.dataset_id]


def test_the_noise_mixture_is_taken_in_turn(dummy_domain, datasets_root):
    recipe = Recipe("dummy/Steps-v0", episodes=7, noise=(0.0, 0.05, 0.0, 0.5))
    collect([recipe])
    content = contents(datasets_root, recipe)
    expert = dummy_domain.expert("Steps-v0", dummy_domain.make("Steps-v0"))(None)
    spread = [np.abs(content[f"episode_{n}/actions"] - expert).max() for n in range(7)]
    assert [distance == 0 for distance in spread] == [True, False, True, False, True, False, True]
    assert spread[3] > spread[1]


def test_the_noise_is_in_units_of_half_the_action_range_and_stays_within_it(dummy_domain, datasets_root):
    recipe = Recipe("dummy/Steps-v0", episodes=60, noise=(0.1,))
    collect([recipe])
    content = contents(datasets_root, recipe)
    actions = np.concatenate([content[f"episode_{n}/actions"] for n in range(60)])
    np.testing.assert_allclose(actions.std(0), 0.1 * np.array([1.0, 2.0]), rtol=0.2)
    np.testing.assert_allclose(actions.mean(0), [0.5, 2.0], atol=0.06)
    space = gym.make("ContinuousDummy-v0").action_space
    wild = Recipe("dummy/Steps-v0", episodes=5, noise=(5.0,))
    collect([wild])
    content = contents(datasets_root, wild)
    assert all(space.contains(action) for n in range(5) for action in content[f"episode_{n}/actions"])


def test_a_second_call_does_nothing(staged, datasets_root, capfd):
    collect([STEPS])
    assert sorted(staged) == [0, 1, 2, 3]
    before = {path: path.stat().st_mtime_ns for path in datasets_root.rglob("*")}
    capfd.readouterr()
    assert collect([STEPS]) == [STEPS.dataset_id]
    assert len(staged) == 4
    assert {path: path.stat().st_mtime_ns for path in datasets_root.rglob("*")} == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_interrupted_collection_leaves_no_dataset_and_continues(staged, datasets_root, monkeypatch, error):
    mend = interrupt_at(monkeypatch, 2, error)
    with pytest.raises(error, match="interrupted"):
        collect([STEPS])
    assert not (datasets_root / STEPS.dataset_id).exists()
    assert list(minari.list_local_datasets()) == []
    finished = set(staged)
    assert {0, 1} <= finished
    mend()
    staged.clear()
    collect([STEPS])
    assert set(staged) == {0, 1, 2, 3} - finished
    continued = contents(datasets_root, STEPS)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets_root / "elsewhere"))
    collect([STEPS])
    assert_same_content(continued, contents(datasets_root / "elsewhere", STEPS))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_while_the_dataset_is_written_leaves_none_and_loses_no_episode(
    staged, datasets_root, monkeypatch, error
):
    create = minari.create_dataset_from_buffers

    def create_and_fail(*arguments, **options):
        create(*arguments, **options)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(minari, "create_dataset_from_buffers", create_and_fail)
        with pytest.raises(error):
            collect([STEPS])
    assert os.environ["MINARI_DATASETS_PATH"] == str(datasets_root)
    assert list(minari.list_local_datasets()) == []
    assert all(name.startswith(".collecting") for name in files_in(datasets_root))
    staged.clear()
    collect([STEPS])
    assert staged == []
    assert len(load_dataset(STEPS.dataset_id, STEPS.task).lengths) == 4


def test_the_failure_of_one_task_costs_no_episode_of_another(staged, monkeypatch):
    mend = interrupt_at(monkeypatch, 3)
    other = Recipe("dummy/Broken-v0", episodes=2)
    with pytest.raises(RuntimeError):
        collect([other, STEPS])
    mend()
    staged.clear()
    collect([other])
    assert staged == []
    collect([STEPS])
    assert staged == [3]


@pytest.mark.parametrize("lengths", [(2, 4), (4, 2), (3, 3)])
def test_recipes_that_differ_in_length_alone_are_collected_in_one_call(dummy_domain, datasets_root, lengths):
    recipes = [Recipe("dummy/Steps-v0", episodes=length) for length in lengths]
    assert collect(recipes) == [recipe.dataset_id for recipe in recipes]
    for recipe in recipes:
        assert len(load_dataset(recipe.dataset_id, recipe.task).lengths) == recipe.episodes


def test_a_longer_collection_begins_with_the_shorter_ones_episodes(dummy_domain, datasets_root):
    short, long = (Recipe("dummy/Steps-v0", episodes=length) for length in (2, 4))
    collect([short])
    collect([long])
    whole, part = contents(datasets_root, long), contents(datasets_root, short)
    assert_same_content(part, {name: whole[name] for name in part})


def test_other_seeds_and_other_tasks_give_other_episodes(dummy_domain, datasets_root):
    recipes = [
        Recipe("dummy/Steps-v0", 2),
        Recipe("dummy/Steps-v0", 2, seed=1),
        Recipe("dummy/Broken-v0", 2),
    ]
    collect(recipes)
    starts = {
        tuple(contents(datasets_root, recipe)[f"episode_{n}/observations"][0]) for recipe in recipes for n in range(2)
    }
    assert len(starts) == 6


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"episodes": 0}, "episodes to collect must be at least 1, got 0"),
        ({"episodes": -3}, "at least 1, got -3"),
        ({"noise": ()}, r"noise must be .* got \[\]"),
        ({"noise": (0.1, -0.1)}, r"noise must be .* got \[0.1, -0.1\]"),
        ({"noise": (float("nan"),)}, r"noise must be .* got \[nan\]"),
        ({"noise": (float("inf"),)}, r"noise must be .* got \[inf\]"),
        ({"seed": -1}, "seed must be .* got -1"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        Recipe("metaworld/reach-v3", **fields)


RECIPES = st.builds(
    Recipe,
    task=st.sampled_from(["metaworld/reach-v3", "metaworld/push-v3"]),
    episodes=st.integers(1, 1000),
    noise=st.lists(st.sampled_from([0.0, 1e-7, 0.001, 0.1, 0.3, 0.25, 1.0, 2.5]), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
)


@given(one=RECIPES, other=RECIPES)
def test_recipes_have_minari_ids_that_are_equal_where_the_recipes_are(one, other):
    parse_dataset_id(one.dataset_id)
    assert (one.dataset_id == other.dataset_id) == (one == other)
    assert one.dataset_id.startswith(f"{one.task}/")


@pytest.mark.parametrize("task", ["dummy/Step-v0", "dummy/all"])
def test_an_unknown_task_is_refused_before_anything_is_collected(dummy_domain, staged, datasets_root, task):
    with pytest.raises(UserError, match=f"'{task}'"):
        collect([Recipe("dummy/Steps-v0", 1), Recipe(task, 1)])
    assert staged == []
    assert files_in(datasets_root) == set()


def test_a_missing_extra_is_met_before_anything_is_collected(dummy_domain, staged, datasets_root, monkeypatch):
    def not_installed(name: str) -> gym.Env:
        raise MissingExtra("dummy", "dummy", "dummy_simulator")

    monkeypatch.setattr(dummy_domain, "make", not_installed)
    with pytest.raises(MissingExtra, match="dummy_simulator"):
        collect([STEPS])
    assert staged == []
    assert files_in(datasets_root) == set()


@pytest.mark.parametrize("use", [lambda: collect([STEPS]), lambda: load_dataset("mine/random-v0", "mine")])
def test_a_datasets_root_that_cannot_be_written_to_is_a_user_error(dummy_domain, tmp_path, monkeypatch, use):
    (tmp_path / "file").write_text("a regular file")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "datasets"))
    with pytest.raises(UserError, match="file/datasets"):
        use()


def test_the_users_datasets_root_is_named_again_after_a_collection(dummy_domain, datasets_root):
    collect([STEPS])
    assert os.environ["MINARI_DATASETS_PATH"] == str(datasets_root)


def test_discrete_noise_replaces_actions_by_ones_of_the_space():
    space = gym.spaces.Discrete(4, start=-1)
    rng = np.random.default_rng(0)
    kept = [collection._perturbed(np.int64(2), 0.0, space, rng) for _ in range(50)]
    noisy = [collection._perturbed(np.int64(2), 0.5, space, rng) for _ in range(2000)]
    assert {int(action) for action in kept} == {2}
    assert {int(action) for action in noisy} == {-1, 0, 1, 2}
    assert np.mean(np.array(noisy) != 2) == pytest.approx(0.5 * 3 / 4, abs=0.04)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (gym.spaces.Box(-np.inf, np.inf, (2,)), np.array([0.5, -3.0], np.float32)),
        (gym.spaces.Box(0.0, 1.0, (2,)), np.array([0.5, 1.0], np.float32)),
        (gym.spaces.MultiDiscrete([3, 3]), np.array([0, 2])),
    ],
)
def test_without_noise_an_action_is_left_as_it_is(space, action):
    perturbed = collection._perturbed(action, 0.0, space, np.random.default_rng(0))
    np.testing.assert_array_equal(perturbed, action)
    assert space.contains(perturbed)


def test_noise_replaces_that_share_of_the_choices():
    space, action, rng = gym.spaces.MultiDiscrete([5, 5], start=[1, 0]), np.array([2, 4]), np.random.default_rng(0)
    drawn = np.stack([collection._perturbed(action, 0.5, space, rng) for _ in range(2000)])
    assert all(space.contains(row) for row in drawn)
    np.testing.assert_allclose((drawn != action).mean(0), 0.5 * 0.8, atol=0.04)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (gym.spaces.Box(-np.inf, np.inf, (2,)), np.array([0.5, -3.0], np.float32)),
        (gym.spaces.MultiBinary(2), np.array([0, 1])),
    ],
)
def test_noise_without_a_range_to_measure_it_by_is_refused(space, action):
    with pytest.raises(UserError, match=r"set noise=\[0\]"):
        collection._perturbed(action, 0.1, space, np.random.default_rng(0))


def test_who_finds_another_collecting_waits_and_then_has_nothing_to_do(dummy_domain, datasets_root, staged):
    recipe = Recipe("dummy/Steps-v0", episodes=2)
    datasets_root.mkdir(exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(datasets_root / ".collecting.lock"):
            waiting = pool.submit(collect, [recipe])
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
            collection._collect([recipe], 1)
        assert waiting.result(timeout=60) == [recipe.dataset_id]
    assert staged == [0, 1]
    assert not (datasets_root / ".collecting.lock").exists()


def test_success_that_only_some_episodes_mention_is_kept_and_the_others_failed(dummy_domain, monkeypatch):
    reset, step = ContinuousDummyEnv.reset, ContinuousDummyEnv.step

    def says_little(env, action):
        *rest, info = step(env, action)
        return *rest, {"success": True} if info["success"] and env.length % 2 == 0 else {}

    monkeypatch.setattr(ContinuousDummyEnv, "reset", lambda env, **options: (reset(env, **options)[0], {}))
    monkeypatch.setattr(ContinuousDummyEnv, "step", says_little)
    recipe = Recipe("dummy/Steps-v0", episodes=8, noise=(0.0,))
    collect([recipe], workers=1)
    trajectories = load_dataset(recipe.dataset_id, recipe.task)
    assert trajectories.successes.tolist() == [length % 2 == 0 for length in trajectories.lengths.tolist()]
    assert 0 < minari.load_dataset(recipe.dataset_id).storage.metadata["success_rate"] < 1


def test_the_space_of_an_episode_counts_texts_by_their_letters():
    texts = ["a" * 10] * 100 + ["b" * 1000]
    assert collection._size({"mission": texts, "at": (np.zeros((101, 2), np.float32), None)}) < 3000
    assert collection._size(np.array(texts)) == collection._size(texts) == 2000
