"""assign against a loop over rows in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastproto
from fastproto.ops.assign import assign
from fastproto.reference import assign as reference


def oracle(x: Tensor, centers: Tensor, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and all distances, from the formula, row by row."""
    c = centers.double().numpy()
    rows = [((row - c) ** 2).sum(1) if metric == "l2" else c @ row for row in x.double().numpy()]
    distances = np.array(rows).reshape(len(x), len(c))
    labels = distances.argmin(1) if metric == "l2" else distances.argmax(1)
    return labels, distances


def check(x: Tensor, centers: Tensor, metric: str, rounding: float = 1e-7) -> None:
    labels, distance = assign(x, centers, metric)
    expected, distances = oracle(x, centers, metric)
    assert labels.dtype == torch.int64
    assert distance.dtype == torch.float32
    picked = distances[np.arange(len(x)), labels.numpy()]
    best = distances[np.arange(len(x)), expected]
    np.testing.assert_allclose(distance.numpy(), picked, rtol=1e-6, atol=1e-12)
    differs = labels.numpy() != expected
    assert (np.abs(picked - best)[differs] <= rounding * np.abs(best)[differs]).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 24), (100, 1, 96), (33, 10, 130), (0, 5, 3)])
def test_matches_the_formula(n: int, k: int, d: int, dtype: torch.dtype, metric: str) -> None:
    check(torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype), metric)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["offset", "near-duplicates", "unit", "heavy tails", "far outlier", "clusters"])
def test_hard_data(kind: str, metric: str) -> None:
    x, centers = torch.randn(300, 48), torch.randn(70, 48)
    if kind == "offset":
        x, centers = x + 1e4, centers + 1e4
    elif kind == "near-duplicates":
        centers = centers[:7].repeat(10, 1) + 1e-5 * torch.randn(70, 48)
        x = centers[torch.randint(70, (300,))] + 1e-5 * torch.randn(300, 48)
    elif kind == "unit":
        x, centers = torch.nn.functional.normalize(x), torch.nn.functional.normalize(centers)
    elif kind == "heavy tails":
        x, centers = x / torch.rand(300, 1) ** 3, centers / torch.rand(70, 1) ** 3
    elif kind == "far outlier":
        centers[3] = 1e7
    else:
        centers = centers * 100
        x = centers[torch.randint(70, (300,))] + 0.1 * x
    check(x, centers, metric)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("tiny", [1e-22, 1e-29, 1e-31, 1e-34, 1e-38, 1e-44])
def test_numbers_whose_squares_or_inverses_leave_float32(tiny: float, metric: str) -> None:
    x, centers = torch.randn(100, 24), torch.randn(30, 24)
    check(tiny * x, tiny * centers, metric)
    x[::3] *= tiny
    check(x, tiny * centers, metric)
    # The origin is amid the centres: with most of them tiny it is tiny, and so are some rows less the origin.
    centers[5:] *= tiny
    check(x, centers, metric)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_ties_go_to_the_lowest_index(metric: str) -> None:
    # Six copies of 33: a matrix product computes its last columns by other code, so that copies differ in rounding.
    centers = torch.randn(33, 130).repeat(6, 1)
    x = torch.cat([centers[:33], torch.randn(200, 130)])
    labels, _ = assign(x, centers, metric)
    assert int(labels.max()) < 33
    labels, _ = assign(x, centers[:1].expand(507, -1), metric)
    assert labels.eq(0).all()


def test_a_row_between_two_centers_goes_to_the_first() -> None:
    labels, distance = assign(torch.zeros(1, 3), torch.tensor([[5.0, 0, 0], [0, 1, 0], [0, 0, -1], [1, 0, 0]]))
    assert labels.item() == 1
    assert distance.item() == 1


def test_a_row_on_its_center_is_at_distance_zero() -> None:
    centers = torch.randn(507, 96) + 100
    labels, distance = assign(centers, centers)
    assert torch.equal(labels, torch.arange(507))
    assert distance.eq(0).all()


@given(
    x=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=20),
    centers=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=9),
    metric=st.sampled_from(["l2", "ip"]),
)
@settings(max_examples=60, deadline=None)
def test_on_a_grid_full_of_ties_labels_are_the_first_best(x: list, centers: list, metric: str) -> None:
    x, centers = torch.tensor(x, dtype=torch.float32), torch.tensor(centers, dtype=torch.float32)
    assert np.array_equal(assign(x, centers, metric)[0].numpy(), oracle(x, centers, metric)[0])


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_crowd_far_from_the_origin_is_told_apart_in_float64(metric: str) -> None:
    """Products round the nearest centres together, be they in float64: all that may be the nearest are looked at."""
    near = 1e-5 * torch.randn(40, 16, dtype=torch.float64)
    centers = torch.cat([near, torch.randn(50, 16, dtype=torch.float64) + 1e4])
    x = near if metric == "l2" else torch.randn(40, 16, dtype=torch.float64)
    with fastproto.backend("reference"):
        labels, distance = assign(x, centers, metric)
        parts = [assign(part, centers, metric) for part in x.split(7)]
    expected, distances = oracle(x, centers, metric)
    assert np.array_equal(labels.numpy(), expected)
    np.testing.assert_allclose(distance.numpy(), distances[np.arange(40), expected], rtol=1e-6)
    for whole, part in zip((labels, distance), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(part))


