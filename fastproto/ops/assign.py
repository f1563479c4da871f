"""assign: the nearest centre of every row, without the N x K matrix of distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import expect, expect_tensor
from fastproto.ops._dispatch import DTYPE_CODES, Op, contiguous_rows
from fastproto.reference import assign as reference

METRICS = ("l2", "ip")


def assign(
    x: Tensor,  # (N, D) float
    centers: Tensor,  # (K, D) float
    metric: str = "l2",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int64 and distances (N,) float32: squared L2 to the nearest centre, or the largest inner product.

    Ties go to the lowest index. Exact: a label differs from the float64 one only where two distances differ by less
    than float32 rounding. Rows of NaN get a distance of NaN and no useful label. Not differentiable.

    Args:
        metric: "l2", or "ip" for the inner product.
        exact: False believes the screen; docs/math/assign.md states the error.

    Raises:
        TypeError: ``x`` or ``centers`` is not a float tensor.
        ValueError: shapes, devices or ``metric`` do not fit.
    """
    expect(metric in METRICS, "assign", "metric", '"l2" or "ip"', metric)
    expect_tensor(x, "assign", "x", ("N", "D"))
    expect_tensor(centers, "assign", "centers", ("K", x.shape[1]), device=x.device)
    expect(centers.numel() > 0, "assign", "centers", "at least one centre of at least one dimension", centers)
    labels, distance = _op(x.detach(), centers.detach(), metric, exact)
    return labels, distance


def _cpp(x: Tensor, centers: Tensor, metric: str, exact: bool) -> tuple[Tensor, Tensor]:
    if torch.float64 in (x.dtype, centers.dtype):
        return reference.assign(x, centers, metric, exact)
    labels, distance = _fake(x)
    launch(x, centers, metric, exact, labels, distance)
    return labels, distance


def launch(x: Tensor, centers: Tensor, metric: str, exact: bool, *rest: Tensor) -> None:
    """Calls the C++ kernel; ``rest`` are the tensors from label on in the order of csrc/assign/assign.h."""
    assert _native.cpp is not None
    x = contiguous_rows(x.resolve_neg())
    tensors = (x, centers.float().resolve_neg().contiguous(), *rest)
    sizes = (len(x), *centers.shape, x.stride(0), DTYPE_CODES[x.dtype], metric == "ip", exact)
    addresses = [tensor.data_ptr() for tensor in tensors]
    _native.cpp.assign(sizes, addresses + [0] * (9 - len(addresses)), torch.get_num_threads())


def _triton(x: Tensor, centers: Tensor, metric: str, exact: bool) -> tuple[Tensor, Tensor]:
    if torch.float64 in (x.dtype, centers.dtype):
        return reference.assign(x, centers, metric, exact)
    from fastproto.kernels.assign import assign

    return assign(x, centers, metric, exact)


_op = Op(
    "assign",
    "(Tensor x, Tensor centers, str metric, bool exact) -> (Tensor, Tensor)",
    reference=reference.assign,
    cpp=_cpp,
    triton=_triton,
)


@_op.fake
def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)
