"""Sums and distances of single rows, whose bits do not depend on how many rows are computed at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproto.ops.assign import assign

# Elements at a time: what stays in a CPU's cache.
CHUNK_ELEMENTS = 1 << 18


def sum_rows(values: Tensor) -> Tensor:
    """Σ_d v_nd of contiguous rows (n, D): (n,). Overwrites ``values``."""
    if not values.is_cuda:
        return values.sum(1)
    # A GPU's sum along the rows adds in an order that follows their number and their addresses. Halves added to halves,
    # column by column, do not.
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0]


def squared_distances(
    x: Tensor,  # (n, D) float
    center: Tensor,  # (D,) float32 or float64
    scale: Tensor | None = None,  # (n,) of the same dtype
) -> Tensor:
    """||s_n x_n - c||² (n,) in the dtype of ``center``, from the differences: no digits are lost to a common offset."""
    if x.is_cuda and scale is None:
        return assign(x, center[None])[1].to(center.dtype)
    out = torch.zeros(len(x), dtype=center.dtype, device=x.device)
    chunk = max(1, min(len(x), CHUNK_ELEMENTS // x.shape[1]))
    buffer = torch.empty(chunk, x.shape[1], dtype=center.dtype, device=x.device)
    for start in range(0, len(x), chunk):
        here = slice(start, start + chunk)
        difference_nd = buffer[: len(out[here])]
        if scale is None:
            torch.sub(x[here], center, out=difference_nd)
        else:
            torch.mul(x[here], scale[here, None], out=difference_nd).sub_(center)
        out[here] = sum_rows(difference_nd.square_())
    return out
