"""The statistics behind EVA's components, against full singular value decompositions in float64 and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_rl.adapter.eva import EvaSettings, eva_init
from eva_rl.adapter.eva.covariance import Covariance
from eva_rl.adapter.eva.moments import Change, Moments, nystrom, principal_angle
from eva_rl.adapter.eva.streaming import OVERSAMPLING, StreamingSvd, merge

METHODS = [Covariance, StreamingSvd]
CPU = torch.device("cpu")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random(seed, width, width)).Q


def decaying(count: int, width: int, seed: int, ratio: float = 0.7) -> torch.Tensor:
    """Rows that are drawn independently, their deviation falling by `ratio` from one hidden direction to the next."""
    return random(seed, count, width) * ratio ** torch.arange(width) @ rotation(width, 7)


KINDS = {
    "decaying": decaying,
    "low-rank": lambda count, width, seed: random(seed, count, 3) @ random(7, 3, width),
    "duplicated": lambda count, width, seed: decaying(-(-count // 5), width, seed).repeat(5, 1)[:count],
    "constant": lambda count, width, seed: torch.full((count, width), 0.1 + seed),
    "large constant": lambda count, width, seed: torch.full((count, width), 1e3),
    "zero": lambda count, width, seed: torch.zeros(count, width),
    "badly scaled": lambda count, width, seed: random(seed, count, width) * torch.logspace(-3, 3, width),
    "far from zero": lambda count, width, seed: decaying(count, width, seed) * 3 + 1e3,
}

batches_of_rows = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(KINDS)),
        "width": st.sampled_from([5, 12, 24, 40]),
        "sizes": st.lists(st.integers(1, 40), min_size=1, max_size=7),
        "seed": st.integers(0, 1000),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    }
)


def batches(kind: str, width: int, sizes: list[int], seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Batches of these sizes, cut from rows of a kind and taken in any order."""
    parts = KINDS[kind](sum(sizes), width, seed).to(dtype).split(sizes)
    return [parts[i] for i in np.random.default_rng(seed).permutation(len(sizes))]


def take_in(
    method: type[Moments],
    parts: list[torch.Tensor],
    k: int,
    center: bool = True,
    weights: list[torch.Tensor] | None = None,
) -> tuple[Moments, list[Change]]:
    """Statistics of one stream after these batches, with as many components as are kept when k are asked for."""
    width, dtype = parts[0].shape[1], parts[0].dtype
    moments = method(1, width, min(k + OVERSAMPLING, width), center, dtype, CPU, 0)
    stream = torch.tensor([0])
    changes = []
    for i, rows in enumerate(parts):
        w = None if weights is None else weights[i].to(moments.dtype)[None]
        changes.append(moments.update(stream, rows.to(moments.dtype, copy=True)[None], w))
    return moments, changes


def about(rows: torch.Tensor, center: bool) -> np.ndarray:
    rows = rows.double().numpy()
    return rows - rows.mean(0) * center


def spectrum(rows: torch.Tensor, center: bool) -> np.ndarray:
    """S^2 of the rows, as many as they are wide."""
    values = np.linalg.svd(about(rows, center), compute_uv=False) ** 2
    return np.pad(values, (0, max(0, rows.shape[1] - len(values))))


def dust(rows: torch.Tensor) -> float:
    """The variance that rounding to float32 may add to rows."""
    return 1e-12 * rows.double().square().sum().item() + 1e-100


def captured(components: torch.Tensor, rows: torch.Tensor, center: bool) -> float:
    """Variance in the components' span as a share of the most that any subspace of that size holds."""
    held = np.square(about(rows, center) @ components.double().numpy().T).sum()
    return held / spectrum(rows, center)[: len(components)].sum()


