"""Minari sets as others host them: storage, combinations and spaces of every kind that a model can take."""

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from eva_rl.data import interface_of, load_dataset
from eva_rl.rollout.simulators import Board, Stage
from eva_rl.spaces import action_choices

pytestmark = pytest.mark.filterwarnings("ignore:.*env_spec is None", "ignore:`eval_env` is set to None")
WHO = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "tests")
VECTOR = gym.spaces.Box(-1, 1, (4,), np.float32)


def columns(samples: list):
    if isinstance(samples[0], dict):
        return {key: columns([sample[key] for sample in samples]) for key in samples[0]}
    if isinstance(samples[0], tuple):
        return tuple(columns([sample[i] for sample in samples]) for i in range(len(samples[0])))
    return np.stack(samples)


def made_up(dataset_id: str, observations: gym.Space, actions: gym.Space, **options: object) -> minari.MinariDataset:
    observations.seed(0)
    actions.seed(0)
    buffers = [
        EpisodeBuffer(
            id=number,
            observations=columns([observations.sample() for _ in range(steps + 1)]),
            actions=columns([actions.sample() for _ in range(steps)]),
            rewards=np.ones(steps),
            terminations=np.arange(steps) == steps - 1,
            truncations=np.zeros(steps, bool),
            infos={"note": np.arange(steps + 1), "deep": {"x": np.zeros((steps + 1, 2))}},
        )
        for number, steps in enumerate((5, 7))
    ]
    spaces = {"observation_space": observations, "action_space": actions}
    return minari.create_dataset_from_buffers(dataset_id, buffers, **spaces, **WHO, **options)


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
@pytest.mark.parametrize(
    ("observations", "size"),
    [
        (VECTOR, 4),
        (gym.spaces.Discrete(5, start=-2), 1),
        (gym.spaces.MultiBinary(6), 6),
        (gym.spaces.MultiDiscrete([3, 4]), 2),
        (gym.spaces.Dict({"an odd key": VECTOR, "é.1": gym.spaces.Discrete(2), "0": VECTOR, "items": VECTOR}), 13),
        (gym.spaces.Tuple((VECTOR, gym.spaces.Discrete(3))), 5),
    ],
)
def test_observations_of_every_kind_load_from_every_storage(observations, size, storage):
    if storage == "arrow":
        pytest.importorskip("pyarrow")
    made_up("look/set-v0", observations, VECTOR, data_format=storage)
    trajectories = load_dataset("look/set-v0", "look")
    assert trajectories.lengths.tolist() == [5, 7]
    assert trajectories.observations.shape == (12, size)


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
@pytest.mark.parametrize(
    "actions",
    [gym.spaces.MultiBinary(3), gym.spaces.Discrete(4, start=-3), gym.spaces.MultiDiscrete([2, 3], start=[1, -1])],
)
def test_choices_are_counted_from_zero_and_given_back_as_the_environment_has_them(actions, storage):
    if storage == "arrow":
        pytest.importorskip("pyarrow")
    made_up("look/set-v0", VECTOR, actions, data_format=storage)
    trajectories = load_dataset("look/set-v0", "look")
    interface = interface_of("look", [trajectories])
    assert interface.choices == action_choices(actions)
    rows = trajectories.actions.reshape(12, -1).double().numpy()
    assert rows.min() >= 0
    stage = Stage(Board(np.zeros((12, 4)), rows, np.zeros(12), np.zeros(12), np.zeros(12)))
    actions.seed(0)
    taken = [actions.sample() for _ in range(12)]  # as they were written
    for row, action in enumerate(taken):
        given = stage._action(row, actions)
        np.testing.assert_array_equal(given, action)
        assert actions.contains(given)


def test_combined_sets_load_whole():
    parts = [made_up(f"look/part-v{n}", VECTOR, VECTOR) for n in range(2)]
    minari.combine_datasets(parts, "both-v0")
    assert load_dataset("both-v0", "look").lengths.tolist() == [5, 7, 5, 7]


def test_binary_actions_in_several_dimensions_are_refused():
    from eva_rl.errors import UserError

    with pytest.raises(
        UserError, match=r"Actions of MultiBinary\(\(2, 2\)\) were met where .* MultiBinary of one dimension"
    ):
        action_choices(gym.spaces.MultiBinary([2, 2]))