def test_more_ties_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", 500)
    centers = torch.randn(3, 24, dtype=torch.float64).repeat_interleave(30, 0)
    x = torch.randn(20, 24, dtype=torch.float64)
    assert torch.equal(assign(x, centers)[0], assign(x, centers[::30])[0] * 30)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centers = torch.randn(200, 24), torch.randn(33, 24)
    whole = assign(x, centers)
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", 33 * 7)
    for one, other in zip(whole, assign(x, centers), strict=True):
        assert torch.equal(one, other)


def test_threads_change_nothing() -> None:
    x, centers = torch.randn(5000, 96), torch.randn(100, 96)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(assign(x, centers))
    torch.set_num_threads(before)
    for labels, distance in results[1:]:
        assert torch.equal(labels, results[0][0])
        assert torch.equal(distance, results[0][1])


def test_any_strides() -> None:
    x, centers = torch.randn(24, 66), torch.randn(60, 24)
    expected = assign(x.T[::2].contiguous(), centers[::3].contiguous())
    for one, other in zip(expected, assign(x.T[::2], centers[::3]), strict=True):
        assert torch.equal(one, other)
    labels, _ = assign(torch.randn(1, 24).expand(33, -1), centers)
    assert labels.unique().numel() == 1


def test_rows_of_nan_harm_no_others() -> None:
    x, centers = torch.randn(33, 24), torch.randn(10, 24)
    expected, _ = assign(x, centers)
    x[5] = torch.nan
    labels, distance = assign(x, centers)
    assert distance[5].isnan()
    assert 0 <= int(labels[5]) < 10
    others = torch.arange(33) != 5
    assert torch.equal(labels[others], expected[others])
    assert distance[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiler_knows_what_comes(dtype: torch.dtype) -> None:
    x, centers = torch.randn(40, 24, dtype=dtype), torch.randn(5, 24, dtype=dtype)
    torch.library.opcheck(torch.ops.fastproto.assign.default, (x, centers, "l2", True))
    with fastproto.backend("reference"):
        torch.library.opcheck(torch.ops.fastproto.assign.default, (x, centers, "ip", False))


def test_no_gradient() -> None:
    _, distance = assign(torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True))
    assert not distance.requires_grad


def test_autocast_changes_nothing() -> None:
    x, centers = torch.randn(100, 24), torch.randn(33, 24)
    expected = assign(x, centers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = assign(x, centers)
    assert torch.equal(inside[0], expected[0])
    assert torch.equal(inside[1], expected[1])


def test_bad_input() -> None:
    x, centers = torch.randn(5, 3), torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"assign: x expected a float32 .* tensor \(N, D\), got int64 \(5, 3\) on cpu"):
        assign(x.long(), centers)
    with pytest.raises(TypeError, match=r"assign: centers expected a float32 .* got list"):
        assign(x, [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"assign: x expected \(N, D\), got float32 \(3,\) on cpu"):
        assign(x[0], centers)
    with pytest.raises(ValueError, match=r"assign: centers expected \(K, 3\) on cpu, got float32 \(2, 2\) on cpu"):
        assign(x, centers[:, :2])
    with pytest.raises(ValueError, match="assign: centers expected at least one centre of at least one dimension"):
        assign(x, centers[:0])
    with pytest.raises(ValueError, match='assign: metric expected "l2" or "ip", got cosine'):
        assign(x, centers, "cosine")


def test_backend_that_cannot_run() -> None:
    with fastproto.backend("reference"):
        assign(torch.randn(5, 3), torch.randn(2, 3))
    with fastproto.backend("cuda"), pytest.raises(RuntimeError, match="assign: backend 'cuda' cannot run on cpu"):
        assign(torch.randn(5, 3), torch.randn(2, 3))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x, centers = torch.randn(2000, 96), torch.randn(507, 96).repeat(2, 1)
    expected, distances = assign(x, centers)
    labels, distance = assign(x.cuda(), centers.cuda())
    assert torch.equal(labels.cpu(), expected)
    torch.testing.assert_close(distance.cpu(), distances)
