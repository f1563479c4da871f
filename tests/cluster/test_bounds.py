"""Bounds against full searches, iteration by iteration: the same bits, from fewer distances."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastproto import _native
from fastproto.cluster import KMeans
from fastproto.cluster.bounds import Bounds, Search
from fastproto.ops.assign import assign
from fastproto.ops.update import update

pytestmark = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)


@pytest.fixture(params=[] if _native.cpp is None else _native.cpp.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.cpp.isa()
    _native.cpp.set_isa(request.param)
    yield request.param
    _native.cpp.set_isa(before)


def blobs(rows: int, clusters: int, dim: int, spread: float) -> Tensor:
    centers = torch.randn(clusters, dim)
    return centers[torch.randint(clusters, (rows,))] + spread * torch.randn(rows, dim)


def data(kind: str) -> Tensor:
    x = blobs(3000, 150, 12, 0.2)
    match kind:
        case "gaussian":
            x = torch.randn(3000, 12)
        case "offset":
            x = x + 1e3
        case "unit":
            x = torch.nn.functional.normalize(x)
        case "few distinct rows":
            x = x[:90].repeat(34, 1)
        case "half":
            x = x.half()
        case "odd sizes":
            x = x[:2987, :7]
        case "one far row":
            x[5] = 1e6
    return x


@pytest.mark.parametrize(
    "kind", ["blobs", "gaussian", "offset", "unit", "few distinct rows", "half", "odd sizes", "one far row"]
)
def test_every_iteration_finds_what_a_full_search_finds(isa: str, kind: str) -> None:
    x = data(kind)
    centers = x[torch.randperm(len(x))[:200]].float()
    bounds = Bounds()
    for iteration in range(12):
        labels, distance = bounds.assign(x, centers)
        expected_labels, expected_distance = assign(x, centers)
        assert torch.equal(labels, expected_labels), iteration
        assert torch.equal(distance, expected_distance), iteration
        sums, counts = update(x, labels, 200)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None], centers.double()).float()
        if iteration == 6:  # a centre that jumps, as one that was given half of another cluster
            centers[17] = centers[3] * 1.001


def test_blobs_are_searched_in_part(isa: str) -> None:
    x = blobs(5000, 400, 16, 0.1)
    centers = x[torch.randperm(len(x))[:400]]
    bounds, tried = Bounds(), []
    for _ in range(10):
        before = bounds.tried
        labels, _ = bounds.assign(x, centers)
        tried.append(bounds.tried - before)
        sums, counts = update(x, labels, 400)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None], centers.double()).float()
    assert tried[0] == 5000 * 400
    assert tried[-1] < tried[0] / 3


def test_rows_of_nan_are_tried_against_everything(isa: str) -> None:
    x = blobs(500, 30, 6, 0.1)
    x[77] = torch.nan
    centers = x[:60].clone()
    bounds = Bounds()
    for _ in range(4):
        labels, distance = bounds.assign(x, centers)
        expected_labels, expected_distance = assign(x, centers)
        assert torch.equal(labels, expected_labels)
        torch.testing.assert_close(distance, expected_distance, rtol=0, atol=0, equal_nan=True)
        centers = centers + 1e-3 * torch.randn_like(centers)


@pytest.mark.parametrize("options", [{}, {"n_init": 2}, {"chunk_rows": 999}, {"max_points_per_cluster": 20}])
def test_a_fit_with_bounds_is_the_fit_without(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    x = blobs(4000, 100, 32, 0.3)
    bounded = KMeans(100, n_iter=8, **options).fit(x)
    monkeypatch.setattr(Search, "_bounded", lambda *_: False)
    full = KMeans(100, n_iter=8, **options).fit(x)
    assert torch.equal(bounded.cluster_centers_, full.cluster_centers_)
    assert torch.equal(bounded.labels_, full.labels_)
    assert bounded.history_ == full.history_
    assert bounded.inertia_ == full.inertia_
    assert bounded.n_distances_ < full.n_distances_


def test_distances_of_a_fit_without_bounds_are_all_pairs_of_every_pass() -> None:
    x = blobs(500, 10, 6, 0.3)
    fit = KMeans(10, n_iter=3, spherical=True).fit(x)
    assert fit.n_distances_ == 500 * 10 * (fit.n_iter_ + 1)


def test_where_bounds_exclude_nothing_each_pass_but_the_first_tries_the_own_centre_beside() -> None:
    fit = KMeans(40, n_iter=3).fit(torch.randn(1000, 64))
    assert 1000 * 40 * 4 < fit.n_distances_ <= 1000 * (40 + 3 * 41)


def test_bounds_stay_small_beside_the_rows() -> None:
    search = Search("l2")
    x, centers = torch.randn(64, 2), torch.randn(5000, 2)
    for _ in range(3):
        search.nearest(0, x, centers)
    assert not search.bounds


def test_how_much_is_searched_does_not_depend_on_the_threads(isa: str) -> None:
    """Nor which panels are tried in 8 bits, where a heavy dimension makes these give way."""
    x = torch.randn(2000, 32) * torch.tensor([300.0] + [1.0] * 31)
    start, threads = x[:100].clone(), torch.get_num_threads()
    counts = set()
    for count in (1, 3, 7):
        torch.set_num_threads(count)
        counts.add(KMeans(100, n_iter=8, init=start).fit(x).n_distances_)
    torch.set_num_threads(threads)
    assert len(counts) == 1
