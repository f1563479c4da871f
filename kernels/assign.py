# mypy: allow-untyped-defs
"""The nearest centre of every row: proven bounds from half precision, and an exact look where they leave it open.

    v_nk = ½||x_n - c_k||²  (l2)        v_nk = -<x_n, c_k>  (ip)        label_n = argmin_k v_nk, the first of equals

N rows, K centres, D dimensions. assign_screen.py bounds every score from below by a product in float16. Of each row it
keeps a few groups of centres with low bounds, and the lowest bound of all others.

Settle takes v of the kept groups from differences in float64, the lowest bound first, until the next lies above the
best v. Where that of all others does too, no other centre can be as near, and this is the label. Resolve streams the
centres once more past the rows that are left, and does the same with all groups. Which rows these are stays on the
device.

In memory are the rows in float16 and some 200 bytes for each, never (N, K). No atomic: the same bits every run.
docs/math/assign.md, "The GPU screen", has the proof.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastproto.kernels._tiles import INF, Tile, processors
from fastproto.kernels.assign_screen import MEMBERS, first_of_group, group_minima, screen
from torch import Tensor

# Rows of a program, and columns at a time: what their groups leave room for in registers.
SETTLE_ROWS, SETTLE_COLUMNS, SETTLE_WARPS = 16, 16, 8
RESOLVE_ROWS, RESOLVE_COLUMNS, RESOLVE_WARPS = 16, 8, 8
RESOLVE_BLOCK_D = 128  # columns of a product at a time
RESOLVE_PROGRAMS = 2  # for each processor: as many as its registers hold
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def nearest_of_group(
    x_ptr,
    stride_xn,
    stride_xd,
    row_n,  # int64
    mask_n,
    c_ptr,
    K,
    first_n,  # the lowest centre of the row's group
    best_n,  # float64: the least v so far,
    label_n,  # int32: and its centre
    D: tl.constexpr,
    IP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The least v and its centre, one group later. Equal centres get equal bits, so that the lowest is found."""
    BLOCK_N: tl.constexpr = best_n.shape[0]
    member = tl.arange(0, MEMBERS)
    center_nm = first_n[:, None] + (member // 2 * 8 + member % 2)[None, :]
    mask_nm = mask_n[:, None] & (center_nm < K)
    v_nmd = tl.zeros((BLOCK_N, MEMBERS, COLUMNS), tl.float64)
    for start_d in range(0, D, COLUMNS):
        offs_d = start_d + tl.arange(0, COLUMNS)
        mask_d = offs_d < D
        x_nd = tl.load(
            x_ptr + row_n[:, None] * stride_xn + offs_d.to(tl.int64)[None, :] * stride_xd,
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float64)[:, None, :]
        c_nmd = tl.load(
            c_ptr + center_nm.to(tl.int64)[:, :, None] * D + offs_d[None, None, :],
            mask=mask_nm[:, :, None] & mask_d[None, None, :],
            other=0.0,
        ).to(tl.float64)
        if IP:
            v_nmd -= x_nd * c_nmd
        else:
            v_nmd += (x_nd - c_nmd) * (x_nd - c_nmd)
    v_nm = tl.sum(v_nmd, 2)
    v_nm = tl.where(mask_nm, v_nm if IP else v_nm / 2, INF)
    least_n = tl.min(v_nm, 1)
    nearest_n = tl.min(tl.where(mask_nm & (v_nm == least_n[:, None]), center_nm, NONE), 1)
    # A row of NaN has no least v, and stays as it was.
    better_n = (least_n < best_n) | ((least_n == best_n) & (nearest_n < label_n))
    return tl.where(better_n, least_n, best_n), tl.where(better_n, nearest_n, label_n)


@triton.jit
def limit_of(unit_n, base_n, best_n, D: tl.constexpr, IP: tl.constexpr):
    """What the bound V of a centre as near as the best one cannot exceed."""
    # Squares in float64 are that exact; an inner product is not, and base_n knows it.
    return base_n + unit_n * best_n * (1.0 if IP else 1 + D * 2.0**-50)


@triton.jit
def look(
    x_ptr,
    stride_xn,
    stride_xd,
    row_n,  # int64
    c_ptr,
    K,
    low_ng,  # float64: bounds V of groups, INF for one that is not to be looked at
    first_ng,  # int32: the lowest centre of each group
    unit_n,
    base_n,
    limit_n,  # float64: a larger V is of no interest
    best_n,  # float64: the least v so far
    label_n,  # int32: and its centre
    D: tl.constexpr,
    IP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Takes v of a group of every row, the lowest bound first, while any bound is within its row's limit."""
    GROUPS: tl.constexpr = low_ng.shape[1]
    group = tl.arange(0, GROUPS)[None, :]
    low_n = tl.min(low_ng, 1)
    wanted_n = (low_n <= limit_n) & (low_n < INF)
    while tl.max(wanted_n.to(tl.int32), 0) > 0:
        here_n = tl.min(tl.where(low_ng == low_n[:, None], group, GROUPS), 1)
        here_ng = group == here_n[:, None]
        first_n = tl.sum(tl.where(here_ng, first_ng, 0), 1)
        best_n, label_n = nearest_of_group(
            x_ptr, stride_xn, stride_xd, row_n, wanted_n, c_ptr, K, first_n, best_n, label_n, D, IP, COLUMNS
        )
        limit_n = tl.minimum(limit_n, limit_of(unit_n, base_n, best_n, D, IP))
        low_ng = tl.where(here_ng, INF, low_ng)
        low_n = tl.min(low_ng, 1)
        wanted_n = (low_n <= limit_n) & (low_n < INF)
    return best_n, label_n, limit_n


@triton.jit
def store_nearest(label_ptr, distance_ptr, row_n, mask_n, best_n, label_n, IP: tl.constexpr):
    """Writes label and distance of rows by their least v; the distance is NaN where no v was found."""
    distance_n = -best_n if IP else 2 * best_n
    tl.store(label_ptr + row_n, label_n.to(tl.int64), mask=mask_n)
    tl.store(distance_ptr + row_n, tl.where(best_n < INF, distance_n, float("nan")).to(tl.float32), mask=mask_n)


@triton.jit(do_not_specialize=["N", "K"])
def _settle_kernel(
    x_ptr,  # (N, D) at stride_xn, stride_xd
    c_ptr,  # (K, D) float32, contiguous
    low_ptr,  # (padded N, BLOCK_K / MEMBERS) float32: the least V of each class,
    block_ptr,  # (padded N, BLOCK_K / MEMBERS) int32: and the block of its group
    second_ptr,  # (padded N,) float32: the least V of all other groups
    unit_ptr,  # (padded N,) float64: see _pack_rows_kernel
    base_ptr,  # (padded N,) float64
    label_ptr,  # (N,) int64
    distance_ptr,  # (N,) float32
    limit_ptr,  # (N,) float64: no centre with a larger V is as near as the label
    open_ptr,  # (N,) int32: 1 where another group may hold a nearer one
    N,
    K,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    IP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SETTLE_ROWS: tl.constexpr,
    SETTLE_COLUMNS: tl.constexpr,
):
    """The nearest centre in the kept groups, and whether another group may still win: SETTLE_ROWS rows a program.

    Not EXACT, only the group of the lowest bound is looked at, and no row stays open.
    """
    GROUPS: tl.constexpr = BLOCK_K // MEMBERS
    row_n = tl.program_id(0).to(tl.int64) * SETTLE_ROWS + tl.arange(0, SETTLE_ROWS)
    mask_n = row_n < N
    group = tl.arange(0, GROUPS)[None, :]
    at_ng = row_n[:, None] * GROUPS + group
    low_ng = tl.load(low_ptr + at_ng, mask=mask_n[:, None], other=INF).to(tl.float64)
    first_ng = first_of_group(tl.load(block_ptr + at_ng, mask=mask_n[:, None], other=0), group, BLOCK_K)
    if not EXACT:
        low_ng = tl.where(low_ng == tl.min(low_ng, 1)[:, None], low_ng, INF)
    unit_n = tl.load(unit_ptr + row_n, mask=mask_n, other=1.0)
    base_n = tl.load(base_ptr + row_n, mask=mask_n, other=0.0)
    limit_n = tl.full((SETTLE_ROWS,), INF, tl.float64)
    best_n = tl.full((SETTLE_ROWS,), INF, tl.float64)
    label_n = tl.zeros((SETTLE_ROWS,), tl.int32)
    best_n, label_n, limit_n = look(
        x_ptr, stride_xn, stride_xd, row_n, c_ptr, K, low_ng, first_ng, unit_n, base_n, limit_n, best_n, label_n,
        D, IP, SETTLE_COLUMNS,
    )  # fmt: skip
    store_nearest(label_ptr, distance_ptr, row_n, mask_n, best_n, label_n, IP)
    if EXACT:
        second_n = tl.load(second_ptr + row_n, mask=mask_n, other=INF)
        tl.store(limit_ptr + row_n, limit_n, mask=mask_n)
        tl.store(open_ptr + row_n, ((best_n < INF) & (second_n <= limit_n)).to(tl.int32), mask=mask_n)


@triton.jit(do_not_specialize=["N", "K", "blocks"])
def _resolve_kernel(
    x_ptr,
    c_ptr,
    rows_ptr,  # (N,) int64: the open rows, then N
    count_ptr,  # (N,) int64: how many are open is the last of them
    q_ptr,  # (padded N, WIDTH) float16: these two and the next two as in _screen_kernel
    coef_ptr,
    qc_ptr,  # (blocks · BLOCK_K, WIDTH) float16
    vector_ptr,
    unit_ptr,  # these and the next as in _settle_kernel
    base_ptr,
    label_ptr,
    distance_ptr,
    limit_ptr,
    N,
    K,
    blocks,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    IP: tl.constexpr,
    WIDTH: tl.constexpr,
    RESOLVE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESOLVE_COLUMNS: tl.constexpr,
):
    """The open rows again, against every group: RESOLVE_ROWS at a time, in turn to the programs."""
    group = tl.arange(0, BLOCK_K // MEMBERS)[None, :]
    count = tl.load(count_ptr + N.to(tl.int64) - 1)
    for start in range(tl.program_id(0).to(tl.int64) * RESOLVE_ROWS, count, tl.num_programs(0) * RESOLVE_ROWS):
        offs_n = start + tl.arange(0, RESOLVE_ROWS)
        mask_n = offs_n < count
        row_n = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
        unit_n, base_n = tl.load(unit_ptr + row_n), tl.load(base_ptr + row_n)
        limit_n = tl.load(limit_ptr + row_n)
        # Settled groups are looked at again: two kernels may add up equal centres to different bits.
        best_n = tl.full((RESOLVE_ROWS,), INF, tl.float64)
        label_n = tl.zeros((RESOLVE_ROWS,), tl.int32)
        coef_n = tl.load(coef_ptr + row_n)
        row_ptr_n = q_ptr + row_n * WIDTH
        q_nd = tl.load(row_ptr_n[:, None] + tl.arange(0, BLOCK_D)[None, :])
        for block in range(blocks):
            at = block * BLOCK_K
            low_ng = group_minima(
                q_nd, row_ptr_n, coef_n, qc_ptr + at.to(tl.int64) * WIDTH, vector_ptr + at, WIDTH, BLOCK_K, BLOCK_D
            )
            low_ng = tl.where(mask_n[:, None], low_ng.to(tl.float64), INF)
            first_ng = tl.broadcast_to(first_of_group(block, group, BLOCK_K), low_ng.shape)
            best_n, label_n, limit_n = look(
                x_ptr, stride_xn, stride_xd, row_n, c_ptr, K, low_ng, first_ng, unit_n, base_n, limit_n, best_n,
                label_n, D, IP, RESOLVE_COLUMNS,
            )  # fmt: skip
        store_nearest(label_ptr, distance_ptr, row_n, mask_n, best_n, label_n, IP)


def assign(
    x: Tensor,  # (N, D) float32, float16 or bfloat16
    centers: Tensor,  # (K, D) likewise
    metric: str,
    exact: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int64 and distances (N,) float32; the tile is for tests.

    Not exact, a row is left with the best centre of the group of the lowest bound: its v exceeds the least by at most
    twice the error of the bound, in all some 2^-10 ||x|| ||c|| with both taken from the origin.
    """
    n, k, d = len(x), *centers.shape
    label = torch.empty(n, dtype=torch.int64, device=x.device)
    distance = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0:
        return label, distance
    centers = centers.float().contiguous()
    flags = {"D": d, "IP": metric == "ip"}
    with torch.cuda.device_of(x):
        found = screen(x, centers, metric == "ip", tile)
        limit = torch.empty(n if exact else 0, dtype=torch.float64, device=x.device)
        undecided = torch.empty(n if exact else 0, dtype=torch.int32, device=x.device)
        _settle_kernel[triton.cdiv(n, SETTLE_ROWS),](
            x, centers, found.low, found.block, found.second, found.unit, found.base, label, distance, limit, undecided,
            n, k, *x.stride(), EXACT=exact, BLOCK_K=found.tile.block_k, SETTLE_ROWS=SETTLE_ROWS,
            SETTLE_COLUMNS=SETTLE_COLUMNS, num_warps=SETTLE_WARPS, **flags,
        )  # fmt: skip
        if exact:
            count = undecided.cumsum(0)
            # The i-th open row is the first with i open ones up to it.
            rows = torch.searchsorted(count, torch.arange(1, n + 1, device=x.device))
            block_k, block_d = found.tile.block_k, min(found.tile.block_d, RESOLVE_BLOCK_D)
            _resolve_kernel[min(triton.cdiv(n, RESOLVE_ROWS), RESOLVE_PROGRAMS * processors(x.device)),](
                x, centers, rows, count, found.rows, found.coef, found.centers, found.vector, found.unit, found.base,
                label, distance, limit, n, k, len(found.vector) // block_k, *x.stride(), WIDTH=found.rows.shape[1],
                BLOCK_K=block_k, BLOCK_D=block_d, RESOLVE_ROWS=RESOLVE_ROWS, RESOLVE_COLUMNS=RESOLVE_COLUMNS,
                num_warps=RESOLVE_WARPS, num_stages=2, **flags,
            )  # fmt: skip
    return label, distance
