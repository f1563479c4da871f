"""KMeans against Lloyd's iterations written out in float64 numpy, and its promises one by one."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.cluster import KMeans, bounds, concentration, kmeans_assign
from fastproto.ops._dispatch import OPS
from fastproto.ops.assign import assign


def blobs(n: int = 400, k: int = 8, d: int = 24, spread: float = 0.3) -> Tensor:
    means = 3 * torch.randn(k, d)
    return means[torch.arange(n) % k] + spread * torch.randn(n, d)


def assert_same_bits(one: KMeans, other: KMeans) -> None:
    for name in ("cluster_centers_", "labels_", "counts_", "concentration_"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.history_ == other.history_
    assert one.inertia_ == other.inertia_


def oracle(x: Tensor, centers: Tensor, n_iter: int, spherical: bool, weights: Tensor | None) -> tuple:
    """Final centres, the objective at each iteration, labels and objective of the end. No empty clusters."""
    x, c = x.double().numpy(), centers.double().numpy()
    w = np.ones(len(x)) if weights is None else weights.double().numpy()
    if spherical:
        c = c / np.linalg.norm(c, axis=1, keepdims=True)
    history = []
    for iteration in range(n_iter + 1):
        values = np.array([c @ row if spherical else -((row - c) ** 2).sum(1) for row in x])
        labels = values.argmax(1)
        history.append((w * values.max(1)).sum() * (1 if spherical else -1))
        if iteration < n_iter:
            c = np.array([(w[labels == k, None] * x[labels == k]).sum(0) / w[labels == k].sum() for k in range(len(c))])
            if spherical:
                c = c / np.linalg.norm(c, axis=1, keepdims=True)
    return c, history[:-1], labels, history[-1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_lloyd(dtype: torch.dtype, spherical: bool, weighted: bool) -> None:
    x = blobs(spread=3).to(dtype)
    weights = torch.rand(len(x)) + 0.1 if weighted else None
    kmeans = KMeans(8, n_iter=3, init=x[:8], spherical=spherical).fit(x, sample_weight=weights)
    centers, history, labels, objective = oracle(x, x[:8], 3, spherical, weights)
    assert kmeans.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(kmeans.cluster_centers_.numpy(), centers, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kmeans.history_, history, rtol=1e-5)
    np.testing.assert_allclose(kmeans.inertia_, objective, rtol=1e-5)
    assert np.array_equal(kmeans.labels_.numpy(), labels)
    assert np.array_equal(kmeans.counts_.numpy(), np.bincount(labels, minlength=8))
    assert kmeans.n_iter_ == len(kmeans.history_) == 3
    expected = concentration(x, kmeans.labels_, kmeans.cluster_centers_)
    torch.testing.assert_close(kmeans.concentration_, expected.to(kmeans.concentration_.dtype))


@pytest.mark.parametrize("n", [1, 33, 507])
@pytest.mark.parametrize("d", [1, 96, 130])
def test_odd_sizes(n: int, d: int) -> None:
    x = torch.randn(n, d)
    for k in {1, min(n, 7), n}:
        kmeans = KMeans(k, n_iter=3).fit(x)
        assert kmeans.cluster_centers_.shape == (k, d)
        assert int(kmeans.counts_.sum()) == n
        if k == 1:
            torch.testing.assert_close(kmeans.cluster_centers_[0], x.mean(0), rtol=1e-5, atol=1e-6)
        if k == n:
            assert kmeans.inertia_ == 0
            assert kmeans.counts_.eq(1).all()


def test_finds_separate_clusters_and_stops_there() -> None:
    x = blobs(spread=0.01)
    kmeans = KMeans(8, init="k-means++", n_iter=50).fit(x)
    assert kmeans.n_iter_ < 50
    assert kmeans.counts_.eq(50).all()
    assert torch.equal(kmeans.labels_[:8].sort().values, torch.arange(8))
    assert torch.equal(kmeans.labels_, kmeans.labels_[:8].repeat(50))
    assert sorted(kmeans.history_, reverse=True) == kmeans.history_


def test_fit_ends_where_nothing_changes_any_more() -> None:
    x = blobs(spread=3)
    early = KMeans(8, n_iter=500).fit(x)
    assert early.n_iter_ < 500
    further = KMeans(8, n_iter=1, init=early.cluster_centers_).fit(x)
    assert torch.equal(further.cluster_centers_, early.cluster_centers_)


def test_tol_is_a_share_of_the_objective() -> None:
    x = blobs(spread=3)
    history = KMeans(8, n_iter=30).fit(x).history_
    kmeans = KMeans(8, n_iter=30, tol=0.01).fit(x)
    changes = [abs(b - a) / a for a, b in itertools.pairwise(history)]
    assert kmeans.n_iter_ == 2 + next(i for i, change in enumerate(changes) if change <= 0.01)
    assert kmeans.n_iter_ < len(history)
    assert kmeans.history_ == history[: kmeans.n_iter_]


@pytest.mark.parametrize("spherical", [False, True])
def test_n_init_keeps_the_best(spherical: bool) -> None:
    x = blobs(k=20, spread=0.1)
    runs = [KMeans(20, seed=1, n_iter=2, n_init=n, spherical=spherical).fit(x).inertia_ for n in range(1, 9)]
    assert runs == sorted(runs, reverse=not spherical)
    assert runs[-1] != runs[0]
    given = [KMeans(20, n_iter=4, n_init=n, init=x[:20]).fit(x).inertia_ for n in (1, 4)]
    assert given[0] == given[1]


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_same_seed_same_bits_whatever_the_threads(init: str) -> None:
    x, weights = torch.randn(3000, 24), torch.rand(3000)
    before = torch.get_num_threads()
    fits = []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        kmeans = KMeans(33, n_iter=4, n_init=2, init=init, seed=7, max_points_per_cluster=50)
        fits.append(kmeans.fit(x, sample_weight=weights))
    torch.set_num_threads(before)
    for fit in fits[1:]:
        assert_same_bits(fit, fits[0])
    other = KMeans(33, n_iter=4, init=init, seed=8).fit(x)
    assert not torch.equal(other.cluster_centers_, fits[0].cluster_centers_)


def test_global_random_state_is_neither_read_nor_touched() -> None:
    x = torch.randn(100, 3)
    first = KMeans(5).fit(x).cluster_centers_
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(5)
    expected = torch.randn(1)
    torch.manual_seed(5)
    assert torch.equal(KMeans(5).fit(x).cluster_centers_, first)
    assert torch.equal(torch.randn(1), expected)


def test_weights_count_rows() -> None:
    x = blobs(100, spread=2)
    times = torch.randint(0, 4, (100,))
    start = x[times > 0][:5]
    weighted = KMeans(5, init=start, n_iter=4).fit(x, sample_weight=times.float())
    repeated = KMeans(5, init=start, n_iter=4).fit(x.repeat_interleave(times, dim=0))
    torch.testing.assert_close(weighted.cluster_centers_, repeated.cluster_centers_)
    np.testing.assert_allclose(weighted.history_, repeated.history_, rtol=1e-6)
    as_array = KMeans(5, init=start, n_iter=4).fit(x, sample_weight=times.double().numpy())
    assert torch.equal(as_array.cluster_centers_, weighted.cluster_centers_)


def test_max_points_trains_on_a_part_and_assigns_all() -> None:
    x = torch.randn(1000, 8)
    kmeans = KMeans(5, n_iter=3, max_points_per_cluster=20, seed=2).fit(x)
    assert kmeans.labels_.shape == (1000,)
    assert int(kmeans.counts_.sum()) == 1000
    labels, distance = kmeans_assign(x, kmeans.cluster_centers_)
    assert torch.equal(kmeans.labels_, labels)
    np.testing.assert_allclose(kmeans.inertia_, distance.double().sum().item(), rtol=1e-6)
    # The objective of 100 rows, not of 1000.
    assert kmeans.history_[0] < kmeans.inertia_ / 5
    whole = KMeans(5, n_iter=3, seed=2).fit(x)
    assert torch.equal(KMeans(5, n_iter=3, seed=2, max_points_per_cluster=200).fit(x).labels_, whole.labels_)


def test_max_points_with_one_row_per_cluster_and_weights() -> None:
    x, weights = torch.randn(50, 3), torch.rand(50)
    kmeans = KMeans(6, max_points_per_cluster=1).fit(x, sample_weight=weights)
    assert kmeans.history_[0] == 0
    exact = "donot_use_mm_for_euclid_dist"
    assert (torch.cdist(kmeans.cluster_centers_, x, compute_mode=exact).min(1).values < 1e-6).all()


@pytest.mark.parametrize("kind", ["array", "half array", "backwards", "big-endian", "read-only", "memmap", "strided"])
def test_rows_of_any_kind(kind: str, tmp_path: Path) -> None:
    x = blobs(200).numpy()
    if kind == "half array":
        x = x.astype(np.float16)
    expected = KMeans(8, n_iter=4).fit(torch.from_numpy(x.copy()))
    rows: np.ndarray | Tensor = x
    if kind == "backwards":
        rows = np.ascontiguousarray(x[::-1])[::-1]
    elif kind == "big-endian":
        rows = x.astype(">f4")
    elif kind == "read-only":
        x.flags.writeable = False
    elif kind == "memmap":
        np.save(tmp_path / "x.npy", x)
        rows = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert isinstance(rows, np.memmap)
    elif kind == "strided":
        rows = torch.from_numpy(np.repeat(x, 2, axis=1).T.copy()).T[:, ::2]
    for chunk_rows in (None, 33):
        kmeans = KMeans(8, n_iter=4, chunk_rows=chunk_rows).fit(rows)
        assert_same_bits(kmeans, expected)
        assert torch.equal(kmeans.predict(rows), expected.labels_)
        torch.testing.assert_close(kmeans.transform(rows), expected.transform(x))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_chunks_change_no_bit(dtype: torch.dtype, init: str, spherical: bool) -> None:
    # Sums of rows this different in size come out another in every order, unless they are exact.
    x, weights = torch.randn(205, 24) * torch.logspace(-3, 3, 205)[:, None], torch.rand(205)
    options = {"init": init, "n_iter": 3, "spherical": spherical, "n_init": 2}
    whole = KMeans(6, **options).fit(x.to(dtype), sample_weight=weights)
    for chunk_rows in (1, 7, 200):
        assert_same_bits(KMeans(6, **options, chunk_rows=chunk_rows).fit(x.to(dtype), sample_weight=weights), whole)


def test_chunks_change_no_label_of_rows_full_of_ties() -> None:
    x = (torch.rand(300, 16) < 0.3).double()
    for seed in range(8):
        options = {"seed": seed, "n_iter": 3, "spherical": seed % 2 == 0}
        assert_same_bits(KMeans(40, **options, chunk_rows=7).fit(x), KMeans(40, **options).fit(x))


@pytest.mark.parametrize("size", [1e-170, 1e-308, 1e18])
def test_spherical_centers_have_unit_length_whatever_the_rows(size: float) -> None:
    kmeans = KMeans(2, spherical=True, n_iter=2).fit(torch.randn(20, 3, dtype=torch.float64) * size)
    torch.testing.assert_close(kmeans.cluster_centers_.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_predict_transform_and_fit_predict_agree() -> None:
    x, new = blobs(), blobs()
    kmeans = KMeans(8, n_iter=4)
    assert torch.equal(kmeans.fit_predict(x), kmeans.labels_)
    assert torch.equal(kmeans.predict(x), kmeans.labels_)
    distances = kmeans.transform(new)
    expected = (new[:, None].double() - kmeans.cluster_centers_.double()).norm(dim=2)
    torch.testing.assert_close(distances, expected.float())
    assert torch.equal(kmeans.predict(new), expected.argmin(1))
    assert kmeans.predict(x[:0]).shape == (0,)
    assert kmeans.transform(x[:0]).shape == (0, 8)
    assert torch.equal(KMeans(8, n_iter=4).fit_transform(x), kmeans.transform(x))


@pytest.mark.parametrize("spherical", [False, True])
def test_score_is_larger_where_centres_fit_better(spherical: bool) -> None:
    x, weights = blobs(), torch.linspace(0, 2, len(blobs()))
    kmeans = KMeans(8, n_iter=4, spherical=spherical).fit(x, sample_weight=weights)
    assert kmeans.score(x, sample_weight=weights) == pytest.approx(kmeans.inertia_ * (1 if spherical else -1), rel=1e-6)
    assert kmeans.score(x) == pytest.approx(kmeans.score(x, sample_weight=torch.ones(len(x))), rel=1e-12)
    assert kmeans.score(x) > KMeans(2, n_iter=4, spherical=spherical).fit(x).score(x)
    with pytest.raises(ValueError, match=r"KMeans.score: sample_weight expected .*\(5,\)"):
        kmeans.score(x, sample_weight=torch.ones(5))


def test_transform_keeps_the_digits_of_offset_data() -> None:
    x = torch.randn(50, 8).double() * 1e-3 + 1e4
    kmeans = KMeans(4).fit(x)
    expected = (x[:, None] - kmeans.cluster_centers_).norm(dim=2)
    torch.testing.assert_close(kmeans.transform(x), expected, rtol=1e-9, atol=0)


def test_transform_of_float32_is_right_to_a_small_share_of_the_spread() -> None:
    centers = torch.randn(50, 24) + 1e3
    kmeans = KMeans(50, init=centers).fit(centers)
    near = centers + 1e-3 * torch.randn(50, 24)
    expected = (near[:, None].double() - kmeans.cluster_centers_.double()).norm(dim=2)
    torch.testing.assert_close(kmeans.transform(near).double(), expected, rtol=1e-6, atol=1e-6)
    assert kmeans.transform(centers).diagonal().max() < 1e-6


def test_rows_of_centers_are_unit_when_spherical() -> None:
    x = torch.randn(300, 24)
    kmeans = KMeans(10, spherical=True, n_iter=5, init="k-means++").fit(x)
    torch.testing.assert_close(kmeans.cluster_centers_.norm(dim=1), torch.ones(10))
    assert sorted(kmeans.history_) == kmeans.history_


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("kind", ["zeros", "equal", "few distinct", "as many as clusters", "huge", "tiny"])
def test_degenerate_data_gives_finite_centers(kind: str, init: str, spherical: bool) -> None:
    x = {
        "zeros": torch.zeros(30, 4),
        "equal": torch.ones(30, 4),
        "few distinct": torch.randn(3, 4).repeat(10, 1),
        "as many as clusters": torch.randn(7, 4),
        "huge": torch.randn(30, 4) * 1e15,
        "tiny": torch.randn(30, 4) * 1e-20,
    }[kind]
    kmeans = KMeans(7, init=init, spherical=spherical, n_iter=5, n_init=2).fit(x)
    assert kmeans.cluster_centers_.isfinite().all()
    assert kmeans.concentration_.isfinite().all()
    assert (kmeans.concentration_ > 0).all()
    assert int(kmeans.counts_.sum()) == len(x)
    if kind == "zeros":
        assert kmeans.labels_.eq(0).all()


def test_empty_keep_leaves_a_center_and_split_moves_it() -> None:
    x = torch.randn(100, 5)
    start = torch.cat([x[:3], torch.full((1, 5), 1e3)])
    kept = KMeans(4, init=start, n_iter=3, empty="keep").fit(x)
    assert torch.equal(kept.cluster_centers_[3], start[3])
    assert int(kept.counts_[3]) == 0
    split = KMeans(4, init=start, n_iter=3, empty="split").fit(x)
    assert (split.counts_ > 0).all()
    assert split.inertia_ < kept.inertia_


def test_an_all_zero_weight_cluster_is_empty() -> None:
    x = torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 100])
    weights = torch.cat([torch.ones(50), torch.zeros(50)]) / 1000
    kmeans = KMeans(4, init=torch.cat([x[:2], x[-2:]]), n_iter=5).fit(x, sample_weight=weights)
    assert kmeans.cluster_centers_.abs().max() < 10


def test_bounds_of_one_fit_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    searches: list[bounds.Search] = []

    def search(self: KMeans) -> bounds.Search:
        held.append(sum(len(search.bounds) for search in searches))
        searches.append(bounds.Search("l2"))
        return searches[-1]

    monkeypatch.setattr(KMeans, "_search", search)
    kmeans = KMeans(20, n_init=3, max_points_per_cluster=40).fit(blobs(2000, 20))
    assert held == [0, 0, 0, 0]
    assert kmeans.n_distances_ == sum(search.tried for search in searches)
    if OPS["assign"].choose("cpu") == "cpp":
        assert searches[-1].bounds


def test_fast_errs_by_no_more_than_it_says() -> None:
    x, centers = torch.randn(2000, 64), torch.randn(500, 64)
    centers[250:] = centers[:250] + 1e-3 * torch.randn(250, 64)
    labels, distance = kmeans_assign(x, centers)
    fast_labels, fast = kmeans_assign(x, centers, precision="fast")
    if OPS["assign"].choose("cpu") == "cpp":
        assert not torch.equal(fast_labels, labels)
    # Around 0, which is as good as any point amid these centres, up to a factor of 2.
    assert (fast - distance <= 2 * 2**-9 * x.norm(dim=1) * centers.norm(dim=1).max()).all()
    torch.testing.assert_close(fast, (x - centers[fast_labels]).square().sum(1))


def test_device_names_where_to_compute() -> None:
    x = blobs(100)
    assert torch.equal(KMeans(8, device="cpu").fit(x).cluster_centers_, KMeans(8).fit(x).cluster_centers_)


def test_progress_does_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    x, quiet = torch.randn(100, 3), KMeans(4, n_iter=2)
    with pytest.warns(UserWarning, match="no progress is shown: tqdm is not installed"):
        told = KMeans(4, n_iter=2, progress=True).fit(x)
    assert torch.equal(told.labels_, quiet.fit(x).labels_)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x = blobs(100)
    KMeans(8, n_iter=2).fit(x)
    assert capsys.readouterr().err == ""
    KMeans(8, n_iter=2, progress=True).fit(x)
    shown = capsys.readouterr().err
    assert "k-means, 8 clusters" in shown
    assert "objective" in shown


def test_rows_that_require_a_gradient() -> None:
    x = blobs(100).requires_grad_()
    kmeans = KMeans(8, init="k-means++", n_iter=2, max_points_per_cluster=5).fit(x)
    assert not kmeans.cluster_centers_.requires_grad
    assert not kmeans.transform(x).requires_grad


def test_kmeans_assign_metrics() -> None:
    x, centers = torch.randn(33, 24), torch.randn(7, 24)
    labels, distance = kmeans_assign(x, centers)
    squared = (x[:, None].double() - centers.double()).square().sum(2)
    assert torch.equal(labels, squared.argmin(1))
    torch.testing.assert_close(distance, squared.min(1).values.float())
    labels, product = kmeans_assign(x, centers, metric="ip")
    products = x.double() @ centers.double().T
    assert torch.equal(labels, products.argmax(1))
    torch.testing.assert_close(product, products.max(1).values.float())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = blobs()
    options = {"n_iter": 4, "n_init": 2, "init": "k-means++"}
    expected, whole = KMeans(8, **options).fit(x), KMeans(8, **options).fit(x.cuda())
    for rows, device in ((x.cuda(), None), (x, "cuda"), (x.numpy(), "cuda")):
        kmeans = KMeans(8, **options, device=device, chunk_rows=150).fit(rows)
        for name in ("cluster_centers_", "concentration_"):
            assert torch.equal(getattr(kmeans, name), getattr(whole, name))
        assert (kmeans.history_, kmeans.inertia_) == (whole.history_, whole.inertia_)
        assert kmeans.cluster_centers_.is_cuda
        assert kmeans.labels_.is_cuda == (device is None)
        assert torch.equal(kmeans.labels_.cpu(), expected.labels_)
        torch.testing.assert_close(kmeans.cluster_centers_.cpu(), expected.cluster_centers_)
        assert torch.equal(kmeans.predict(rows).cpu(), expected.labels_)


def test_a_fast_fit_searches_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def watched(x: Tensor, centers: Tensor, metric: str = "l2", exact: bool = True) -> tuple[Tensor, Tensor]:
        asked.append(exact)
        return assign(x, centers, metric, exact)

    monkeypatch.setattr(bounds, "assign", watched)
    x = torch.randn(500, 16)
    exact = KMeans(20, n_iter=3).fit(x)
    assert all(asked)
    asked.clear()
    fast = KMeans(20, n_iter=3, precision="fast").fit(x)
    assert asked == [False] * (fast.n_iter_ + 1)
    np.testing.assert_allclose(fast.inertia_, exact.inertia_, rtol=1e-3)


def test_a_negated_view_is_its_numbers() -> None:
    x = torch.randn(600, 1, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0)).conj().imag
    assert x.is_neg()
    ours, plain = KMeans(5).fit(x), KMeans(5).fit(x.resolve_neg())
    assert torch.equal(ours.labels_, plain.labels_) and ours.inertia_ == plain.inertia_


def test_a_subclass_that_hands_on_its_options_has_them_as_parameters() -> None:
    class Mine(KMeans):
        def __init__(self, n_clusters: int, extra: float = 1.5, **options: Any) -> None:
            super().__init__(n_clusters, **options)
            self.extra = extra

    mine = Mine(3, n_iter=7)
    assert mine.get_params() == KMeans(3, n_iter=7).get_params() | {"extra": 1.5}
    assert repr(mine) == "Mine(n_clusters=3, n_iter=7)"
    assert mine.set_params(n_iter=9, extra=2.0).get_params()["n_iter"] == 9
    assert mine.extra == 2.0
