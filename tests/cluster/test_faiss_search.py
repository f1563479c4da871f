"""faiss_compat's search for several neighbours: beside float64, beside the installed faiss, and where vectors tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastproto.cluster.faiss_compat as compat
from fastproto.reference import search as reference

INDEXES = {"l2": compat.IndexFlatL2, "ip": compat.IndexFlatIP}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE", 32)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", {"cpu": 1000, "cuda": 1000})


def oracle(x: np.ndarray, vectors: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    x_nkd, v_nkd = x[:, None].astype(np.float64), vectors[None].astype(np.float64)
    values = (((x_nkd - v_nkd) ** 2) if metric == "l2" else x_nkd * v_nkd).sum(2).astype(np.float32)
    labels = (values if metric == "l2" else -values).argsort(1, kind="stable")[:, :k]
    return np.take_along_axis(values, labels, 1), labels


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("n", "total", "d", "k"), [(70, 201, 24, 6), (33, 50, 3, 50), (5, 7, 1, 2), (3, 40, 500, 33)])
def test_finds_what_float64_finds(n: int, total: int, d: int, k: int, metric: str) -> None:
    rng = np.random.default_rng(0)
    # A common offset and one far vector: neither may eat the digits.
    x, vectors = (rng.normal(size=(rows, d)).astype(np.float32) + 100 for rows in (n, total))
    vectors[total // 2] = 1e6
    index = INDEXES[metric](d)
    index.add(vectors)
    distances, labels = index.search(x, k)
    expected, order = oracle(x, vectors, k, metric)
    assert (distances.dtype, labels.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(distances, expected, rtol=1e-6)
    np.testing.assert_array_equal(labels, order)
    one = index.search(x, 1)
    np.testing.assert_array_equal(labels[:, :1], one[1])
    np.testing.assert_allclose(distances[:, :1], one[0], rtol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_ties_go_to_the_lowest_index_and_a_vector_is_0_from_itself(metric: str) -> None:
    vectors = np.tile(np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32), (5, 1))
    vectors[::7] *= 0
    index = INDEXES[metric](24)
    index.add(vectors)
    x = np.concatenate([vectors, 0 * vectors[:1]])
    for k in (2, 3, 7):
        distances, labels = index.search(x, k)
        expected, order = oracle(x, vectors, k, metric)
        np.testing.assert_array_equal(labels, order)
        np.testing.assert_allclose(distances, expected, rtol=1e-6)
        assert metric == "ip" or np.all(distances[:, :2] == 0)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_tells_more_vectors_apart_than_their_products_can(metric: str) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 24)).astype(np.float32)
    vectors = np.repeat(base, 100, 0)
    vectors[np.arange(300), rng.integers(24, size=300)] *= 1 + rng.integers(9, size=300).astype(np.float32) * 2.0**-22
    vectors = vectors.astype(np.float32)
    index = INDEXES[metric](24)
    index.add(vectors)
    for k in (1, 3, 20):
        distances, labels = index.search(base, k)
        expected, order = oracle(base, vectors, k, metric)
        np.testing.assert_allclose(distances, expected, rtol=1e-6)
        if metric == "l2":  # products in float64 differ by less than float32 holds
            np.testing.assert_array_equal(labels, order)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("k", [2, 6, 45])
def test_is_what_faiss_finds(k: int, metric: str) -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    x, vectors = (rng.normal(size=(rows, 16)).astype(np.float32) for rows in (60, 40))
    theirs, ours = (getattr(library, f"IndexFlat{metric.upper()}")(16) for library in (faiss, compat))
    for index in (theirs, ours):
        index.add(vectors)
    # More than there are: -1, and the worst distance.
    np.testing.assert_array_equal(ours.search(x, k)[1], theirs.search(x, k)[1])
    np.testing.assert_allclose(ours.search(x, k)[0], theirs.search(x, k)[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(ours.search(x[:0], k), theirs.search(x[:0], k), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_bad_input() -> None:
    index = compat.IndexFlatL2(3)
    index.add(np.zeros((5, 3), np.float32))
    x = np.zeros((4, 3), np.float32)
    for k in (0, -1, 1.0, True, "2", None):
        with pytest.raises(ValueError, match=r"IndexFlat.search: k expected an integer of at least 1, got"):
            index.search(x, k)
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"IndexFlat.search: x expected finite rows, got 1 with .* at index 2"):
        index.search(x, 2)
    with pytest.raises(ValueError, match=r"IndexFlat.search: x expected distances that float32 can hold"):
        index.search(np.full((4, 3), 1e30, np.float32), 2)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    rng = np.random.default_rng(0)
    x, vectors = (rng.normal(size=(rows, 16)).astype(np.float32) for rows in (60, 40))
    index, on_gpu = compat.IndexFlatL2(16), compat.GpuIndexFlatL2(compat.StandardGpuResources(), 16)
    for one in (index, on_gpu):
        one.add(vectors)
    np.testing.assert_array_equal(on_gpu.search(x, 6)[1], index.search(x, 6)[1])


def test_an_index_by_the_number_of_its_metric() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    for metric, like in ((compat.METRIC_L2, compat.IndexFlatL2), (compat.METRIC_INNER_PRODUCT, compat.IndexFlatIP)):
        found = []
        for index in (compat.IndexFlat(6, metric), like(6)):
            index.add(vectors)
            found.append(index.search(vectors[:9], 3))
        assert all(map(np.array_equal, *found))
    with pytest.raises(ValueError, match="IndexFlat: metric expected METRIC_L2 or METRIC_INNER_PRODUCT, got int 2"):
        compat.IndexFlat(6, 2)


def test_small_things_are_as_in_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    assert (compat.METRIC_L2, compat.METRIC_INNER_PRODUCT) == (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT)
    assert compat.get_num_gpus() == torch.cuda.device_count()
    ours = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    ours[3] = 0
    theirs = ours.copy()
    compat.normalize_L2(ours)
    faiss.normalize_L2(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
