"""search against sorting all distances in float64: the reference, and C++ on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ops.test_assign_kernels import hard
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.ops.search import search
from fastproto.reference import search as reference

KINDS = [
    "gaussian", "offset", "near-duplicates", "unit", "heavy rows", "heavy dimensions", "far outlier", "clusters",
    "all centres alike", "on the centres", "tiny", "small beside large", "zeros",
]  # fmt: skip


@pytest.fixture(params=["reference"] + ([] if _native.cpp is None else _native.cpp.supported_isas()), autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference in small tiles and chunks, or an instruction set."""
    threads = torch.get_num_threads()
    if request.param == "reference":
        monkeypatch.setattr(reference, "TILE", 32)
        monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", 50_000)
        with fastproto.backend("reference"):
            yield request.param
    else:
        before = _native.cpp.isa()
        _native.cpp.set_isa(request.param)
        yield request.param
        _native.cpp.set_isa(before)
    torch.set_num_threads(threads)


def check(x: Tensor, vectors: Tensor, counts: int | tuple[int, ...], metric: str) -> None:
    x_n1d, v_1kd = x.double().numpy()[:, None], vectors.double().numpy()[None]
    terms_nkd = (x_n1d - v_1kd) ** 2 if metric == "l2" else x_n1d * v_1kd
    distance_nk = terms_nkd.sum(2)
    rounded_nk = distance_nk.astype(np.float32)
    # Products that cancel differ by the order in which they are added up.
    rounding_nk = 1e-7 * np.abs(distance_nk) + 1e-14 * np.abs(terms_nkd).sum(2) + 1e-44
    order_nk = (rounded_nk if metric == "l2" else -rounded_nk).argsort(1, kind="stable")

    for count in (counts,) if isinstance(counts, int) else counts:
        expected = order_nk[:, :count]
        labels, distance = (found.numpy() for found in search(x, vectors, count, metric))
        assert (labels.dtype, distance.dtype) == (np.int64, np.float32)
        np.testing.assert_allclose(distance, np.take_along_axis(rounded_nk, expected, 1), rtol=3e-7, atol=1e-37)
        if metric == "l2":
            np.testing.assert_array_equal(labels, expected)
        assert all(len(set(row)) == count for row in labels)
        gap = np.abs(np.take_along_axis(distance_nk, labels, 1) - distance)
        assert (gap <= np.take_along_axis(rounding_nk, labels, 1)).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_data(kind: str, metric: str) -> None:
    x, vectors = hard(kind)
    check(x, vectors, (2, 20), metric)


def close_together(count: int, d: int, centers: int, offset: float, size: float, unit: float = 2.0**-22) -> Tensor:
    """Vectors that differ from a few by some units in their last places, so that products cannot tell them apart."""
    few = torch.randn(centers, d)[torch.randint(centers, (count,))]
    return ((few + offset) * (1 + torch.randint(-2, 3, (count, d)) * unit)).float() * size


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("size", [1.0, 1e13, 1e15])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_what_products_cannot_tell_apart(offset: float, size: float, metric: str) -> None:
    """Lengths, the offset, and what is too long for products each have their part in the bound."""
    vectors = close_together(500, 257, 3, offset, size)
    check(torch.randn(40, 257) + (offset if metric == "l2" else 0), vectors, 20, metric)
    check(vectors[::20] if size == 1 or metric == "l2" else vectors[::20] / size, vectors, 20, metric)
    # So near the origin, the median of so few, rows add nothing to the error that their vectors make.
    vectors = vectors[:63]
    check(torch.randn(40, 257) * 1e-7 * size + vectors.median(0).values, vectors, 9, "l2")


def behind_others(nearest: Tensor, others: Tensor) -> Tensor:
    """The nearest after the others as they grow, more than candidates have room for. Most are 0, and so the origin."""
    used = others[0].nonzero()[:, 0]
    growing = [others.index_fill(1, used[m:], 0) for m in range(len(used) + 1) for _ in range(3)]
    return torch.cat([*growing, torch.zeros(100, 64), nearest, torch.zeros(1000, 64)])


