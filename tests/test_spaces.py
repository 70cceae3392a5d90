"""Spaces as parts, and observations as rows of numbers."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.errors import UserError
from eva_rl.prepared import Exact, Smaller, Words
from eva_rl.spaces import (
    Part,
    action_choices,
    action_parts,
    action_row,
    action_rows,
    dtype_of,
    flatten,
    parts_of,
    spaces_from_text,
    spaces_to_text,
    to_action,
    together,
)


def pixels(*shape: int) -> Box:
    return Box(0, 255, shape, np.uint8)


PARTS = [
    (Box(-np.inf, np.inf, (39,), np.float64), Part("vector", (39,))),
    (Box(-1, 1, (2, 3)), Part("vector", (6,))),
    (pixels(128), Part("vector", (128,))),
    (Box(-5, 5, (4,), np.int64), Part("vector", (4,))),
    (MultiBinary(5), Part("vector", (5,))),
    (pixels(4, 84, 84), Part("image", (4, 84, 84))),
    (pixels(210, 160, 3), Part("image", (3, 210, 160), channels_last=True)),
    (pixels(84, 84), Part("image", (1, 84, 84), channels_last=True)),
    (pixels(7, 7, 3), Part("grid", (3, 7, 7), 256, channels_last=True)),
    (Box(0, 10, (5, 6), np.uint8), Part("grid", (1, 5, 6), 11, channels_last=True)),
    (Box(0, 33, (24,), np.int64), Part("tokens", (24,), 34)),
    (MultiDiscrete([3, 5]), Part("tokens", (2,), 5)),
    (Discrete(4, start=2), Part("choice", (), 4)),
]
EVERYTHING = Dict(
    {"picture": pixels(40, 50, 3), "cells": pixels(7, 7, 3), "arm": Box(-1, 1, (2,)), "door": Discrete(3, start=1)}
)


@pytest.mark.parametrize(("space", "part"), PARTS)
def test_a_space_is_the_part_that_its_observations_look_like(space, part):
    assert parts_of(space) == (part,)


@pytest.mark.parametrize("space", [space for space, _ in PARTS])
def test_one_observation_and_several_are_flattened_alike(space):
    space.seed(0)
    observations = [space.sample() for _ in range(6)]
    rows = flatten(space, np.stack(observations))
    [part] = parts_of(space)
    assert rows.shape == (6, part.size)
    assert rows.dtype == dtype_of((part,))
    np.testing.assert_array_equal(rows, [flatten(space, o) for o in observations])
    np.testing.assert_array_equal(
        flatten(space, np.stack(observations).reshape(2, 3, *space.shape)).reshape(6, -1), rows
    )


def test_the_parts_of_a_dict_stand_in_the_order_of_its_keys():
    EVERYTHING.seed(0)
    seen = EVERYTHING.sample()
    assert [part.kind for part in parts_of(EVERYTHING)] == ["vector", "grid", "choice", "image"]  # gymnasium sorts keys
    expected = np.concatenate([seen["arm"], seen["cells"].ravel(), [seen["door"] - 1], seen["picture"].ravel()])
    np.testing.assert_array_equal(flatten(EVERYTHING, seen), expected.astype(np.float32))


def test_a_dict_that_was_made_in_another_order_is_flattened_as_minari_reads_it_back():
    space = Dict(speed=Box(-1, 1, (2,)), place=Box(-1, 1, (1,)))
    seen = {"speed": np.array([1.0, 2.0]), "place": np.array([3.0])}
    assert flatten(space, seen).tolist() == [3.0, 1.0, 2.0]
    assert [part.size for part in parts_of(space)] == [1, 2]


@pytest.mark.parametrize(
    ("space", "observation"),
    [
        (Discrete(3), 5),
        (Discrete(3), -1),
        (Box(0, 10, (4, 4, 2), np.uint8), np.full((4, 4, 2), 15, np.uint8)),
        (Box(0, 9, (3,), np.int64), np.array([1, 2, 10])),
        (MultiDiscrete([3, 2]), np.array([-1, 0])),
    ],
)
def test_numbers_without_an_embedding_are_refused(space, observation):
    with pytest.raises(UserError, match="outside their space"):
        flatten(space, observation)


@pytest.mark.parametrize(
    ("space", "observation", "said"),
    [
        (
            Box(0, 255, (64, 48, 3), np.uint8),
            np.zeros((3, 64, 48), np.uint8),
            r"shape \(3, 64, 48\), where they end in \(64, 48, 3\)",
        ),
        (Box(-1, 1, (2, 3), np.float32), np.zeros((3, 2)), "where they end in"),
        (Box(-1, 1, (2, 3), np.float32), np.zeros((6, 1)), "where they end in"),
        (Dict({"see": Box(0, 255, (64, 64, 3), np.uint8)}), {"see": np.full((64, 64, 3), 0.5)}, "0 to 255"),
        (Box(0, 255, (64, 64, 3), np.uint8), np.full((64, 64, 3), 256), "0 to 255"),
        (Box(0, 255, (64, 64, 3), np.uint8), np.full((64, 64, 3), np.nan), "0 to 255"),
        (Exact(Box(-1e10, 1e10, (2,), np.float64)), np.zeros(3), "where they end in"),
    ],
)
def test_arrays_of_other_shapes_and_pictures_of_other_numbers_are_refused(space, observation, said):
    with pytest.raises(UserError, match=said):
        flatten(space, observation)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_pictures_of_whole_numbers_in_another_type_are_taken(dtype):
    space = Box(0, 255, (64, 64, 3), np.uint8)
    assert flatten(space, np.ones((5, 64, 64, 3), dtype)).dtype == np.uint8


def test_a_tuple_is_flattened_in_its_order():
    space = Tuple([Discrete(2), Box(-1, 1, (2,))])
    assert flatten(space, (1, np.array([0.5, -0.5], np.float32))).tolist() == [1.0, 0.5, -0.5]


def test_bytes_stay_bytes_unless_there_is_a_vector_among_them():
    assert dtype_of(parts_of(Dict({"cells": pixels(7, 7, 3), "door": Discrete(3)}))) == "uint8"
    assert dtype_of(parts_of(EVERYTHING)) == "float32"
    assert dtype_of(parts_of(Discrete(300))) == "float32"


@pytest.mark.parametrize(
    "space", [Text(9), Dict({"mission": Text(9), "arm": Box(-1, 1, (2,))}), gym.spaces.Graph(Box(0, 1, (2,)), None)]
)
def test_other_spaces_are_refused_with_what_can_be_taken(space):
    with pytest.raises(UserError, match="can't be embedded: Box, Discrete"):
        parts_of(space)


@pytest.mark.parametrize(
    ("space", "choices"),
    [(Discrete(7), (7,)), (MultiDiscrete([3, 4]), (3, 4)), (Box(-1, 1, (2, 2)), ()), (MultiBinary(3), (2, 2, 2))],
)
def test_actions_have_choices_or_are_continuous(space, choices):
    assert action_choices(space) == choices


ARM = Dict({"grip": Discrete(3, start=2), "arm": Box(-1, 1, (2, 1)), "b": Tuple([MultiDiscrete([2, 4], start=[1, 0])])})


def test_actions_of_several_parts_are_rows_in_the_order_of_their_keys():
    assert [str(part) for part in action_parts(ARM)] == ["2 numbers", "2 x 4 choices", "3 choices"]
    row = np.array([-0.5, 7.0, 1.0, 3.0, 2.0])
    action = to_action(ARM, row)
    assert ARM.contains(action)
    np.testing.assert_array_equal(action["arm"], [[-0.5], [1.0]])  # clipped
    np.testing.assert_array_equal(action["b"][0], [2, 3])
    assert action["grip"] == 4
    np.testing.assert_array_equal(action_row(ARM, action), [-0.5, 1.0, 1.0, 3.0, 2.0])
    both = together(ARM, [action, to_action(ARM, np.zeros(5))])
    np.testing.assert_array_equal(action_rows(ARM, both), [[-0.5, 1.0, 1.0, 3.0, 2.0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "space",
    [
        Dict({"arm": Dict({"box": Box(0, 3, (2,), np.int64)})}),
        Box(0, 3, (2,), np.int64),
        MultiBinary([2, 2]),
        Tuple([Text(3)]),
    ],
)
def test_actions_of_other_spaces_are_refused(space):
    with pytest.raises(UserError, match="where a Box of real numbers"):
        action_choices(space)
    with pytest.raises(UserError, match="nothing to do"):
        action_choices(Dict({"none": Tuple([])}))


@pytest.mark.parametrize(
    ("shape", "kind", "expected", "last"),
    [
        ((5, 5, 20), "grid", (20, 5, 5), True),  # more kinds of things than rows
        ((20, 5, 5), "grid", (20, 5, 5), False),
        ((7, 7, 3), "grid", (3, 7, 7), True),
        ((3, 7, 7), "grid", (3, 7, 7), False),
        ((7, 7, 7), "grid", (7, 7, 7), True),
        ((3, 64, 96), "image", (3, 64, 96), False),
        ((64, 96, 3), "image", (3, 64, 96), True),
        ((4, 84, 84), "image", (4, 84, 84), False),
    ],
)
def test_channels_are_the_axis_beside_a_square_or_else_the_shorter_end(shape, kind, expected, last):
    [part] = parts_of(gym.spaces.Box(0, 9 if kind == "grid" else 255, shape, np.uint8))
    assert (part.kind, part.shape, part.channels_last) == (kind, expected, last)


@pytest.mark.parametrize(
    "space",
    [
        Box(-1.0, np.array([2.0, np.inf], np.float32), dtype=np.float32),
        Box(-np.inf, np.inf, (2, 3), np.float64),
        Box(0, 255, (84, 84, 3), np.uint8),
        Box(np.array([-(2**62)]), np.array([2**62 + 1]), dtype=np.int64),
        Discrete(5, start=-2),
        MultiDiscrete([3, 4], start=[1, -1]),
        MultiBinary(4),
        MultiBinary([2, 3]),
        Text(20, min_length=2, charset="abä "),
        Words(Text(20, charset="abä "), ["ab", "ä"], 4),
        Smaller(Box(0, 255, (210, 160, 3), np.uint8), 2),
        Exact(Box(-np.inf, np.inf, (2,), np.float64)),
        Dict({"b": Discrete(2), "a": Tuple([Discrete(3), MultiBinary(2)])}),
    ],
    ids=str,
)
def test_spaces_come_back_from_their_text(space):
    text = spaces_to_text(space, Discrete(2))
    found, other = spaces_from_text(text)
    assert (found, other) == (space, Discrete(2))
    assert found.dtype == space.dtype
    assert len(text) < 1000  # the bounds of a picture's pixels are one number
    assert "Infinity" not in text


BOX = {"space": "Box", "dtype": "float32", "low": [0], "high": [1]}


def described(space: dict) -> str:
    return json.dumps({"observation": space, "action": {"space": "Discrete", "n": 2, "start": 0}})


def test_a_text_that_describes_no_space_is_refused():
    for text in (
        "",
        "[]",
        '{"observation": {"space": "Graph"}}',
        '{"observation": {"space": "Discrete", "n": -1, "start": 0}}',
        described(BOX | {"shape": [10**6, 10**6]}),
        described(BOX | {"shape": [2**63, 2**63]}),
        described(BOX | {"shape": [-1, 10**12]}),
        described(BOX | {"shape": ["a"]}),
        described({"space": "Tuple", "members": [BOX | {"shape": [2**14, 2**8]}] * 20}),
        described({"space": "Discrete", "n": 10**30, "start": 0}),
        described({"space": "MultiDiscrete", "nvec": [10**30], "start": [0], "dtype": "int64"}),
        '{"observation": ' + '{"space": "Tuple", "members": [' * 10**5,
        '{"observation": ' + '{"space": "Tuple", "members": [' * 900 + "]}" * 900 + ', "action": {}}',
    ):
        with pytest.raises(ValueError, match=r"."):
            spaces_from_text(text)


@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4))
def test_an_action_comes_back_as_the_row_it_was_made_from_within_its_bounds(numbers):
    row = np.array(numbers)
    for space in (Box(-1, 2, (2, 2), np.float32), Box(-np.inf, np.inf, (4,), np.float64)):
        action = to_action(space, row)
        assert space.contains(action)
        np.testing.assert_allclose(
            action_row(space, action), np.clip(row, space.low.ravel(), space.high.ravel()), rtol=1e-6, atol=1e-6
        )
    choices = np.abs(row).astype(int) % 3
    for space in (MultiDiscrete([3, 3, 3, 3], start=[0, 1, -1, 5]), Discrete(3, start=7)):
        own = choices[: len(action_choices(space))]
        assert space.contains(to_action(space, own))
        assert (action_row(space, to_action(space, own)) == own).all()
