"""What KMeans and kmeans_assign refuse, and what they say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastproto.cluster import KMeans, kmeans_assign


def test_bad_options() -> None:
    for name in ("n_clusters", "n_iter", "n_init", "max_points_per_cluster", "chunk_rows"):
        with pytest.raises(ValueError, match=f"KMeans: {name} expected an integer of at least 1, got int 0"):
            KMeans(**{"n_clusters": 2, name: 0})
    with pytest.raises(ValueError, match=r"KMeans: n_clusters expected an integer of at least 1, got float 2.5"):
        KMeans(2.5)
    for name, value, message in (
        ("seed", -1, "an integer of at least 0, got int -1"),
        ("tol", -0.1, "a number of at least 0, got float -0.1"),
        ("tol", "x", "a number of at least 0, got x"),
        ("seed", True, "an integer of at least 0, got bool True"),
        ("spherical", "no", "True or False, got str 'no'"),
        ("empty", "drop", '"split" or "keep", got drop'),
        ("precision", "half", '"exact" or "fast", got half'),
        ("engine", "sklearn", '"fastproto" or "faiss", got sklearn'),
        ("device", "nope", 'None or a device such as "cpu" or "cuda:0", got nope'),
        ("device", 0.5, 'None or a device such as "cpu" or "cuda:0", got float 0.5'),
        ("device", f"cuda:{torch.cuda.device_count()}", f"one of the {torch.cuda.device_count()} .* found, got cuda:"),
        ("process_group", "x", "None or a group of torch.distributed, got x"),
    ):
        with pytest.raises(ValueError, match=f"KMeans: {name} expected {message}"):
            KMeans(2, **{name: value})
    with pytest.raises(ValueError, match=r'KMeans: init expected "random", "k-means\+\+" or centres \(K, D\), got pca'):
        KMeans(2, init="pca")
    with pytest.raises(TypeError, match=r"KMeans: init expected .* got list"):
        KMeans(2, init=[[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"KMeans: init expected \(2, D\), got float32 \(3, 4\) on cpu"):
        KMeans(2, init=torch.randn(3, 4))
    with pytest.raises(ValueError, match="KMeans: init expected finite centres, got NaN or infinity"):
        KMeans(2, init=np.full((2, 4), np.inf))
    with pytest.raises(ValueError, match=r"KMeans.fit: init expected \(2, 3\), got float32 \(2, 4\) on cpu"):
        KMeans(2, init=torch.randn(2, 4)).fit(torch.randn(5, 3))


def test_bad_rows() -> None:
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"KMeans.fit: x expected at least n_clusters = 11 rows, got 10"):
        KMeans(11).fit(x)
    with pytest.raises(TypeError, match=r"KMeans.fit: x expected a float32 or .* got int64 \(10, 3\) on cpu"):
        KMeans(2).fit(x.long())
    with pytest.raises(TypeError, match=r"KMeans.fit: x expected a float16, float32 or .* got int64 array \(10, 3\)"):
        KMeans(2).fit(x.long().numpy())
    with pytest.raises(TypeError, match=r"kmeans_assign: x expected a float32 .* got float32 array \(10, 3\)$"):
        kmeans_assign(x.numpy(), x[:2])
    with pytest.raises(TypeError, match=r"KMeans.fit: x expected .* got sparse_coo float32 \(10, 3\) on cpu"):
        KMeans(2).fit(x.to_sparse())
    with pytest.raises(TypeError, match=r"KMeans.fit: x expected .* got list \[.{199} \.\.\.$"):
        KMeans(2).fit([[0.0, 1.0]] * 1000)
    with pytest.raises(TypeError, match=r"KMeans.fit: x expected a float tensor or array \(N, D\), got list"):
        KMeans(2).fit(x.tolist())
    with pytest.raises(ValueError, match=r"KMeans.fit: x expected \(N, D\), got float32 \(10,\) on cpu"):
        KMeans(2).fit(x[:, 0])
    with pytest.raises(ValueError, match=r"KMeans.fit: x expected \(N, D\), got float32 array \(10,\)"):
        KMeans(2).fit(x[:, 0].numpy())
    with pytest.raises(ValueError, match=r"KMeans.fit: x expected at least one dimension, got shape \(10, 0\)"):
        KMeans(2).fit(x[:, :0])
    kmeans = KMeans(2).fit(x)
    with pytest.raises(ValueError, match=r"KMeans.predict: x expected \(N, 3\), got float32 \(10, 2\) on cpu"):
        kmeans.predict(x[:, :2])
    with pytest.raises(ValueError, match=r"KMeans.transform: x expected \(N, 3\), got float32 array \(10, 2\)"):
        kmeans.transform(x[:, :2].numpy())
    with pytest.raises(RuntimeError, match=r"KMeans.predict: call fit first"):
        KMeans(2).predict(x)


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_rows_of_nan_or_infinity_are_counted_and_named(chunk_rows: int | None) -> None:
    x = torch.randn(10, 3)
    x[6, 1], x[9, 0], x[9, 2] = torch.nan, torch.inf, torch.nan
    message = "x expected finite rows, got 2 with NaN or infinity, the first at index 6"
    with pytest.raises(ValueError, match=f"KMeans.fit: {message}"):
        KMeans(2, chunk_rows=chunk_rows).fit(x)
    with pytest.raises(ValueError, match=f"KMeans.fit: {message}"):
        KMeans(2, chunk_rows=chunk_rows).fit(x.numpy())
    with pytest.raises(ValueError, match=f"KMeans.predict: {message}"):
        KMeans(2, chunk_rows=chunk_rows).fit(x[:5]).predict(x)
    with pytest.raises(ValueError, match=f"kmeans_assign: {message}"):
        kmeans_assign(x, x[:2])
    with pytest.raises(ValueError, match="kmeans_assign: centers expected finite centres, got NaN or infinity"):
        kmeans_assign(x[:2], x[5:7])
    with pytest.raises(ValueError, match=r"KMeans.fit: x expected distances that float32 can hold, got larger ones"):
        KMeans(2).fit(torch.randn(10, 3) * 1e25)
    with pytest.raises(ValueError, match=r"KMeans.fit: x expected distances that float32 can hold, got larger ones"):
        KMeans(4, init="k-means++").fit(torch.randn(10, 3) * 1e25, sample_weight=torch.rand(10))
    with pytest.raises(ValueError, match=f"KMeans.transform: {message}"):
        KMeans(2, chunk_rows=chunk_rows).fit(x[:5]).transform(x)
    with pytest.raises(ValueError, match=r"KMeans.predict: x expected distances that float32 can hold, got larger"):
        KMeans(2).fit(x[:5]).predict(x[:5] * 1e25)


def test_rows_of_nan_are_refused_even_where_checks_read_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kmeans", "_rows"):
        monkeypatch.setattr(f"fastproto.cluster.{module}.reads_data", lambda tensor: False)
    x = torch.randn(10, 3)
    x[6, 1] = torch.nan
    for init in ("random", "k-means++"):
        with pytest.raises(ValueError, match=r"KMeans.fit: x expected finite rows, got 1 with .* first at index 6"):
            KMeans(2, init=init, n_iter=3).fit(x)


def test_bad_weights() -> None:
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"KMeans.fit: sample_weight expected \(10,\), got float32 \(9,\) on cpu"):
        KMeans(2).fit(x, sample_weight=torch.ones(9))
    with pytest.raises(TypeError, match=r"KMeans.fit: sample_weight expected a float32 .* got int64 \(10,\) on cpu"):
        KMeans(2).fit(x, sample_weight=torch.ones(10).long())
    with pytest.raises(TypeError, match=r"KMeans.fit: sample_weight expected a float tensor or array .* got list"):
        KMeans(2).fit(x, sample_weight=[1.0] * 10)
    with pytest.raises(ValueError, match=r"sample_weight expected finite weights of at least 0, got 3 others"):
        KMeans(2).fit(x, sample_weight=np.array([1, 1, -1, np.nan, np.inf, 1, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"KMeans.fit: sample_weight expected a sum above 0, got float 0.0"):
        KMeans(2).fit(x, sample_weight=torch.zeros(10))
    drawn = r"sample_weight expected a sum above 0 over the 2 rows drawn for training \(max_points_per_cluster\), got 0"
    for row in range(10):
        weights = torch.zeros(10).index_fill(0, torch.tensor([row]), 1.0)
        kmeans = KMeans(2, max_points_per_cluster=1)
        if row in np.random.default_rng([0, 0]).choice(10, size=2, replace=False):
            assert kmeans.fit(x, sample_weight=weights).inertia_ < torch.inf
        else:
            with pytest.raises(ValueError, match=f"KMeans.fit: {drawn}"):
                kmeans.fit(x, sample_weight=weights)


def test_bad_kmeans_assign() -> None:
    x, centers = torch.randn(10, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match='kmeans_assign: metric expected "l2" or "ip", got cosine'):
        kmeans_assign(x, centers, metric="cosine")
    with pytest.raises(ValueError, match='kmeans_assign: precision expected "exact" or "fast", got low'):
        kmeans_assign(x, centers, precision="low")
    with pytest.raises(ValueError, match=r"kmeans_assign: centers expected \(K, 3\) on cpu, got float32 \(2, 2\)"):
        kmeans_assign(x, centers[:, :2])
    with pytest.raises(TypeError, match=r"kmeans_assign: x expected a float32 .* got int64 \(10, 3\)"):
        kmeans_assign(x.long(), centers)
    with pytest.raises(ValueError, match="kmeans_assign: centers expected at least one centre"):
        kmeans_assign(x, centers[:0])
