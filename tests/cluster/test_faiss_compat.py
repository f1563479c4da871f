"""faiss_compat.Kmeans and engine="faiss" beside the installed faiss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastproto.cluster.faiss_compat as compat
from fastproto.cluster import KMeans
from fastproto.cluster.faiss_compat import Kmeans

faiss = pytest.importorskip("faiss")


def clustered(n: int = 2000, k: int = 40, d: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (3 * rng.normal(size=(k, d))[rng.integers(k, size=n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("data", ["clustered", "gaussian"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("k", [1, 33, 100])
def test_objective_is_that_of_faiss_from_the_same_start(k: int, spherical: bool, data: str) -> None:
    x = clustered() if data == "clustered" else np.random.default_rng(0).normal(size=(2000, 24)).astype(np.float32)
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


def pcl_clusters(faiss: Any, index: Any, x: np.ndarray, k: int, start: np.ndarray | None, **settings: Any) -> dict:
    """What PCL's and DeepCluster's scripts ask of faiss: centroids, assignments, distances and losses."""
    clus = faiss.Clustering(x.shape[1], k)
    for name, value in settings.items():
        getattr(clus, name)
        setattr(clus, name, value)
    if start is not None:
        faiss.copy_array_to_vector(start.ravel(), clus.centroids)
    clus.train(x, index)
    distance, assigned = index.search(x, 1)
    losses = [clus.iteration_stats.at(i).obj for i in range(clus.iteration_stats.size())]
    splits = [clus.iteration_stats.at(i).nsplit for i in range(clus.iteration_stats.size())]
    imbalance = [clus.iteration_stats.at(i).imbalance_factor for i in range(clus.iteration_stats.size())]
    return {
        "centroids": faiss.vector_to_array(clus.centroids).reshape(k, x.shape[1]),
        "labels": np.array([int(row[0]) for row in assigned]),
        "distance": distance,
        "losses": np.array(losses),
        "splits": splits,
        "imbalance": imbalance,
    }


PCL = {"verbose": False, "niter": 20, "nredo": 5, "seed": 0, "max_points_per_centroid": 1000}


@pytest.mark.parametrize("spherical", [False, True])
def test_pcl_scripts_run_with_one_import_changed(spherical: bool) -> None:
    # Without clusters all optima are about equally good, whatever the start.
    x = np.random.default_rng(0).normal(size=(2000, 24)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    name = "IndexFlatIP" if spherical else "IndexFlatL2"
    settings = PCL | {"min_points_per_centroid": 10, "spherical": spherical}
    theirs, ours = (pcl_clusters(lib, getattr(lib, name)(24), x, 40, None, **settings) for lib in (faiss, compat))
    for key, value in theirs.items():
        assert np.shape(ours[key])[1:] == np.shape(value)[1:], key
        assert np.asarray(ours[key]).dtype == np.asarray(value).dtype, key
    np.testing.assert_allclose(ours["distance"].sum(), theirs["distance"].sum(), rtol=5e-3)


@pytest.mark.parametrize("spherical", [False, True])
def test_pcl_scripts_find_the_same_from_the_same_start(spherical: bool) -> None:
    x = clustered()
    start = x[:40].copy()
    # One centroid that no vector is nearest to.
    start[7] = -1000 * np.abs(x).max(0) if not spherical else -x.mean(0)
    name = "IndexFlatIP" if spherical else "IndexFlatL2"
    settings = PCL | {"min_points_per_centroid": 10, "spherical": spherical, "nredo": 1, "niter": 4}
    theirs, ours = (pcl_clusters(lib, getattr(lib, name)(24), x, 40, start, **settings) for lib in (faiss, compat))
    assert ours["splits"] == theirs["splits"]
    np.testing.assert_allclose(ours["imbalance"], theirs["imbalance"], rtol=1e-6)
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
    np.testing.assert_allclose(ours["centroids"], theirs["centroids"], rtol=1e-4, atol=1e-4)
    assert np.array_equal(ours["labels"], theirs["labels"])
    np.testing.assert_allclose(ours["distance"], theirs["distance"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("eigen_power", [-0.5, 0.0])
def test_pca_matrix_is_that_of_faiss(eigen_power: float) -> None:
    x = clustered() * np.geomspace(1, 30, 24, dtype=np.float32)
    theirs, ours = faiss.PCAMatrix(24, 7, eigen_power), compat.PCAMatrix(24, 7, eigen_power=eigen_power)
    for matrix in (theirs, ours):
        assert not matrix.is_trained
        matrix.train(x)
        assert matrix.is_trained
    expected, found = theirs.apply_py(x[:500]), ours.apply_py(x[:500])
    assert found.dtype == expected.dtype
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, rtol=1e-3, atol=2e-4 * expected.std())
    np.testing.assert_allclose(ours.eigenvalues, faiss.vector_to_array(theirs.eigenvalues), rtol=1e-4)
    np.testing.assert_allclose(ours.mean, faiss.vector_to_array(theirs.mean), rtol=1e-4, atol=1e-4)
    assert np.array_equal(found, ours.apply(x[:500]))


def test_pca_matrix_refuses_what_it_cannot() -> None:
    x, matrix = clustered(), compat.PCAMatrix(24, 7)
    with pytest.raises(RuntimeError, match=r"faiss_compat.PCAMatrix.apply: call train first"):
        matrix.apply_py(x)
    with pytest.raises(ValueError, match=r"PCAMatrix.train: x expected \(N, 24\), got float32 array \(2000, 23\)"):
        matrix.train(x[:, :23])
    with pytest.raises(ValueError, match=r"PCAMatrix.train: x expected finite rows, got 1 .* the first at index 3"):
        matrix.train(np.where(x == x[3, 3], np.nan, x))
    for size, got in ((25, "int 25"), (0, "int 0"), (2.0, "float 2.0"), ("a", "a")):
        with pytest.raises(ValueError, match=rf"PCAMatrix: d_out expected an integer in 1 \.\.\. 24, got {got}"):
            compat.PCAMatrix(24, size)
    with pytest.raises(ValueError, match=r"PCAMatrix: d_in expected an integer of at least 1, got str 'a'"):
        compat.PCAMatrix("a", 7)
    for power in ("a", np.nan, None):
        with pytest.raises(ValueError, match=r"PCAMatrix: eigen_power expected a finite number, got"):
            compat.PCAMatrix(24, 7, power)
    with pytest.raises(ValueError, match=r"PCAMatrix: random_rotation expected False"):
        compat.PCAMatrix(24, 7, -0.5, True)


def test_names_parameters_and_defaults_are_those_of_faiss() -> None:
    theirs, ours = faiss.ClusteringParameters(), compat.ClusteringParameters()
    names = {
        name
        for name in vars(faiss.ClusteringParameters)
        if isinstance(getattr(faiss.ClusteringParameters, name), property)
    }
    assert names - {"thisown"} == set(vars(ours))
    for name in vars(ours):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert set(vars(Kmeans(24, 5))) == set(vars(faiss.Kmeans(24, 5)))
    for name in ("ClusteringInitMethod_RANDOM", "ClusteringInitMethod_KMEANS_PLUS_PLUS"):
        assert getattr(compat, name) == getattr(faiss, name)


def test_early_stop_plus_plus_and_parameters_without_effect() -> None:
    x = clustered()
    options = {"niter": 60, "early_stop_threshold": 0.003, "min_points_per_centroid": 1}
    theirs, ours = faiss.Kmeans(24, 40, **options), Kmeans(24, 40, **options)
    for kmeans in (theirs, ours):
        kmeans.train(x, init_centroids=x[:40])
    assert len(ours.obj) == len(theirs.obj) < 60
    kept = {"update_index": True, "decode_block_size": 7, "check_input_data_for_NaNs": False}
    same = Kmeans(24, 40, **options, **kept, use_faster_subsampling=True)
    same.train(x, init_centroids=x[:40])
    assert np.array_equal(same.centroids, ours.centroids)
    plus = Kmeans(24, 40, niter=3, min_points_per_centroid=1, init_method=compat.ClusteringInitMethod_KMEANS_PLUS_PLUS)
    plus.train(x)
    expected = KMeans(40, n_iter=3, init="k-means++", seed=1234).fit(x)
    assert np.array_equal(plus.centroids, expected.cluster_centers_.numpy())


def test_parameters_are_set_on_cp_and_iteration_stats_tell_the_way() -> None:
    x = clustered()
    kmeans = Kmeans(24, 10)
    kmeans.cp.niter = 3
    kmeans.train(x)
    assert [stats["obj"] for stats in kmeans.iteration_stats] == kmeans.obj.tolist()
    assert len(kmeans.obj) == 3
    times = [stats["time"] for stats in kmeans.iteration_stats]
    assert times == sorted(times) and times[0] > 0
    counts = np.bincount(KMeans(10, n_iter=2, seed=1234).fit(x).labels_, minlength=10)
    assert kmeans.iteration_stats[2]["imbalance_factor"] == pytest.approx(10 * (counts**2).sum() / 2000**2)
    kmeans.reset(5)
    assert kmeans.centroids is kmeans.obj is kmeans.iteration_stats is None
    kmeans.train(x)
    assert kmeans.centroids.shape == (5, 24)


def test_index_adds_searches_and_forgets() -> None:
    x = clustered(50)
    theirs, ours = faiss.IndexFlatL2(24), compat.IndexFlatL2(24)
    for index in (theirs, ours):
        index.train(x)
        index.add(x[:20])
        index.add(x[20:])
    assert ours.is_trained and ours.ntotal == theirs.ntotal == 50
    query = clustered(70) + 0.01
    assert np.array_equal(ours.search(query, 1)[1], theirs.search(query, 1)[1])
    ours.reset()
    assert ours.ntotal == 0


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
    kmeans.train(torch.from_numpy(x).requires_grad_())
    assert np.array_equal(kmeans.centroids, expected.centroids)
    half = torch.from_numpy(x).bfloat16()
    kmeans.train(half, torch.ones(500, requires_grad=True), half[:5])
    expected.train(half.float().numpy(), init_centroids=half[:5].float().numpy())
    np.testing.assert_allclose(kmeans.centroids, expected.centroids, rtol=1e-5)


def test_too_few_points_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="please provide at least 390 training vectors for 10 centroids, got 100"):
        Kmeans(24, 10).train(clustered(100))
    Kmeans(24, 10, min_points_per_centroid=10).train(clustered(100))


def test_verbose_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    Kmeans(24, 5, niter=2, verbose=1).train(clustered(500))
    assert "k-means, 5 clusters" in capsys.readouterr().err
    fit = KMeans(5, n_iter=50, progress=True).fit(clustered(500))
    assert fit.n_iter_ < 50 and f"{fit.n_iter_}/{fit.n_iter_}" in capsys.readouterr().err.rpartition("\r")[2]


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(500)
    for size in (0, "a", 2.5, None):
        for kind, op in ((Kmeans, "faiss_compat.Kmeans"), (compat.Clustering, "faiss_compat.Clustering")):
            with pytest.raises(ValueError, match=f"{op}: d expected an integer of at least 1, got"):
                kind(size, 5)
            with pytest.raises(ValueError, match=f"{op}: k expected an integer of at least 1, got"):
                kind(24, size)
        with pytest.raises(ValueError, match=r"faiss_compat.IndexFlat: d expected an integer of at least 1, got"):
            compat.IndexFlatL2(size)
    index, bad = compat.IndexFlatL2(24), x[:9].copy()
    bad[[4, 7], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"IndexFlat.add: x expected finite rows, got 2 with .* at index 4"):
        index.add(bad)
    assert index.ntotal == 0
    with pytest.raises(ValueError, match=r"PCAMatrix.train: x expected at least one vector, got .* \(0, 24\)"):
        compat.PCAMatrix(24, 2).train(x[:0])
    with pytest.raises(ValueError, match=r"Kmeans.reset: k expected an integer of at least 1, got str 'a'"):
        Kmeans(24, 5).reset("a")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'iterations'"):
        Kmeans(24, 5, iterations=3)
    for name, value in (
        ("progressive_dim_steps", 3),
        ("int_centroids", True),
        ("frozen_centroids", True),
        ("use_super_kmeans", True),
        ("afkmc2_chain_length", 10),
        ("init_method", faiss.ClusteringInitMethod_AFK_MC2),
    ):
        with pytest.raises(ValueError, match=f"faiss_compat.Kmeans: {name} expected .* got {type(value).__name__}"):
            Kmeans(24, 5, **{name: value})
    kmeans = Kmeans(24, 5)
    with pytest.raises(RuntimeError, match=r"faiss_compat.IndexFlat.search: the index is empty: train or add first"):
        kmeans.assign(x)
    with pytest.raises(ValueError, match=r"faiss_compat.Clustering.train: x expected \(N, 24\), got float32 array"):
        kmeans.train(x[:, :23])
    with pytest.raises(ValueError, match=r"faiss_compat.Clustering.train: x expected finite rows, got 1 with NaN"):
        kmeans.train(np.where(x == x[3, 3], np.nan, x))
    for value in ("abc", None, [[1.0], [1.0, 2.0]], x.astype(complex), {}):
        with pytest.raises(TypeError, match=r"faiss_compat.Clustering.train: x expected numbers \(N, 24\), got"):
            kmeans.train(value)
    for start in (x[:4], x[:5, :23]):
        got = rf"float32 \({len(start)}, {start.shape[1]}\) on cpu"
        with pytest.raises(ValueError, match=rf"Kmeans.train: init_centroids expected \(5, 24\), got {got}"):
            kmeans.train(x, init_centroids=start)
    with pytest.raises(TypeError, match=r"Kmeans.train: init_centroids expected numbers \(5, 24\), got str 'abc'"):
        kmeans.train(x, init_centroids="abc")
    with pytest.raises(ValueError, match=r"faiss_compat.Clustering.train: weights expected \(500,\)"):
        kmeans.train(x, weights=np.ones(499))
    with pytest.raises(ValueError, match=r"Clustering.train: weights expected finite weights of at least 0"):
        kmeans.train(x, weights=-np.ones(500))
    with pytest.raises(TypeError, match=r"faiss_compat.Clustering.train: weights expected numbers \(500,\), got str"):
        kmeans.train(x, weights="abc")
    clus = compat.Clustering(24, 5)
    with pytest.raises(
        ValueError, match=r"faiss_compat.Clustering.train: index expected dimension 24, got dimension 23"
    ):
        clus.train(x, compat.IndexFlatL2(23))
    with pytest.raises(ValueError, match=r'index expected metric "l2" for spherical=False, got ip'):
        clus.train(x, compat.IndexFlatIP(24))
    with pytest.raises(TypeError, match=r"Clustering.train: index expected one of faiss_compat's, got NoneType None"):
        clus.train(x, None)
    clus.centroids.values = x[:4].ravel()
    with pytest.raises(ValueError, match=r"Clustering.train: centroids expected 120 numbers, or none, got 96"):
        clus.train(x, compat.IndexFlatL2(24))
    clus.centroids.values = np.full(120, np.inf, np.float32)
    with pytest.raises(ValueError, match=r"Clustering.train: centroids expected finite centres, got NaN or infinity"):
        clus.train(x, compat.IndexFlatL2(24))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"faiss_compat.Kmeans: gpu expected False where torch finds no CUDA device"):
        Kmeans(24, 5, gpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"GpuIndexFlatL2: config.device expected one of the 1 CUDA devices found, got"
    ):
        compat.GpuIndexFlatL2(compat.StandardGpuResources(), 24, compat.GpuIndexFlatConfig(device=1))


@pytest.mark.parametrize("spherical", [False, True])
def test_engine_faiss_iterates_on_as_many_rows_as_clusters_too(spherical: bool) -> None:
    """faiss takes such rows for the centres."""
    x = 3 * torch.randn(40, 4)
    for options, rows in (({"init": torch.randn(6, 4)}, x[:6]), ({"max_points_per_cluster": 1, "seed": 1}, x)):
        ours, theirs = (
            KMeans(6, engine=engine, spherical=spherical, n_iter=3, **options).fit(rows)
            for engine in ("fastproto", "faiss")
        )
        torch.testing.assert_close(theirs.cluster_centers_, ours.cluster_centers_)
        np.testing.assert_allclose(theirs.history_, ours.history_, rtol=1e-5)


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_engine_faiss_runs_the_same_estimator(weighted: bool, spherical: bool, init: str) -> None:
    x = clustered()
    weights = torch.rand(2000) / 100 if weighted else None
    options = {"n_iter": 5, "init": init, "spherical": spherical, "max_points_per_cluster": 50, "seed": 4}
    ours = KMeans(33, **options).fit(x, sample_weight=weights)
    theirs = KMeans(33, engine="faiss", **options).fit(x, sample_weight=weights)
    assert (ours.labels_ == theirs.labels_).float().mean() > 0.98
    np.testing.assert_allclose(theirs.inertia_, ours.inertia_, rtol=1e-3)
    if not weighted:
        np.testing.assert_allclose(theirs.history_, ours.history_, rtol=1e-3)
    assert theirs.cluster_centers_.dtype == torch.float32
    assert theirs.n_distances_ == 33 * (50 * 33 * theirs.n_iter_ + 2000)


def test_engine_faiss_refuses_what_it_cannot() -> None:
    with pytest.raises(ValueError, match=r'KMeans: empty expected "split" for engine "faiss", got keep'):
        KMeans(3, engine="faiss", empty="keep")
    x = torch.randn(100, 8, dtype=torch.float64)
    message = "KMeans.fit: x expected distances that float32 can hold, got larger ones"
    # Above float32 faiss raises errors of its own; below it, where squared distances are not, it ends the process.
    for size in (1e300, 1e39, 1e30, 1e20):
        with pytest.raises(ValueError, match=message):
            KMeans(3, engine="faiss").fit(x * size)
    with pytest.raises(ValueError, match=message):
        KMeans(3, engine="faiss", init=x[:3] * 1e20).fit(x)
    assert KMeans(3, engine="faiss").fit(x * 1e17).inertia_ < torch.inf


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = clustered()
    expected, kmeans = Kmeans(24, 10), Kmeans(24, 10, gpu=True)
    expected.train(x)
    kmeans.train(x)
    np.testing.assert_allclose(kmeans.centroids, expected.centroids, rtol=1e-4, atol=1e-5)
    assert isinstance(kmeans.index.search(x, 1)[0], np.ndarray)
    start = torch.from_numpy(x[:10])
    expected = KMeans(10, init=start, n_iter=3).fit(torch.from_numpy(x))
    theirs = KMeans(10, init=start, n_iter=3, engine="faiss").fit(torch.from_numpy(x).cuda())
    assert theirs.cluster_centers_.is_cuda and theirs.labels_.is_cuda
    np.testing.assert_allclose(theirs.inertia_, expected.inertia_, rtol=1e-3)
    settings = PCL | {"min_points_per_centroid": 10, "niter": 4, "nredo": 1}
    index = compat.GpuIndexFlatL2(compat.StandardGpuResources(), 24, compat.GpuIndexFlatConfig())
    on_gpu, on_cpu = (pcl_clusters(compat, one, x, 10, x[:10], **settings) for one in (index, compat.IndexFlatL2(24)))
    np.testing.assert_allclose(on_gpu["centroids"], on_cpu["centroids"], rtol=1e-4, atol=1e-5)