@pytest.mark.parametrize("size", [2.0**-70, 1.0, 2.0**46])
def test_of_vectors_all_rounding_goes_one_way(size: float) -> None:
    """As bfloat16 the nearest lose 0.244, 2^-8 of each number, which is their bound; the others are exact."""
    x = torch.randn(4, 64).sign()
    others = x * (1 + 2.0**-7 * (torch.arange(64) < 30))  # products of 64.234; the nearest have 64.244
    check(x, behind_others(x * (1 + 0.977 * 2.0**-8), others) * size, 1, "ip")


@pytest.mark.parametrize("size", [2.0**-70, 1.0, 2.0**46])
def test_of_rows_all_rounding_goes_one_way(size: float) -> None:
    """Rounded they lose 0.122 beside the nearest, nothing beside the others, where the bound is as large."""
    signs, upper = torch.randn(4, 64).sign(), torch.arange(64) < 32
    x = signs * (1 + 0.977 * 2.0**-8 * upper)
    others = signs * ~upper * (1 + 2.0**-7 * (torch.arange(64) < 46))  # products of 32.109; the nearest have 32.122
    check(x * size, behind_others(signs * upper, others), 1, "ip")


def test_denormal_vectors_that_count_as_zeros() -> None:
    signs = torch.randn(4, 64).sign()
    others = signs * (torch.arange(64) < 40) * 2.0**-126
    check(signs * 2.0**48, behind_others(signs * 2.0**-126 * 0.99, others), 1, "ip")


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e13])
def test_what_bfloat16_cannot_tell_apart(size: float, metric: str) -> None:
    vectors = close_together(3000, 64, 300, 0.0, 1.0, 2.0**-10)
    check(torch.randn(40, 64) * size, vectors * size, (1, 5), metric)


def test_of_products_that_float32_makes_equal_the_lowest_index_comes_first() -> None:
    """Taken from the origin amid the vectors their scores still differ."""
    x, vectors = torch.randn(40, 3), close_together(500, 3, 1, 300.0, 1.0)
    products = (x.double() @ vectors.double().T).float()
    expected = products.argsort(dim=1, descending=True, stable=True)[:, :20]
    assert torch.equal(search(x, vectors, 20, "ip")[0], expected)


def test_products_of_denormal_vectors_are_told_apart() -> None:
    vectors = (torch.randint(1, 30_000, (3000, 1)) * 2.0**-149).expand(-1, 2).float()
    x = (1 + torch.rand(40, 1)) * (1 + torch.randint(-8, 9, (40, 2)) * 2.0**-22) * torch.tensor([1.0, -1]) * 5e14
    for d in (2, 40):
        check(x.float().repeat(1, d // 2), vectors[:, :1].expand(-1, d).contiguous(), 3, "ip")


def test_of_distances_that_float32_cannot_hold_the_lowest_index_comes_first() -> None:
    x, vectors = torch.full((2, 2), 1e20), (1 + torch.rand(60, 2)) * 1e20
    labels, distance = search(x, vectors, 9, "ip")
    assert torch.equal(labels, torch.arange(9).expand(2, -1))
    assert distance.isinf().all()


def test_more_candidates_than_a_chunk_of_rows_may_hold(backend: str) -> None:
    if backend == "reference":
        pytest.skip("its chunks are small already")
    x, vectors = torch.randn(100, 3), torch.randn(16_000, 3)
    assert torch.equal(search(x, vectors, 15_000)[0][:, :9], search(x, vectors, 9)[0])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "d", "count"),
    [(0, 5, 3, 2), (1, 1, 1, 1), (5, 7, 1, 2), (33, 507, 24, 6), (70, 50, 3, 50), (3, 900, 99, 300), (300, 999, 33, 1)],
)
def test_odd_sizes(n: int, k: int, d: int, count: int, dtype: torch.dtype, metric: str) -> None:
    check(torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype), count, metric)


