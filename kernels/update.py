# mypy: allow-untyped-defs
"""The sum and the number of the rows that carry each label, the same bits in any order.

    sums_kd = Σ_{n: label_n = k} w_n x_nd        counts_k = Σ_{n: label_n = k} w_n

each as Σ [v] and Σ [v - [v]]', where [v] = (v + r) - r. N rows, K clusters, D dimensions; r, given in float64, is so
large that the bracketed numbers lie on a grid on which float64 adds up all of them without an error, and r' does the
same for what that leaves (reference/update.py). Rows labelled -1 are not read. A label beyond the clusters, which only
debug mode refuses on a GPU, adds to nothing.

The rows are taken in the order of their labels. A program walks through a stretch of them, keeps the sum of a run of
equal labels in registers, and adds it to memory where the run ends: N · D numbers are read once, and 2 (K + N / RUN) D
are added. These additions are atomic, as a run may go on in the next program, and **keep the bits from run to run only
because no addition rounds**: products and roundings are therefore not contracted into multiply-adds.

In memory are the labels in order and where they came from, 12 bytes a row. Source: the grid is that of reproducible
summation (Demmel and Nguyen, "Fast reproducible floating-point summation", ARITH 2013); the rest is ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program, and the most columns of one.
RUN, COLUMNS = 64, 256


@triton.jit
def split(values, rounder, fine_rounder):
    """Both parts of numbers: [v] and [v - [v]]'."""
    coarse = (values + rounder) - rounder
    return coarse, ((values - coarse) + fine_rounder) - fine_rounder


@triton.jit
def flush(sums_ptr, counts_ptr, label, K, D, coarse_d, fine_d, count, fine_count, mask_d, counting):
    """Adds the sums of a run of equal labels to those of its cluster, and its counts if counting."""
    known = (label >= 0) & (label < K)
    fine_label = label + K
    tl.atomic_add(sums_ptr + label * D, coarse_d, mask=mask_d & known, sem="relaxed")
    tl.atomic_add(sums_ptr + fine_label * D, fine_d, mask=mask_d & known, sem="relaxed")
    tl.atomic_add(counts_ptr + label, count, mask=counting & known, sem="relaxed")
    tl.atomic_add(counts_ptr + fine_label, fine_count, mask=counting & known, sem="relaxed")


@triton.jit(do_not_specialize=["N", "K"])
def _update_kernel(
    x_ptr,  # (N, D) at stride_xn, stride_xd
    label_ptr,  # (N,) int32, ascending
    place_ptr,  # (N,) int64: the row that each of them belongs to
    weight_ptr,  # (N,) at stride_w, or None
    rounder_ptr,  # (2, 2) float64: coarse and fine, of w x and of w
    sums_ptr,  # (2, K, D) float64: coarse and fine
    counts_ptr,  # (2, K) float64
    N,
    K,
    stride_xn,
    stride_xd,
    stride_w,
    D: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds RUN of the ordered rows to their clusters: COLUMNS columns a program, the first of which counts."""
    offs_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask_d = offs_d < D
    x_ptr += offs_d.to(tl.int64) * stride_xd
    sums_ptr += offs_d
    counting = tl.program_id(1) == 0
    x_rounder, w_rounder = tl.load(rounder_ptr), tl.load(rounder_ptr + 1)
    fine_x_rounder, fine_w_rounder = tl.load(rounder_ptr + 2), tl.load(rounder_ptr + 3)
    begin = tl.program_id(0).to(tl.int64) * RUN
    end = tl.minimum(begin + RUN, N)

    label = tl.load(label_ptr + begin).to(tl.int64)
    coarse_d, fine_d = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
    count, fine_count = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for n in range(begin, end):
        here = tl.load(label_ptr + n).to(tl.int64)
        if here != label:
            flush(sums_ptr, counts_ptr, label, K, D, coarse_d, fine_d, count, fine_count, mask_d, counting)
            label = here
            coarse_d, fine_d = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
            count, fine_count = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
        row = tl.load(place_ptr + n)
        x_d = tl.load(x_ptr + row * stride_xn, mask=mask_d & (here >= 0), other=0.0).to(tl.float64)
        w = tl.full((), 1.0, tl.float64)
        if HAS_WEIGHTS:
            w = tl.load(weight_ptr + row * stride_w).to(tl.float64)
            x_d *= w
        more_d, fine_more_d = split(x_d, x_rounder, fine_x_rounder)
        more, fine_more = split(w, w_rounder, fine_w_rounder)
        coarse_d += more_d
        fine_d += fine_more_d
        count += more
        fine_count += fine_more
    flush(sums_ptr, counts_ptr, label, K, D, coarse_d, fine_d, count, fine_count, mask_d, counting)


def update(
    x: Tensor,  # (N, D) float
    labels: Tensor,  # (N,) int64
    num_clusters: int,
    weights: Tensor | None,  # (N,) float
    rounders: Tensor,  # (2, 2) float64: coarse and fine, of w x and of w
) -> tuple[Tensor, Tensor]:
    """The coarse and the fine part of the sums (2, K, D) and of the counts (2, K), float64."""
    n, d = x.shape
    sums = torch.zeros(2, num_clusters, d, dtype=torch.float64, device=x.device)
    counts = torch.zeros(2, num_clusters, dtype=torch.float64, device=x.device)
    if n == 0:
        return sums, counts
    # 32 bits are half the work of sorting 64; what 32 cannot hold is beyond the clusters.
    ordered, places = labels.clamp(-1, num_clusters).int().sort()
    columns = min(COLUMNS, triton.next_power_of_2(d))
    stride_w = 0 if weights is None else weights.stride(0)
    with torch.cuda.device_of(x):
        _update_kernel[triton.cdiv(n, RUN), triton.cdiv(d, columns)](
            x, ordered, places, weights, rounders.contiguous(), sums, counts, n, num_clusters, *x.stride(), stride_w,
            D=d, HAS_WEIGHTS=weights is not None, RUN=RUN, COLUMNS=columns, num_warps=max(1, columns // 128),
            enable_fp_fusion=False,
        )  # fmt: skip
    return sums, counts
