"""update: sums and counts of the rows that carry each label, the same bits in any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import INTEGERS, expect, expect_index, expect_tensor
from fastproto.ops._dispatch import DTYPE_CODES, Op, contiguous_rows
from fastproto.reference import update as reference
from fastproto.reference.update import round_to_grid as round_to_grid
from fastproto.reference.update import rounder as rounder
from fastproto.reference.update import two_rounders as two_rounders


def update(
    x: Tensor,  # (N, D) float
    labels: Tensor,  # (N,) int64 or int32
    num_clusters: int,
    weights: Tensor | None = None,  # (N,) float
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and counts (K,), both float64: Σ w_n x_n and Σ w_n over the rows n of each label.

    Rows labelled -1 are left out. The same bits from run to run, for any number of threads, and on every device: each
    w x is first rounded to a multiple of about N² · max |w x| · 2^-102, in two parts that add up without an error. Not
    differentiable.

    Raises:
        TypeError: an argument is not a tensor of the right dtype.
        ValueError: shapes or devices do not fit, or (where data is read) a label is outside -1 ... K - 1.
    """
    expect(num_clusters >= 1, "update", "num_clusters", "at least 1", num_clusters)
    expect_tensor(x, "update", "x", ("N", "D"))
    expect_tensor(labels, "update", "labels", (x.shape[0],), INTEGERS, x.device)
    expect(x.shape[1] >= 1, "update", "x", "at least one dimension", x)
    if weights is not None:
        expect_tensor(weights, "update", "weights", (x.shape[0],), device=x.device)
    expect_index(labels, "update", "labels", num_clusters, -1)
    kept = torch.where((labels >= 0)[:, None], x, 0)
    rounders = two_rounders(torch.stack(largest(kept, weights)), len(x))
    sums, counts = update_parts(x, labels, num_clusters, weights, rounders)
    return sums.sum(0), counts.sum(0)


def update_parts(
    x: Tensor,  # (N, D) float
    labels: Tensor,  # (N,) int64 or int32
    num_clusters: int,
    weights: Tensor | None,  # (N,) float
    rounders: Tensor,  # (2, 2) float64
) -> tuple[Tensor, Tensor]:
    """Coarse and fine sums (2, K, D) and counts (2, K) of some of the rows, float64, of arguments that were checked.

    Those of several parts add up, bit by bit, to those of the whole, for which ``rounders`` are :func:`two_rounders`.
    """
    sums, counts = _op(x.detach(), labels.long(), num_clusters, weights, rounders)
    return sums, counts


def largest(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """max |w x| and max |w|, each () float64: what :func:`rounder` is made of."""
    one = x.new_ones((), dtype=torch.float64)
    if not len(x):
        return torch.zeros_like(one), one
    if weights is None:
        low, high = x.aminmax()
        return torch.maximum(high, -low).double(), one
    row_n = torch.maximum(x.amax(1), -x.amin(1)).double()
    return (row_n * weights.abs()).max(), weights.double().abs().max()


def _cpp(
    x: Tensor, labels: Tensor, num_clusters: int, weights: Tensor | None, rounders: Tensor
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.update(x, labels, num_clusters, weights, rounders)
    assert _native.cpp is not None
    x = contiguous_rows(x)
    sums, counts = (total.zero_() for total in _fake(x, labels, num_clusters))
    weights = None if weights is None else weights.double().contiguous()
    tensors = (x, labels.contiguous(), weights, rounders.contiguous(), sums, counts)
    _native.cpp.update(
        (len(x), num_clusters, x.shape[1], x.stride(0), DTYPE_CODES[x.dtype]),
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        torch.get_num_threads(),
    )
    return sums, counts


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from fastproto.kernels.update import update

    return update(*args)


_op = Op(
    "update",
    "(Tensor x, Tensor labels, int num_clusters, Tensor? weights, Tensor rounders) -> (Tensor, Tensor)",
    reference=reference.update,
    cpp=_cpp,
    triton=_triton,
)


@_op.fake
def _fake(x: Tensor, labels: Tensor, num_clusters: int, *_: Any) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(2, num_clusters, x.shape[1], dtype=torch.float64)
    return sums, x.new_empty(2, num_clusters, dtype=torch.float64)
