"""search: the few nearest of many vectors for every row, without the N x K matrix of distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import expect, expect_tensor, is_integer
from fastproto.ops._dispatch import Op, contiguous_rows
from fastproto.ops.assign import METRICS
from fastproto.reference import search as reference


def search(
    x: Tensor,  # (N, D) float
    vectors: Tensor,  # (K, D) float
    count: int,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    """Labels (N, count) int64 and distances (N, count) float32 of the nearest vectors, the nearest first.

    Distances are squared, or inner products; of equal ones, as float32, the lowest index comes first. Exact: what is
    found are the nearest in float64. Rows of NaN find nothing of use, at distances that are not finite. Not
    differentiable.

    Args:
        count: how many, from 1 to K.
        metric: "l2", or "ip" for the largest inner products.

    Raises:
        TypeError: ``x`` or ``vectors`` is not a float tensor.
        ValueError: shapes, devices, ``count`` or ``metric`` do not fit.
    """
    expect(metric in METRICS, "search", "metric", '"l2" or "ip"', metric)
    expect_tensor(x, "search", "x", ("N", "D"))
    expect_tensor(vectors, "search", "vectors", ("K", x.shape[1]), device=x.device)
    expect(vectors.numel() > 0, "search", "vectors", "at least one vector of at least one dimension", vectors)
    fits = is_integer(count) and 1 <= count <= len(vectors)
    expect(fits, "search", "count", f"1 to the {len(vectors)} vectors", count)
    labels, distance = _op(x.detach(), vectors.detach(), count, metric)
    return labels, distance


def _cpp(x: Tensor, vectors: Tensor, count: int, metric: str) -> tuple[Tensor, Tensor]:
    if torch.float64 in (x.dtype, vectors.dtype):
        return reference.search(x, vectors, count, metric)
    assert _native.cpp is not None
    labels, distance = _fake(x, vectors, count)
    rows = contiguous_rows(x.float().resolve_neg())
    others = vectors.float().resolve_neg().contiguous()
    sizes = (len(rows), *others.shape, count, rows.stride(0), metric == "ip")
    addresses = [tensor.data_ptr() for tensor in (rows, others, labels, distance)]
    _native.cpp.search(sizes, addresses, torch.get_num_threads())
    return labels, distance


_op = Op(
    "search",
    "(Tensor x, Tensor vectors, SymInt count, str metric) -> (Tensor, Tensor)",
    reference=reference.search,
    cpp=_cpp,
)


@_op.fake
def _fake(x: Tensor, vectors: Tensor, count: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], count)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)
