"""The C++ update: the reference's bits, for every instruction set and number of threads."""

from __future__ import annotations

import pytest
import torch

import fastproto
from fastproto import _native
from fastproto.ops.update import update

pytestmark = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 24), (3000, 10, 130), (5000, 2, 7), (0, 5, 3)])
def test_the_bits_of_the_reference(n: int, k: int, d: int, dtype: torch.dtype, weighted: bool) -> None:
    x = (torch.randn(n, d) * 100).to(dtype)
    labels = torch.randint(-1, k, (n,))
    x[labels < 0] = torch.nan
    weights = torch.rand(n, dtype=torch.float64) if weighted else None
    with fastproto.backend("reference"):
        expected = update(x, labels, k, weights)
    isa, threads = _native.cpp.isa(), torch.get_num_threads()
    try:
        for one in _native.cpp.supported_isas():
            _native.cpp.set_isa(one)
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                with fastproto.backend("cpp"):
                    assert all(map(torch.equal, update(x, labels, k, weights), expected)), (one, number)
    finally:
        _native.cpp.set_isa(isa)
        torch.set_num_threads(threads)


def test_any_strides() -> None:
    x, labels, weights = torch.randn(24, 66), torch.randint(-1, 5, (66,)), torch.rand(66)
    expected = update(x.T[::2].contiguous(), labels[::2].contiguous(), 5, weights[::2].contiguous())
    assert all(map(torch.equal, update(x.T[::2], labels[::2], 5, weights[::2]), expected))
    sums, _ = update(torch.ones(1, 24).expand(33, -1), torch.zeros(33, dtype=torch.int64), 1)
    assert sums.eq(33).all()


def test_one_cluster_shared_by_all_threads() -> None:
    x = torch.randint(-1000, 1000, (20_000, 9)).float()
    sums, counts = update(x, torch.full((20_000,), 3), 5)
    assert torch.equal(sums[3], x.double().sum(0))
    assert counts.tolist() == [0, 0, 0, 20_000, 0]