def test_more_equal_vectors_than_candidates_have_room() -> None:
    vectors = torch.randn(3, 40).repeat_interleave(500, 0)
    x = torch.randn(40, 40)
    first, _ = search(x, vectors[::500], 2)
    labels, _ = search(x, vectors, 700)
    assert torch.equal(labels[:, :500], first[:, :1] * 500 + torch.arange(500))
    assert torch.equal(labels[:, 500:], first[:, 1:] * 500 + torch.arange(200))


def test_the_nearest_come_last() -> None:
    """Every vector is nearer than all before it, so all of them are candidates."""
    vectors = torch.randn(24) * torch.linspace(9, 1, 2000)[:, None]
    labels, _ = search(torch.zeros(33, 24), vectors, 5)
    assert torch.equal(labels, torch.arange(1999, 1994, -1).expand(33, -1))


def test_same_bits_for_any_threads_and_batch(backend: str) -> None:
    x, vectors = torch.randn(700, 40), torch.randn(300, 40)
    vectors[150:] = vectors[:150] + 1e-5 * torch.randn(150, 40)
    expected = search(x, vectors, 9)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (700, 299, 33):
            parts = [search(part, vectors, 9) for part in x.split(rows)]
            for one, other in zip(zip(*parts, strict=True), expected, strict=True):
                assert torch.equal(torch.cat(one), other)


def test_any_strides() -> None:
    x, vectors = torch.randn(24, 66), torch.randn(60, 24)
    expected = search(x.T[::2].contiguous(), vectors[::3].contiguous(), 4)
    assert all(map(torch.equal, search(x.T[::2], vectors[::3], 4), expected))
    row = torch.randn(1, 24)
    labels, _ = search(row.expand(33, -1), vectors, 4)
    assert torch.equal(labels, search(row, vectors, 4)[0].expand(33, -1))


def test_nan_and_infinity_harm_no_others() -> None:
    x, vectors = torch.randn(40, 24), torch.randn(200, 24)
    expected, _ = search(x, vectors, 5)
    x[3], x[20, 1], x[39, 5] = torch.nan, torch.inf, -torch.inf
    labels, distance = search(x, vectors, 5)
    others = torch.tensor([n not in (3, 20, 39) for n in range(40)])
    assert torch.equal(labels[others], expected[others])
    assert distance[others].isfinite().all()
    assert not distance[~others].isfinite().any()
    assert ((labels >= 0) & (labels < 200)).all()
    # A vector of NaN is farther than all others, which may be ties.
    vectors[100:] = vectors[:100]
    expected, _ = search(x[others], vectors, 60)
    vectors[7] = torch.nan
    labels, _ = search(x[others], vectors, 60)
    for row, other in zip(labels.tolist(), expected.tolist(), strict=True):
        assert row[:59] == [label for label in other if label != 7][:59]
    assert search(x[others], vectors, 200)[0][:, -1].eq(7).all()


def test_no_gradient_and_no_autocast() -> None:
    x, vectors = torch.randn(40, 24, requires_grad=True), torch.randn(33, 24)
    expected = search(x, vectors, 3)
    assert not expected[1].requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, search(x, vectors, 3), expected))


def test_bad_input() -> None:
    x, vectors = torch.randn(5, 3), torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"search: x expected a float32 .* tensor \(N, D\), got int64 \(5, 3\) on cpu"):
        search(x.long(), vectors, 1)
    with pytest.raises(ValueError, match=r"search: vectors expected \(K, 3\) on cpu, got float32 \(2, 2\) on cpu"):
        search(x, vectors[:, :2], 1)
    with pytest.raises(ValueError, match="search: vectors expected at least one vector of at least one dimension"):
        search(x, vectors[:0], 1)
    with pytest.raises(ValueError, match='search: metric expected "l2" or "ip", got cosine'):
        search(x, vectors, 1, "cosine")
    for count in (0, 3, 1.0, "1", True, None):
        with pytest.raises(ValueError, match="search: count expected 1 to the 2 vectors, got "):
            search(x, vectors, count)


def test_the_compiler_sees_one_node() -> None:
    x, vectors = torch.randn(40, 24), torch.randn(33, 24)
    torch.library.opcheck(torch.ops.fastproto.search.default, (x, vectors, 3, "l2"))
