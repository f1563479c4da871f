"""Splitting of empty clusters: the written rule, and what the installed faiss makes of the same centres."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastproto.cluster._empty import split_empty
from fastproto.cluster.kmeans import KMeans

faiss = pytest.importorskip("faiss")


def oracle(centers: np.ndarray, counts: np.ndarray, rows: int) -> np.ndarray:
    """One draw of faiss's own generator after the other, cluster by cluster."""
    centers, counts, k = centers.copy(), counts.copy(), len(counts)
    generator = faiss.RandomGenerator(1234)
    for empty in range(k):
        if counts[empty] > 0:
            continue
        donor = 0
        while not generator.rand_float() < (counts[donor] - 1) / max(1, rows - k):
            donor = (donor + 1) % k
        for d in range(centers.shape[1]):
            sign = 1 if d % 2 == 0 else -1
            centers[empty, d] = centers[donor, d] * (1 + sign / 1024)
            centers[donor, d] *= 1 - sign / 1024
        counts[empty] = counts[donor] / 2
        counts[donor] -= counts[empty]
    return centers


@pytest.mark.parametrize(("k", "empty"), [(2, 1), (33, 5), (507, 300), (1000, 999)])
def test_follows_the_rule_draw_by_draw(k: int, empty: int) -> None:
    centers, counts = torch.randn(k, 5), torch.randint(2, 50, (k,)).double()
    counts[torch.randperm(k)[:empty]] = 0
    counts[counts.argmax()] += k
    rows = int(counts.sum())
    expected = oracle(centers.numpy(), counts.numpy(), rows)
    np.testing.assert_array_equal(split_empty(centers, counts, rows).numpy(), expected)


@pytest.mark.parametrize("spherical", [False, True])
def test_one_iteration_is_that_of_faiss(spherical: bool) -> None:
    x = np.random.default_rng(0).random((500, 6), dtype=np.float32)
    start = x[:40].copy()
    start[25:] += 100 * (-1 if spherical else 1)
    theirs = faiss.Kmeans(6, 40, niter=1, spherical=spherical, min_points_per_centroid=1)
    theirs.train(x, init_centroids=start)
    ours = KMeans(40, n_iter=1, init=start, spherical=spherical).fit(x)
    assert theirs.iteration_stats[0]["nsplit"] == 15
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.centroids, rtol=2e-6)


def test_as_many_clusters_as_rows() -> None:
    counts = torch.tensor([0.0, 0, 0, 7, 0, 0, 0])
    expected = oracle(np.ones((7, 3), np.float32), counts.numpy(), 7)
    np.testing.assert_array_equal(split_empty(torch.ones(7, 3), counts, 7).numpy(), expected)


def test_splitting_lowers_the_objective() -> None:
    means = 5 * torch.randn(30, 8)
    x = means[torch.arange(900) % 30] + 0.1 * torch.randn(900, 8)
    start = x[:30].clone()
    start[10:] = 1e3
    split, keep = (KMeans(30, init=start, empty=empty).fit(x).inertia_ for empty in ("split", "keep"))
    assert split < 0.7 * keep