def check_moments(moments: Moments, changes: list[Change], rows: torch.Tensor, k: int, share: float, error: float):
    """Whatever the rows are: the totals are right, the components are orthonormal and hold that share of what is best."""
    center, values, rounding = moments.center, spectrum(rows, moments.center), dust(rows)
    assert moments.mass.tolist() == [len(rows)]
    np.testing.assert_allclose(moments.variance[0], values.sum(), rtol=1e-4, atol=rounding)
    if center:
        np.testing.assert_allclose(moments.mean[0], rows.double().mean(0), rtol=0, atol=1e-6 * float(rows.abs().max()))
    components, squared = moments.leading(0, k)
    np.testing.assert_allclose(components @ components.T, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(moments.basis[0] @ moments.basis[0].T, np.eye(len(moments.basis[0])), atol=1e-5)
    assert (squared >= 0).all()
    assert (squared.diff() <= 0).all()
    np.testing.assert_allclose(squared, values[:k], rtol=0, atol=error * values.sum() + rounding)
    if values.sum() > rounding:
        assert captured(components, rows, center) >= share
    assert not changes[0].captured.any()
    for change in changes:
        assert change.finite.all()
        assert ((change.captured >= 0) & (change.captured <= 1)).all()
        assert ((change.cosines >= 0) & (change.cosines <= 1 + 1e-5)).all()


@given(data=batches_of_rows, k=st.integers(1, 5), center=st.booleans())
def test_exact_components_are_those_of_all_rows_however_these_are_split_and_ordered(data, k, center):
    parts = batches(**data)
    rows = torch.cat(parts)
    moments, changes = take_in(Covariance, parts, k, center)
    check_moments(moments, changes, rows, k, share=0.9999, error=1e-4)
    scatter = about(rows, center).T @ about(rows, center)
    error = 1e-5 * np.trace(scatter) + dust(rows)
    np.testing.assert_allclose(moments.scatter[0], scatter, rtol=0, atol=error)
    at_once, _ = take_in(Covariance, [rows], k, center)
    np.testing.assert_allclose(moments.scatter, at_once.scatter, rtol=0, atol=error)


@given(data=batches_of_rows, k=st.integers(1, 5), center=st.booleans())
def test_streamed_components_capture_what_a_full_svd_captures(data, k, center):
    parts = batches(**data)
    moments, changes = take_in(StreamingSvd, parts, k, center)
    check_moments(moments, changes, torch.cat(parts), k, share=0.99, error=1e-2)


@given(
    data=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["decaying", "badly scaled"]),
            "width": st.sampled_from([24, 40]),
            "sizes": st.lists(st.integers(5, 40), min_size=1, max_size=12),
            "seed": st.integers(0, 1000),
            "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        }
    ),
    k=st.integers(1, 6),
    center=st.booleans(),
)
@settings(max_examples=40)
def test_on_a_decaying_spectrum_streaming_gives_the_singular_values_of_all_rows(data, k, center):
    parts = batches(**data)
    moments, _ = take_in(StreamingSvd, parts, k, center)
    rows = torch.cat(parts)
    components, values = moments.leading(0, k)
    assert captured(components, rows, center) >= 0.999
    expected = spectrum(rows, center)
    np.testing.assert_allclose(values, expected[:k], rtol=1e-2, atol=1e-6 * expected.sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("center", [True, False])
def test_rows_that_come_one_by_one_add_up(method, center):
    rows = decaying(300, 40, 3).float() + 2
    moments, changes = take_in(method, list(rows.split(1)), 4, center)
    check_moments(moments, changes, rows, 4, share=0.999, error=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_errors_do_not_pile_up_over_a_thousand_batches_that_leave_directions_empty(method):
    rows = (random(1, 8000, 3) @ random(7, 3, 64) + 10).float()
    moments, _ = take_in(method, list(rows.split(8)), 4)
    expected = spectrum(rows, True)
    components, values = moments.leading(0, 4)
    np.testing.assert_allclose(values[:3], expected[:3], rtol=1e-5)
    assert values[3] <= 1e-7 * expected[0]
    assert captured(components, rows, True) >= 1 - 1e-6
    np.testing.assert_allclose(moments.basis[0] @ moments.basis[0].T, np.eye(4 + OVERSAMPLING), atol=1e-5)


@given(
    method=st.sampled_from(METHODS),
    calls=st.lists(
        st.permutations(range(4)).flatmap(lambda p: st.sampled_from([p[:n] for n in (1, 2, 3, 4)])), max_size=5
    ),
    seed=st.integers(0, 1000),
    center=st.booleans(),
)
@settings(max_examples=30)
def test_streams_in_one_stack_get_what_each_would_get_alone(method, calls, seed, center):
    k, width = 3, 16
    stack = method(4, width, k + OVERSAMPLING, center, torch.float64, CPU, 0)
    alone = [method(1, width, k + OVERSAMPLING, center, torch.float64, CPU, 0) for _ in range(4)]
    for number, call in enumerate([list(range(4)), *calls]):
        rows = torch.stack([decaying(30, width, 100 * seed + 10 * number + s) + s for s in call])
        change = stack.update(torch.tensor(call), rows.clone())
        for i, s in enumerate(call):
            own = alone[s].update(torch.tensor([0]), rows[i : i + 1].clone())
            torch.testing.assert_close(change.captured[i, :k], own.captured[0, :k], rtol=0, atol=1e-9)
            torch.testing.assert_close(change.cosines[i, :k], own.cosines[0, :k], rtol=0, atol=1e-9)
    for s, own in enumerate(alone):
        for name in ("mass", "mean", "variance"):
            torch.testing.assert_close(getattr(stack, name)[s], getattr(own, name)[0], rtol=1e-9, atol=1e-12)
        (components, values), (expected, expected_values) = stack.leading(s, k), own.leading(0, k)
        torch.testing.assert_close(components, expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(values, expected_values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_that_joins_later_learns_beside_the_others(method):
    moments = method(2, 24, 4 + OVERSAMPLING, True, torch.float32, CPU, 0)
    early, late = ([decaying(30, 24, seed).float() for seed in range(first, 8)] for first in (0, 3))
    for number in range(8):
        streams = [0] if number < 3 else [1, 0]
        rows = [[early, late][s][number - 3 * s] for s in streams]
        change = moments.update(torch.tensor(streams), torch.stack(rows))
        if number == 3:
            assert not change.captured[0].any()
            assert change.captured[1].all()
    for s, parts in enumerate((early, late)):
        assert captured(moments.leading(s, 4)[0], torch.cat(parts), True) >= 0.999


@given(
    method=st.sampled_from(METHODS),
    weights=st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    center=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_a_weight_of_w_counts_a_row_w_times(method, weights, dtype, center, seed):
    weights = [torch.tensor(w) for w in weights]
    parts = [(decaying(6, 10, 10 * seed + i) + 1).to(dtype) for i in range(len(weights))]
    repeated = torch.cat([part.repeat_interleave(w, 0) for part, w in zip(parts, weights, strict=True)])
    moments, _ = take_in(method, parts, 3, center, weights)
    assert moments.mass.tolist() == [len(repeated)]
    if len(repeated) > 1:
        expected, rounding = spectrum(repeated, center), dust(repeated)
        np.testing.assert_allclose(moments.variance[0], expected.sum(), rtol=1e-5, atol=rounding)
        components, values = moments.leading(0, 3)
        np.testing.assert_allclose(values, expected[:3], rtol=0, atol=1e-5 * expected.sum() + rounding)
        if expected.sum() > rounding:
            assert captured(components, repeated, center) >= 0.999


@given(
    method=st.sampled_from(METHODS),
    value=st.floats(1e-3, 1e6),
    sizes=st.lists(st.sampled_from([1, 2, 7, 40, 1000]), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_rows_that_never_vary_are_called_constant(method, value, sizes, dtype, seed):
    row = (random(seed, 12) * value).to(dtype)
    moments, _ = take_in(method, [row.expand(n, 12) for n in sizes], 4)
    assert moments.constant.tolist() == [True]


@given(
    method=st.sampled_from(METHODS),
    value=st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e6]),
    place=st.tuples(st.integers(0, 39), st.integers(0, 11)),
    batch=st.sampled_from([1, 7, 40]),
)
@settings(max_examples=40)
def test_one_entry_that_is_off_by_a_thousandth_makes_rows_vary(method, value, place, batch):
    rows = torch.full((40, 12), value)
    rows[place] += value / 1000 or 1e-3
    moments, _ = take_in(method, list(rows.split(batch)), 4)
    assert moments.constant.tolist() == [False]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [1e-12, 1e6])
def test_weights_of_any_size_leave_constant_rows_constant_and_others_varying(method, weight):
    weights = 3 * [torch.full((40,), weight)]
    same = random(1, 12).float().expand(40, 12)
    moments, _ = take_in(method, 3 * [same], 4, weights=weights)
    assert moments.constant.tolist() == [True]
    moments, _ = take_in(method, 3 * [same + random(2, 40, 12).float() / 100], 4, weights=weights)
    assert moments.constant.tolist() == [False]


@pytest.mark.parametrize("method", METHODS)
def test_about_zero_a_constant_row_is_a_direction_and_only_zeros_are_constant(method):
    row = random(1, 12)
    moments, _ = take_in(method, 3 * [row.expand(20, 12)], 4, center=False)
    assert moments.constant.tolist() == [False]
    components, values = moments.leading(0, 2)
    direction = (row / row.norm()).numpy()
    assert abs(components[0].numpy() @ direction) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(values, [60 * row.square().sum(), 0], rtol=1e-6, atol=1e-8)
    zeros, _ = take_in(method, [torch.zeros(20, 12)], 4, center=False)
    assert zeros.constant.tolist() == [True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_the_streams_with_a_bad_number_are_called_not_finite(bad):
    for method in METHODS:
        rows = random(0, 3, 8, 12)
        rows[1, 5, 2] = bad
        moments = method(3, 12, 4, True, torch.float64, CPU, 0)
        assert moments.update(torch.arange(3), rows).finite.tolist() == [True, False, True]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    rank=st.integers(1, 6),
    seed=st.integers(0, 1000),
    center=st.booleans(),
)
def test_merged_parts_are_the_whole_where_its_rank_fits(sizes, rank, seed, center):
    k, width, streams = 6, 15, 2
    parts = [random(seed + s, sum(sizes), rank) @ random(seed + 50 + s, rank, width) for s in range(streams)]
    values, bases, apart = (torch.zeros(len(sizes), streams, *shape).double() for shape in ((k,), (k, width), (width,)))
    for s, whole in enumerate(parts):
        for p, part in enumerate(whole.split(sizes)):
            exact = torch.from_numpy(about(part, center)) if len(part) else part
            vectors = np.linalg.svd(np.concatenate([exact, np.zeros((width, width))]))
            values[p, s], bases[p, s] = torch.from_numpy(vectors[1][:k] ** 2), torch.from_numpy(vectors[2][:k])
            if center and len(part):
                apart[p, s] = (part.mean(0) - whole.mean(0)) * math.sqrt(len(part))
    merged_values, merged = merge(values, bases, apart)
    for s, whole in enumerate(parts):
        expected = spectrum(whole, center)[:k] if len(whole) else np.zeros(k)
        np.testing.assert_allclose(merged_values[s], expected, rtol=1e-9, atol=1e-9 * max(expected.sum(), 1))
        np.testing.assert_allclose(merged[s] @ merged[s].T, np.eye(k), atol=1e-9)
        if expected.sum() > 0:
            held = np.square(about(whole, center) @ merged[s].numpy().T).sum()
            assert held == pytest.approx(expected.sum(), rel=1e-9)


@pytest.mark.parametrize("center", [True, False])
def test_merged_streams_capture_what_one_stream_of_all_rows_would(center):
    parts = [decaying(n, 40, n).float() + n / 100 for n in (60, 120, 200)]
    streams = [take_in(StreamingSvd, list(part.split(20)), 4, center)[0] for part in parts]
    rows = torch.cat(parts)
    apart = torch.stack([(p.double().mean(0) - rows.double().mean(0)) * math.sqrt(len(p)) for p in parts])[:, None]
    values, basis = merge(
        torch.stack([m.values for m in streams]), torch.stack([m.basis for m in streams]), apart * center
    )
    assert captured(basis[0, :4], rows, center) >= 0.9999
    np.testing.assert_allclose(values[0, :4], spectrum(rows, center)[:4], rtol=1e-3)


@given(
    rank=st.integers(0, 5),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    noise=st.sampled_from([StreamingSvd.noise, Covariance.noise]),
    seed=st.integers(0, 1000),
)
def test_the_nystrom_approximation_of_a_low_rank_matrix_is_exact(rank, scale, noise, seed):
    k, width = 5, 20
    eigenvalues = np.zeros((2, k))
    eigenvalues[:, :rank] = scale * 3.0 ** -np.arange(rank)
    vectors = torch.stack([rotation(width, seed)[:k], rotation(width, seed + 1)[:k]])
    basis = torch.stack([rotation(width, seed + 2)[:k], rotation(width, seed + 3)[:k]])
    scatter = vectors.mT * torch.from_numpy(eigenvalues)[:, None] @ vectors
    image = basis @ scatter
    found, values = nystrom(image, image @ basis.mT, basis, noise * scatter.diagonal(dim1=1, dim2=2).sum(-1))
    np.testing.assert_allclose(found @ found.mT, np.eye(k)[None].repeat(2, 0), atol=1e-5)
    for i in range(2):
        seen = np.linalg.svd(vectors[i, :rank] @ basis[i].T, compute_uv=False).min(initial=1)
        error = 10 * noise * eigenvalues[i].sum() / seen**2  # what was added to the matrix, seen from aslant
        np.testing.assert_allclose(values[i], eigenvalues[i], rtol=0, atol=error + 1e-100)
        least = eigenvalues[i, :rank].min(initial=1)
        assert principal_angle(found[i, :rank], vectors[i, :rank]) <= math.degrees(error / least) + 1e-6
        if rank == 0:
            assert principal_angle(found[i], basis[i]) < 1e-6


@given(
    degrees=st.lists(st.sampled_from([0.0, 1e-6, 1e-4, 0.1, 1.0, 30.0, 60.0, 89.0, 90.0]), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_the_principal_angle_is_the_largest_one_by_which_a_subspace_was_turned(degrees, seed):
    k, directions = len(degrees), rotation(12, seed)
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))[:, None]
    before = directions[:k]
    after = angles.cos() * before + angles.sin() * directions[k : 2 * k]
    before, after = rotation(k, seed + 1) @ before, rotation(k, seed + 2) @ after
    expected = pytest.approx(max(degrees), rel=1e-6, abs=1e-5 if max(degrees) > 80 else 1e-12)
    assert principal_angle(before, after) == expected
    assert principal_angle(after, before) == expected


def test_subspaces_without_dimensions_have_no_angle_between_them():
    assert principal_angle(torch.empty(0, 5), torch.empty(0, 5)) == 0


def follow(method: type[Moments], deviations: torch.Tensor, k: int, count: int, streams: int = 16):
    """Streams of batches of 100 independent rows with these deviations in hidden directions: for each batch the share that the k components
    claim to capture, the share they do capture of an endless stream's variance, their least cosine with a batch before,
    and how far their subspace turned since."""
    width = len(deviations)
    hidden = rotation(width, 7)
    moments = method(streams, width, k + OVERSAMPLING, True, torch.float32, CPU, 0)
    best = deviations.square().sort(descending=True).values[:k].sum()
    history = []
    for number in range(count):
        rows = random(number, streams, 100, width) * deviations @ hidden.T
        change = moments.update(torch.arange(streams), rows.float())
        held = ((moments.basis[:, :k].double() @ hidden) * deviations).square().sum((1, 2))
        turned = torch.tensor([moments.angle(s, k) for s in range(streams)])
        history.append((change.captured[:, k - 1], held / best, change.cosines[:, :k].min(1).values, turned))
    return [torch.stack(part) for part in zip(*history, strict=True)]  # each (count, streams)


DECAYING = 0.7 ** torch.arange(32, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_the_captured_share_rises_towards_one_on_independent_batches(method):
    claimed = follow(method, DECAYING, 4, 30)[0]
    assert not claimed[0].any()
    assert claimed[29].min() > 0.999
    means = claimed.mean(1)
    assert means[1] < means[3] < means[7] < means[15] < means[29]


@pytest.mark.parametrize("method", METHODS)
def test_the_captured_share_is_what_an_endless_stream_would_confirm(method):
    claimed, true, *_ = follow(method, DECAYING, 4, 30)
    for number in (4, 9, 19, 29):
        ratio = (1 - true[number]).mean() / (1 - claimed[number]).mean()
        assert 0.3 < ratio < 1  # it errs on the safe side, by a standard error
        assert ((1 - true[number]) < 3 * (1 - claimed[number])).all()


@pytest.mark.parametrize("method", METHODS)
def test_equal_singular_values_keep_components_turning_but_not_the_captured_share(method):
    few, many = (torch.where(torch.arange(32) < n, 1.0, 0.05).double() for n in (4, 8))
    claimed, true, cosines, turned = (part[9] for part in follow(method, DECAYING, 4, 10))
    assert claimed.min() > 0.999
    assert cosines.min() > 0.99

    claimed, true, cosines, turned = (part[9] for part in follow(method, few, 4, 10))  # all equal ones are inside
    assert claimed.min() > 0.999
    assert true.min() > 0.999
    assert cosines.mean() < 0.9
    assert turned.max() < 1

    claimed, true, cosines, turned = (part[9] for part in follow(method, many, 4, 10))  # half of them are left outside
    assert claimed.min() > 0.95
    assert true.min() > 0.999
    assert cosines.mean() < 0.9
    assert turned.mean() > 10


@pytest.mark.parametrize("center", [True, False])
def test_streaming_keeps_no_more_than_k_vectors_a_stream_and_room_for_one_batch(center):
    streams, width, k = 3, 64, 5
    moments = StreamingSvd(streams, width, k, center, torch.float32, CPU, 0)
    for count in (500, 1, 700, 500):
        written = moments.room(streams, count).copy_(random(count, streams, count, width))
        stacked = moments.stack(written.unbind())
        assert stacked.data_ptr() == written.data_ptr()
        moments.update(torch.arange(streams), stacked)
    tensors = {name: value for name, value in vars(moments).items() if isinstance(value, torch.Tensor)}
    room = tensors.pop("scratch")
    assert room.untyped_storage().nbytes() == streams * 700 * width * 4
    assert {"basis", "values", "mean"} <= set(tensors)
    for name, tensor in tensors.items():
        assert tensor.untyped_storage().nbytes() <= streams * max(k, 1) * width * tensor.element_size(), name
    assert not [name for name, value in vars(moments).items() if isinstance(value, list | tuple | dict | set)]


class Halved(torch.nn.Module):
    """Two layers of one width, the second of which reads every other row."""

    def __init__(self):
        super().__init__()
        self.every, self.other = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.every(x)[::2] + self.other(2 * x[::2])


@pytest.mark.filterwarnings("ignore:EVA stopped")
@pytest.mark.parametrize("method", ["covariance", "streaming"])
def test_layers_that_read_different_numbers_of_rows_share_a_stack(method):
    parts = list(decaying(160, 12, 1).float().split(40))
    found = eva_init(Halved(), parts, {"every": 3, "other": 3}, EvaSettings(tau=1.0, max_batches=4, method=method))
    for name, rows in (("every", torch.cat(parts)), ("other", 2 * torch.cat(parts)[::2])):
        assert found[name].rows == len(rows)
        assert found[name].total == pytest.approx(spectrum(rows, True).sum(), rel=1e-5)
        assert captured(found[name].components, rows, True) >= 0.999


def test_components_of_least_variance_are_the_last_of_a_full_svd():
    rows = decaying(200, 10, 5) + 1
    moments, _ = take_in(Covariance, list(rows.split(30)), 3)
    last = np.linalg.svd(about(rows, True))[2][::-1][:3]
    cosines = np.abs((moments.minor(0, 3).numpy() * last).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)


def in_columns(start: int, rows: torch.Tensor, width: int = 64) -> torch.Tensor:
    """The rows (n, d) as d of `width` columns, the others zero, as the outputs of inactive rectifiers are."""
    return torch.nn.functional.pad(rows, (start, width - start - rows.shape[1]))


@pytest.mark.parametrize("center", [True, False])
def test_one_batch_is_enough_to_find_its_components_whatever_columns_it_lies_in(center):
    rows = in_columns(40, decaying(100, 20, 1) + 1)
    moments, _ = take_in(StreamingSvd, [rows], 4, center)
    assert captured(moments.leading(0, 4)[0], rows, center) >= 0.999


def test_one_batch_is_enough_also_where_the_spectrum_falls_slowly():
    for seed in range(10):
        rows = decaying(200, 64, seed, ratio=0.95).float()
        moments, _ = take_in(StreamingSvd, [rows], 4)
        assert captured(moments.leading(0, 4)[0], rows, True) >= 0.999


def later(first: torch.Tensor, rest: torch.Tensor, size: int = 50) -> list[torch.Tensor]:
    """A first batch, then batches of this size."""
    return [first, *rest.split(size)]


@pytest.mark.parametrize("center", [True, False])
def test_streaming_learns_columns_that_were_silent_in_a_constant_first_batch(center):
    parts = later(torch.zeros(50, 64), in_columns(20, decaying(500, 10, 1)))
    moments, _ = take_in(StreamingSvd, parts, 4, center)
    assert captured(moments.leading(0, 4)[0], torch.cat(parts), center) >= 0.99


def test_streaming_learns_silent_columns_also_from_rows_that_come_one_by_one():
    rows = in_columns(20, decaying(200, 10, 1))
    moments, _ = take_in(StreamingSvd, list(rows.split(1)), 4)
    assert captured(moments.leading(0, 4)[0], rows, True) >= 0.99


def test_streaming_learns_columns_that_wake_up_after_the_first_batch():
    parts = later(in_columns(0, decaying(50, 10, 1)), 10 * in_columns(20, decaying(500, 10, 2)))
    moments, _ = take_in(StreamingSvd, parts, 4, center=False)
    assert captured(moments.leading(0, 4)[0], torch.cat(parts), False) >= 0.99


@pytest.mark.parametrize("center", [True, False])
def test_the_exact_mode_takes_batches_that_are_a_million_times_larger_in_new_directions(center):
    turned = rotation(64, 3)
    parts = later(in_columns(0, random(1, 50, 12)) @ turned, 1e6 * in_columns(20, decaying(150, 20, 2)) @ turned)
    moments, _ = take_in(Covariance, [part.float() for part in parts], 4, center)
    assert captured(moments.leading(0, 4)[0], torch.cat(parts), center) >= 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_kept_vectors_stay_orthonormal_where_they_hold_a_sliver_of_the_variance(method, dtype):
    for seed in range(5):
        rows = (random(seed, 2, 24) * torch.logspace(-6, 6, 24)).to(dtype)
        moments, _ = take_in(method, list(rows.split(1)), 1)
        np.testing.assert_allclose(moments.basis[0] @ moments.basis[0].T, np.eye(1 + OVERSAMPLING), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_large_constant_column_does_not_make_the_others_constant(method):
    rows = random(1, 100, 16).float() / 10
    rows[:, 3] = 2.0**20  # whose mean is exact
    moments, _ = take_in(method, list(rows.split(20)), 4)
    assert moments.constant.tolist() == [False]


@pytest.mark.parametrize("method", METHODS)
def test_rows_whose_squares_overflow_are_learned_or_called_not_finite(method):
    rows = 1e20 * decaying(100, 16, 1).float()
    moments, changes = take_in(method, [rows], 4)
    assert not changes[0].finite.any() or captured(moments.leading(0, 4)[0], rows, True) >= 0.99


def test_a_core_that_rounding_made_more_indefinite_than_expected_still_gives_components():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64)).Q.mT  # (k, d)
    scatter = basis.mT @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)) @ basis
    core = basis @ scatter @ basis.mT - torch.diag(torch.tensor([0, 0, 0, 3e-5], dtype=torch.float64))
    vectors, values = nystrom(
        (basis @ scatter)[None], core[None], basis[None], torch.tensor([1e-6], dtype=torch.float64)
    )
    torch.testing.assert_close(values[0, :3], torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert vectors.isfinite().all()
