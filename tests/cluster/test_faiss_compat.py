"""faiss_compat.Kmeans and engine="faiss" beside the installed faiss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastproto.cluster import KMeans
from fastproto.cluster.faiss_compat import Kmeans

faiss = pytest.importorskip("faiss")


def clustered(n: int = 2000, k: int = 40, d: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (3 * rng.normal(size=(k, d))[rng.integers(k, size=n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("k", [1, 33, 100])
def test_objective_is_that_of_faiss_from_the_same_start(k: int, spherical: bool) -> None:
    x = clustered()
    options = {"niter": 10, "spherical": spherical, "min_points_per_centroid": 1, "max_points_per_centroid": 10_000}
    theirs, ours = faiss.Kmeans(24, k, **options), Kmeans(24, k, **options)
    expected = theirs.train(x, init_centroids=x[:k])
    objective = ours.train(x, init_centroids=x[:k])
    if spherical:
        assert objective >= expected / 1.001
    else:
        assert objective <= 1.001 * expected
    assert objective == ours.obj[-1]
    common = min(4, len(ours.obj), len(theirs.obj))
    np.testing.assert_allclose(ours.obj[:common], theirs.obj[:common], rtol=1e-4)
    assert np.median(np.abs(ours.centroids - theirs.centroids)) < 1e-4


def test_interface_is_that_of_faiss() -> None:
    x = clustered()
    theirs = faiss.Kmeans(24, 10, niter=5, nredo=1, seed=3, verbose=False, gpu=False)
    ours = Kmeans(24, 10, niter=5, nredo=1, seed=3, verbose=False, gpu=False)
    assert ours.centroids is None
    assert ours.obj is None
    assert ours.index.ntotal == 0
    for kmeans in (theirs, ours):
        assert isinstance(kmeans.train(x), float)
    assert (ours.d, ours.k, ours.index.d, ours.index.ntotal) == (24, 10, 24, 10)
    assert ours.centroids.shape == theirs.centroids.shape
    assert ours.centroids.dtype == theirs.centroids.dtype
    assert ours.obj.shape == theirs.obj.shape
    for one, other in zip(ours.index.search(x, 1), theirs.index.search(x, 1), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
    for one, other in zip(ours.assign(x), theirs.assign(x), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype


@pytest.mark.parametrize("spherical", [False, True])
def test_search_and_assign_find_the_nearest_centroid(spherical: bool) -> None:
    x = clustered()
    kmeans = Kmeans(24, 10, niter=3, spherical=spherical)
    kmeans.train(x)
    products = x @ kmeans.centroids.T
    expected = products if spherical else ((x[:, None] - kmeans.centroids) ** 2).sum(2)
    distances, indices = kmeans.index.search(x, 1)
    assert np.array_equal(indices[:, 0], expected.argmax(1) if spherical else expected.argmin(1))
    np.testing.assert_allclose(distances[:, 0], expected.max(1) if spherical else expected.min(1), rtol=1e-4)
    assert np.array_equal(kmeans.assign(x)[1], indices[:, 0])
    assert np.array_equal(kmeans.assign(x)[0], distances[:, 0])
    assert kmeans.index.search(x[:0], 1)[1].shape == (0, 1)


def test_weights_subset_seed_and_redo() -> None:
    x, weights = clustered(), np.random.default_rng(1).random(2000)
    first, again, other = (Kmeans(24, 10, seed=seed, max_points_per_centroid=50) for seed in (1, 1, 2))
    objectives = [kmeans.train(x, weights=weights) for kmeans in (first, again, other)]
    assert objectives[0] == objectives[1] != objectives[2]
    assert np.array_equal(first.centroids, again.centroids)
    plain = Kmeans(24, 10, seed=1, max_points_per_centroid=50)
    plain.train(x)
    assert not np.array_equal(plain.centroids, first.centroids)
    expected = KMeans(10, n_iter=25, n_init=3, seed=1).fit(x)
    redone = Kmeans(24, 10, seed=1, nredo=3)
    redone.train(x)
    assert np.array_equal(redone.centroids, expected.cluster_centers_.numpy())


def test_takes_what_becomes_float32() -> None:
    x = clustered(500)
    expected, kmeans = Kmeans(24, 5, niter=3), Kmeans(24, 5, niter=3)
    expected.train(x)
    kmeans.train(x.astype(np.float64))
    assert np.array_equal(kmeans.centroids, expected.centroids)


def test_too_few_points_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="please provide at least 390 training vectors for 10 centroids, got 100"):
        Kmeans(24, 10).train(clustered(100))
    Kmeans(24, 10, min_points_per_centroid=10).train(clustered(100))


def test_verbose_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    Kmeans(24, 5, niter=2, verbose=True).train(clustered(500))
    assert "k-means, 5 clusters" in capsys.readouterr().err


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(500)
    with pytest.raises(ValueError, match=r"KMeans: n_clusters expected an integer of at least 1, got int 0"):
        Kmeans(24, 0)
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans: d expected at least 1, got int 0"):
        Kmeans(0, 5)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'progressive_dim_steps'"):
        Kmeans(24, 5, progressive_dim_steps=3)
    kmeans = Kmeans(24, 5)
    with pytest.raises(RuntimeError, match=r"faiss_compat.Kmeans.index.search: call train first"):
        kmeans.assign(x)
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans.train: x expected \(N, 24\), got float32 array"):
        kmeans.train(x[:, :23])
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans.train: x expected finite rows, got 1 with NaN"):
        kmeans.train(np.where(x == x[3, 3], np.nan, x))
    with pytest.raises(ValueError, match=r"KMeans: init expected \(5, D\), got float32 \(4, 24\) on cpu"):
        kmeans.train(x, init_centroids=x[:4])
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans.train: sample_weight expected \(500,\)"):
        kmeans.train(x, weights=np.ones(499))
    kmeans.train(x)
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans.index.search: k expected 1, got int 2"):
        kmeans.index.search(x, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans: gpu expected False where torch finds no CUDA device"):
        Kmeans(24, 5, gpu=True)


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_engine_faiss_runs_the_same_estimator(weighted: bool, spherical: bool, init: str) -> None:
    x = clustered()
    weights = torch.rand(2000) / 100 if weighted else None
    options = {"n_iter": 5, "init": init, "spherical": spherical, "max_points_per_cluster": 50, "seed": 4}
    ours = KMeans(33, **options).fit(x, weights)
    theirs = KMeans(33, engine="faiss", **options).fit(x, weights)
    assert (ours.labels_ == theirs.labels_).float().mean() > 0.98
    np.testing.assert_allclose(theirs.inertia_, ours.inertia_, rtol=1e-3)
    if not weighted:
        np.testing.assert_allclose(theirs.history_, ours.history_, rtol=1e-3)
    assert theirs.cluster_centers_.dtype == torch.float32


def test_engine_faiss_refuses_what_it_cannot() -> None:
    with pytest.raises(ValueError, match=r'KMeans: empty expected "split" for engine "faiss", got keep'):
        KMeans(3, engine="faiss", empty="keep")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = clustered()
    expected, kmeans = Kmeans(24, 10), Kmeans(24, 10, gpu=True)
    expected.train(x)
    kmeans.train(x)
    np.testing.assert_allclose(kmeans.centroids, expected.centroids, rtol=1e-4, atol=1e-5)
    assert isinstance(kmeans.index.search(x, 1)[0], np.ndarray)
    with pytest.raises(ValueError, match=r'engine expected "fastproto" on a GPU, got faiss'):
        KMeans(3, engine="faiss").fit(torch.from_numpy(x).cuda())
