"""The C++ assign: every instruction set and number of threads, and data that a screen in 16 or 8 bits finds hard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.test_assign import check
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.ops.assign import assign

pytestmark = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)


@pytest.fixture(params=[] if _native.cpp is None else _native.cpp.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = _native.cpp.isa(), torch.get_num_threads()
    _native.cpp.set_isa(request.param)
    yield request.param
    _native.cpp.set_isa(before)
    torch.set_num_threads(threads)


def hard(kind: str) -> tuple[Tensor, Tensor]:
    x, centers = torch.randn(300, 40), torch.randn(150, 40)
    match kind:
        case "gaussian":
            pass
        case "offset":
            x, centers = x + 1e4, centers + 1e4
        case "near-duplicates":
            centers = centers[:7].repeat(22, 1)[:150] + 1e-5 * torch.randn(150, 40)
            x = centers[torch.randint(150, (300,))] + 1e-5 * torch.randn(300, 40)
        case "unit":
            x, centers = (torch.nn.functional.normalize(v) for v in (x, centers))
        case "heavy rows":
            x, centers = x / torch.rand(300, 1) ** 3, centers / torch.rand(150, 1) ** 3
        case "heavy dimensions":
            scale = torch.rand(40) ** -2
            x, centers = x * scale, centers * scale
        case "far outlier":
            centers[3] = 1e7
        case "clusters":
            centers = centers * 100
            x = centers[torch.randint(150, (300,))] + 0.1 * x
        case "all centres alike":
            centers = centers[:1].expand(150, -1) + 1e-7 * torch.randn(150, 40)
        case "on the centres":
            x = centers.repeat(2, 1)
        case "tiny":
            x, centers = x * 1e-22, centers * 1e-22
        case "large":
            x, centers = x * 1e16, centers * 1e16
        case "small beside large":
            x = x * torch.tensor([1e-18, 1.0, 1e14]).repeat(100)[:, None]
        case "zeros":
            x, centers = torch.zeros(300, 40), centers.round()
    return x, centers


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "kind",
    [
        "gaussian", "offset", "near-duplicates", "unit", "heavy rows", "heavy dimensions", "far outlier", "clusters",
        "all centres alike", "on the centres", "tiny", "large", "small beside large", "zeros",
    ],
)  # fmt: skip
def test_hard_data(isa: str, kind: str, metric: str) -> None:
    x, centers = hard(kind)
    # float32 itself has no digits for squares of 1e-44, and for the products of "tiny" none to return.
    if kind == "tiny":
        expected = (x.double() @ centers.double().T).argmax(1)
        if metric == "l2":
            expected = torch.cdist(x.double(), centers.double()).argmin(1)
        assert torch.equal(assign(x, centers, metric)[0], expected)
    else:
        check(x, centers, metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 24), (130, 1000, 33), (17, 13, 2), (9, 900, 700)])
def test_odd_sizes(isa: str, n: int, k: int, d: int, dtype: torch.dtype) -> None:
    for metric in ("l2", "ip"):
        check(torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype), metric)


def test_same_bits_as_the_reference(isa: str) -> None:
    x, centers = torch.randn(1000, 40), torch.randn(300, 40)
    for metric in ("l2", "ip"):
        labels, distance = assign(x, centers, metric)
        with fastproto.backend("reference"):
            expected_labels, expected_distance = assign(x, centers, metric)
        assert torch.equal(labels, expected_labels)
        torch.testing.assert_close(distance, expected_distance, rtol=1e-6, atol=1e-6)


def test_same_bits_for_any_threads_and_batch(isa: str) -> None:
    x, centers = torch.randn(3000, 40), torch.randn(300, 40)
    centers[150:] = centers[:150] + 1e-5 * torch.randn(150, 40)
    torch.set_num_threads(1)
    labels, distance = assign(x, centers)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (3000, 999, 33):
            parts = [assign(part, centers) for part in x.split(rows)]
            assert torch.equal(torch.cat([part[0] for part in parts]), labels)
            assert torch.equal(torch.cat([part[1] for part in parts]), distance)


@pytest.mark.parametrize("kind", ["crowd", "heavy dimensions", "half of it crowded"])
def test_eight_bits_give_way_to_sixteen(isa: str, kind: str) -> None:
    """Rows enough that only some of them are tried in 8 bits, and centres too near to each other for those."""
    x, centers = torch.randn(3000, 40), torch.randn(300, 40)
    if kind == "heavy dimensions":
        scale = torch.rand(40) ** -2
        x, centers = x * scale, centers * scale
    else:
        centers = centers[:1] + 1e-3 * centers
        crowded = 3000 if kind == "crowd" else 1500
        x[:crowded] = centers[torch.randint(300, (crowded,))] + 1e-4 * x[:crowded]
    for metric in ("l2", "ip"):
        check(x, centers, metric)


def test_more_ties_than_a_row_can_have_waiting(isa: str) -> None:
    centers = torch.randn(3, 40).repeat_interleave(1000, 0)
    x = torch.randn(50, 40)
    labels, _ = assign(x, centers)
    assert torch.equal(labels, assign(x, centers[::1000])[0] * 1000)


def test_nothing_but_nan_and_infinity(isa: str) -> None:
    x, centers = torch.randn(40, 24), torch.randn(500, 24)
    expected, _ = assign(x, centers)
    x[3], x[20, 1], x[39, 5] = torch.nan, torch.inf, -torch.inf
    labels, distance = assign(x, centers)
    others = torch.tensor([n not in (3, 20, 39) for n in range(40)])
    assert torch.equal(labels[others], expected[others])
    assert distance[others].isfinite().all()
    assert not distance[~others].isfinite().any()
    assert ((labels >= 0) & (labels < 500)).all()
    centers[7] = torch.nan
    labels, _ = assign(x, centers)
    assert ((labels >= 0) & (labels < 500)).all()


def test_fast_stays_within_its_stated_error(isa: str) -> None:
    x, centers = torch.randn(500, 64), torch.randn(900, 64)
    labels, distance = assign(x, centers, exact=False)
    distances = torch.cdist(x.double(), centers.double()).square()
    torch.testing.assert_close(distance.double(), distances.gather(1, labels[:, None])[:, 0])
    # The screen is off by at most 2^-12 |x| |c|, the score by twice that between two centres, the square by four times.
    off = 4 * x.norm(dim=1) * centers.norm(dim=1).max() * 2.0**-12
    assert (distance.double() <= distances.min(1).values + off).all()


def test_rows_that_share_memory(isa: str) -> None:
    x, centers = torch.randn(24, 66), torch.randn(60, 24)
    expected = assign(x.T[::2].contiguous(), centers[::3].contiguous())
    assert all(map(torch.equal, assign(x.T[::2], centers[::3]), expected))
    row = torch.randn(1, 24)
    assert torch.equal(assign(row.expand(33, -1), centers)[0], assign(row, centers)[0].expand(33))
