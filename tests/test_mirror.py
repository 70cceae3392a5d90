"""Windows shown in a mirror: which numbers change their sign, and that the world agrees."""

import numpy as np
import pytest
import torch

from eva_rl.data import MirroredSampler, WindowSampler, find_source
from eva_rl.data.trajectories import pack
from eva_rl.envs.metaworld import DOMAIN, SCALAR_LAST


@pytest.fixture(scope="module")
def windows():
    import gymnasium as gym

    rng = np.random.default_rng(0)
    box = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    episodes = [
        {"observations": rng.normal(size=(9, 3)), "actions": rng.normal(size=(9, 3)), "rewards": rng.normal(size=9)}
        for _ in range(4)
    ]
    return WindowSampler([pack("toy", episodes, box, box)], "toy", 5, 64, 0)


SIGNS = np.array([-1, 1, 1], np.float32), np.array([1, 1, -1], np.float32)


@pytest.mark.parametrize("draw", ["batch", "spread"])
def test_about_half_of_the_windows_are_mirrored_whole_and_the_others_are_as_they_were(windows, draw):
    plain, seen = getattr(windows, draw)(3), getattr(MirroredSampler(windows, *SIGNS), draw)(3)
    flipped = (seen.observations != plain.observations).any(-1).any(-1)
    assert 16 < flipped.sum() < 48
    signs = torch.where(flipped[:, None, None], torch.from_numpy(SIGNS[0]), torch.ones(3))
    assert torch.equal(seen.observations, plain.observations * signs)
    signs = torch.where(flipped[:, None, None], torch.from_numpy(SIGNS[1]), torch.ones(3))
    assert torch.equal(seen.actions, plain.actions * signs)
    assert torch.equal(seen.rewards, plain.rewards)
    assert torch.equal(seen.mask, plain.mask)


def test_a_batch_follows_from_the_seed_and_its_number(windows):
    one, other = MirroredSampler(windows, *SIGNS), MirroredSampler(windows, *SIGNS)
    assert torch.equal(one.batch(7).observations, other.batch(7).observations)
    assert not torch.equal(one.batch(7).observations, one.batch(8).observations)


def test_the_quaternions_order_is_that_of_the_simulators_source():
    import inspect

    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    found = {
        name for name, env in ALL_V3_ENVIRONMENTS.items() if "from_matrix" in inspect.getsource(env._get_quat_objects)
    }
    assert found == SCALAR_LAST


@pytest.mark.parametrize("name", ["push-v3", "hammer-v3", "handle-press-side-v3"])
def test_the_mirrored_actions_move_the_hand_to_the_mirror_image_of_where_the_actions_moved_it(name):
    observation_signs, action_signs = DOMAIN.mirror(name)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 4)).astype(np.float32).repeat(3, 0)
    paths = []
    for signs in (np.ones(4, np.float32), action_signs):
        env = DOMAIN.make(name)
        env.reset(seed=0)
        paths.append(np.stack([env.step(action * signs)[0][:3] for action in actions]))
        env.close()
    moved = np.abs(paths[0][:, 0]).max()
    assert moved > 0.05
    assert np.abs(paths[1] - paths[0] * observation_signs[:3]).max() < 0.2 * moved


@pytest.mark.parametrize("name", DOMAIN.tasks)
def test_the_mirror_image_of_a_mirror_image_is_the_task(name):
    for signs, size in zip(DOMAIN.mirror(name), (39, 4), strict=True):
        assert signs.shape == (size,)
        assert set(signs.tolist()) == {-1.0, 1.0}
    assert find_source(f"metaworld/{name}").mirror is not None


def test_resting_quaternions_are_their_own_mirror_images():
    for name in DOMAIN.tasks:
        signs = DOMAIN.mirror(name)[0]
        identity = np.zeros(39)
        identity[[10, 17] if name in SCALAR_LAST else [7, 14]] = 1
        np.testing.assert_array_equal(identity * signs, identity)
