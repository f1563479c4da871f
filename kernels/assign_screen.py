# mypy: allow-untyped-defs
"""Proven lower bounds of the scores of all centres, by a product in half precision.

    S_nk = σ_n τ (½||c_k||² - <x_n, c_k>)  (l2)        S_nk = -σ_n τ <x_n, c_k>  (ip)        both up to a number per row

N rows, K centres, D dimensions. An origin is taken off the centres, and off the rows for l2; σ_n and τ are powers of
two that make the most of float16, to which both are then rounded. Their product gives, for one multiply-add a score,

    V_nk = coef_n · vector_k - <x̂_n, ĉ_k>        V_nk - κ_n ≤ S_nk

A block of BLOCK_K centres holds BLOCK_K / 8 groups; those at one place of their blocks form a class. The screen keeps,
of each row and class, the group with the least V and that V, and the least V of all groups that are not among those.
docs/math/assign.md, "The GPU screen", has the proof. In memory are the rounded rows and some 150 bytes for each. No
atomic, no number that the host waits for: the same bits every run.

Source: the bounds are ours; the loop is that of contrast_fwd.py without its second product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastproto.kernels._tiles import INF, Tile, tile_for
from torch import Tensor

# The centres of a group: 4 pairs of neighbours, 8 apart.
MEMBERS = tl.constexpr(8)
PACK_ROWS, PACK_COLUMNS = 16, 64
SAMPLE = 1024  # centres whose median is the origin
# Scaled, the largest number of a row, and of the centres, is at least 2^TOP and less than twice that.
TOP = tl.constexpr(14)


@triton.jit
def power_to_top(largest):
    """The power of two that takes float64 ``largest`` into [2^TOP, 2^(TOP + 1)); a large one for 0."""
    exponent = tl.maximum(largest.to(tl.int64, bitcast=True) >> 52, 1023 - 256)
    return ((-exponent + (2 * 1023 + TOP)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def load_shifted(x_ptr, row_n, stride_n, stride_d, origin_ptr, mask_n, offs_d, D: tl.constexpr, SHIFT: tl.constexpr):
    """Rows less the origin in float64, without an error that matters: both are float32 at most; 0 where masked."""
    mask_nd = mask_n[:, None] & (offs_d < D)[None, :]
    x_nd = tl.load(x_ptr + row_n[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask_nd, other=0.0)
    x_nd = x_nd.to(tl.float64)
    if SHIFT:
        origin_d = tl.load(origin_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float64)
        x_nd = tl.where(mask_nd, x_nd - origin_d[None, :], 0.0)
    return x_nd


@triton.jit(do_not_specialize=["K", "padded"])
def _pack_centers_kernel(
    c_ptr,  # (K, D) float32, contiguous
    origin_ptr,  # (D,) float32
    reach_ptr,  # () float64: the largest |c - origin|
    q_ptr,  # (padded, WIDTH) float16: -τ(c - origin), rounded; 0 beyond K and D
    vector_ptr,  # (padded,) float32: ½||ĉ||² or, for ip, ||ĉ||; what no row takes beyond K
    norm_ptr,  # (padded,) float32: ||ĉ||
    ratio_ptr,  # (padded,) float32: the error of rounding as a share of the norm
    K,
    padded,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    IP: tl.constexpr,
    FLUSHED: tl.constexpr,  # ζ of docs/math/assign.md
    PACK_ROWS: tl.constexpr,
    PACK_COLUMNS: tl.constexpr,
):
    """The centres in float16, their part of V, and what rounding took from them: PACK_ROWS centres a program."""
    row_n = tl.program_id(0).to(tl.int64) * PACK_ROWS + tl.arange(0, PACK_ROWS)
    mask_n = row_n < K
    scale = power_to_top(tl.load(reach_ptr))
    square_nd = tl.zeros((PACK_ROWS, PACK_COLUMNS), tl.float64)
    error_nd = tl.zeros((PACK_ROWS, PACK_COLUMNS), tl.float64)
    for start_d in range(0, WIDTH, PACK_COLUMNS):
        offs_d = start_d + tl.arange(0, PACK_COLUMNS)
        c_nd = load_shifted(c_ptr, row_n, D, 1, origin_ptr, mask_n, offs_d, D, True) * scale
        q_nd = c_nd.to(tl.float16)
        at_nd = row_n[:, None] * WIDTH + offs_d[None, :]
        tl.store(q_ptr + at_nd, -q_nd, mask=(row_n < padded)[:, None] & (offs_d < WIDTH)[None, :])
        error = c_nd - q_nd.to(tl.float64)
        square_nd += c_nd * c_nd
        error_nd += error * error
    norm_n = tl.sqrt(tl.sum(square_nd, 1))
    # What float16 cannot hold beside much larger centres is in κ, not in the share.
    ratio_n = tl.maximum(tl.sqrt(tl.sum(error_nd, 1)) - FLUSHED, 0.0) / tl.maximum(norm_n, 1e-30)
    if IP:  # noqa: SIM108
        vector_n = tl.where(mask_n, norm_n * (1 + 2.0**-22), -INF)
    else:
        vector_n = tl.where(mask_n, norm_n * norm_n / 2, INF)
    tl.store(vector_ptr + row_n, vector_n.to(tl.float32), mask=row_n < padded)
    tl.store(norm_ptr + row_n, norm_n.to(tl.float32), mask=row_n < padded)
    tl.store(ratio_ptr + row_n, ratio_n.to(tl.float32), mask=row_n < padded)


@triton.jit(do_not_specialize=["N", "padded"])
def _pack_rows_kernel(
    x_ptr,  # (N, D) at stride_xn, stride_xd
    origin_ptr,  # origin and reach as above
    reach_ptr,
    typical_ptr,  # () float32: a typical ||ĉ||
    ratio_ptr,  # () float32: the largest share lost by rounding a centre
    span_ptr,  # () float64: no centre is longer
    q_ptr,  # (padded, WIDTH) float16: σ_n x_n or σ_n (x_n - origin), rounded; 0 beyond N and D
    coef_ptr,  # (padded,) float32: V_nk = coef_n · vector_k - <x̂_n, ĉ_k>, x̂ and ĉ rounded
    unit_ptr,  # (padded,) float64: S_nk = unit_n · v + base_n - κ_n, where v is the score of the centre as given;
    base_ptr,  # (padded,) float64: κ_n is in it
    N,
    padded,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    IP: tl.constexpr,
    FLUSHED: tl.constexpr,
    PACK_ROWS: tl.constexpr,
    PACK_COLUMNS: tl.constexpr,
):
    """The rows in float16, their part of V, and how V bounds a score as given: PACK_ROWS rows a program."""
    row_n = tl.program_id(0).to(tl.int64) * PACK_ROWS + tl.arange(0, PACK_ROWS)
    mask_n = row_n < N
    largest_n = tl.zeros((PACK_ROWS,), tl.float64)
    for start_d in range(0, D, PACK_COLUMNS):
        offs_d = start_d + tl.arange(0, PACK_COLUMNS)
        x_nd = load_shifted(x_ptr, row_n, stride_xn, stride_xd, origin_ptr, mask_n, offs_d, D, not IP)
        largest_n = tl.maximum(largest_n, tl.max(tl.abs(x_nd), 1))
    center_scale = power_to_top(tl.load(reach_ptr))
    scale_n = power_to_top(largest_n)
    if not IP:
        # A row next to the origin: r · ½||ĉ||² shall stay in float32.
        scale_n = tl.minimum(scale_n, center_scale * 2.0**32)

    square_nd = tl.zeros((PACK_ROWS, PACK_COLUMNS), tl.float64)
    error_nd = tl.zeros((PACK_ROWS, PACK_COLUMNS), tl.float64)
    offset_nd = tl.zeros((PACK_ROWS, PACK_COLUMNS), tl.float64)
    for start_d in range(0, WIDTH, PACK_COLUMNS):
        offs_d = start_d + tl.arange(0, PACK_COLUMNS)
        x_nd = load_shifted(x_ptr, row_n, stride_xn, stride_xd, origin_ptr, mask_n, offs_d, D, not IP)
        if IP:
            origin_d = tl.load(origin_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float64)
            offset_nd -= x_nd * origin_d[None, :]
        else:
            offset_nd += x_nd * x_nd / 2
        x_nd *= scale_n[:, None]
        q_nd = x_nd.to(tl.float16)
        at_nd = row_n[:, None] * WIDTH + offs_d[None, :]
        tl.store(q_ptr + at_nd, q_nd, mask=(row_n < padded)[:, None] & (offs_d < WIDTH)[None, :])
        error = x_nd - q_nd.to(tl.float64)
        square_nd += x_nd * x_nd
        error_nd += error * error

    # Names as in docs/math/assign.md.
    norm_n, rounding_n = tl.sqrt(tl.sum(square_nd, 1)), tl.sqrt(tl.sum(error_nd, 1))
    unit_n = scale_n * center_scale
    gamma = (D + 16) * 2.0**-22
    e_n = (rounding_n + (norm_n + rounding_n) * (tl.load(ratio_ptr) + gamma)) * (1 + 2.0**-10) + 2.0**-24
    kappa_n = (norm_n + rounding_n) * (2 * FLUSHED) + 2.0**-50
    if IP:
        coef_n = -e_n
        slack_n = norm_n / scale_n * tl.load(span_ptr) * (D * 2.0**-50)
        base_n = kappa_n + unit_n * (slack_n - tl.sum(offset_nd, 1))
    else:
        r_n = scale_n / center_scale
        typical_n = tl.maximum(tl.load(typical_ptr), 8 * e_n / r_n)
        # Not 0, or the infinite bound of what is no centre would become NaN.
        coef_n = tl.maximum(r_n * (1 - gamma) - e_n / typical_n, 2.0**-100)
        kappa_n += e_n * typical_n / 2
        base_n = kappa_n - unit_n * tl.sum(offset_nd, 1) * (1 - D * 2.0**-50)
    tl.store(coef_ptr + row_n, coef_n.to(tl.float32), mask=row_n < padded)
    tl.store(unit_ptr + row_n, unit_n, mask=row_n < padded)
    tl.store(base_ptr + row_n, base_n, mask=row_n < padded)


@triton.jit
def group_minima(x_nd, row_ptr_n, coef_n, c_ptr, vector_ptr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """The least V_nk of every group of a block of centres: (BLOCK_N, BLOCK_K / MEMBERS).

    What tensor cores leave in the registers of a thread is whole groups, so that no minimum needs another thread.
    """
    here_k, here_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    BLOCK_N: tl.constexpr = coef_n.shape[0]
    scores_nk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if WIDTH == BLOCK_D:
        c_kd = tl.load(c_ptr + here_k[:, None] * WIDTH + here_d[None, :])
        scores_nk = tl.dot(x_nd, tl.trans(c_kd), scores_nk)
    else:
        for start_d in range(0, WIDTH, BLOCK_D):
            x_nd = tl.load(row_ptr_n[:, None] + (start_d + here_d)[None, :])
            c_kd = tl.load(c_ptr + here_k[:, None] * WIDTH + (start_d + here_d)[None, :])
            scores_nk = tl.dot(x_nd, tl.trans(c_kd), scores_nk)
    scores_nk += coef_n[:, None] * tl.load(vector_ptr + here_k)[None, :]
    grouped = tl.reshape(scores_nk, (BLOCK_N, BLOCK_K // (4 * MEMBERS), MEMBERS // 2, 4, 2))
    return tl.reshape(tl.min(tl.min(grouped, 4), 2), (BLOCK_N, BLOCK_K // MEMBERS))


@triton.jit
def first_of_group(block, group, BLOCK_K: tl.constexpr):
    """The lowest centre of a group in a block; its others are at + {0, 1} + 8 i."""
    return block * BLOCK_K + group // 4 * (4 * MEMBERS) + group % 4 * 2


@triton.jit(do_not_specialize=["blocks"])
def _screen_kernel(
    x_ptr,  # (padded N, WIDTH) float16
    coef_ptr,  # (padded N,) float32
    c_ptr,  # (blocks · BLOCK_K, WIDTH) float16
    vector_ptr,  # (blocks · BLOCK_K,) float32
    low_ptr,  # (padded N, GROUPS) float32: the least V of each class,
    block_ptr,  # (padded N, GROUPS) int32: and the block of its group
    second_ptr,  # (padded N,) float32: the least V of all other groups
    blocks,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of every row the group of least V in each class, and the least V of all others: BLOCK_N rows a program."""
    GROUPS: tl.constexpr = BLOCK_K // MEMBERS
    row_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr_n = x_ptr + row_n * WIDTH
    coef_n = tl.load(coef_ptr + row_n)
    x_nd = tl.load(row_ptr_n[:, None] + tl.arange(0, BLOCK_D)[None, :])

    # A class for each place in a block, so that the loop compares nothing across threads.
    best_ng = tl.full((BLOCK_N, GROUPS), INF, tl.float32)
    second_ng = tl.full((BLOCK_N, GROUPS), INF, tl.float32)
    block_ng = tl.zeros((BLOCK_N, GROUPS), tl.int32)
    for block in range(blocks):
        low_ng = group_minima(x_nd, row_ptr_n, coef_n, c_ptr, vector_ptr, WIDTH, BLOCK_K, BLOCK_D)
        second_ng = tl.minimum(second_ng, tl.maximum(best_ng, low_ng))
        block_ng = tl.where(low_ng < best_ng, block, block_ng)
        best_ng = tl.minimum(best_ng, low_ng)
        c_ptr += BLOCK_K * WIDTH
        vector_ptr += BLOCK_K

    at_ng = row_n[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(low_ptr + at_ng, best_ng)
    tl.store(block_ptr + at_ng, block_ng)
    tl.store(second_ptr + row_n, tl.min(second_ng, 1))


class Screen(NamedTuple):
    """What the screen found, and what another look at some rows takes."""

    tile: Tile
    rows: Tensor  # (padded N, WIDTH) float16
    coef: Tensor  # (padded N,) float32
    unit: Tensor  # (padded N,) float64
    base: Tensor  # (padded N,) float64
    centers: Tensor  # (padded K, WIDTH) float16
    vector: Tensor  # (padded K,) float32
    low: Tensor  # (padded N, GROUPS) float32
    block: Tensor  # (padded N, GROUPS) int32
    second: Tensor  # (padded N,) float32


def screen(
    x: Tensor,  # (N, D) float32, float16 or bfloat16
    centers: Tensor,  # (K, D) float32, contiguous
    ip: bool,
    tile: Tile | None,
) -> Screen:
    """Bounds of every row on every centre; the tile is for tests."""
    (n, d), k, device = x.shape, len(centers), x.device
    tile = tile or tile_for("assign", torch.float16, d, device)
    tile = tile._replace(block_d=min(tile.block_d, max(16, triton.next_power_of_2(d))))
    width = triton.cdiv(d, tile.block_d) * tile.block_d
    rows, keys = triton.cdiv(n, tile.block_n) * tile.block_n, triton.cdiv(k, tile.block_k) * tile.block_k

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # A median, unlike a mean, stays with the data when one centre is far away; any origin is right.
    sample = centers[:: triton.cdiv(k, SAMPLE)].sort(0).values
    origin = sample[len(sample) // 2]
    low, high = (bound.double() - origin for bound in centers.aminmax(dim=0))
    reach = torch.maximum(-low, high).max()
    span = origin.double().norm() + d**0.5 * reach

    flags = {
        "D": d, "WIDTH": width, "IP": ip, "FLUSHED": d**0.5 * 2.0**-25, "PACK_ROWS": PACK_ROWS,
        "PACK_COLUMNS": PACK_COLUMNS,
    }  # fmt: skip
    q_centers, vector, norm, ratio = empty(keys, width, dtype=torch.float16), empty(keys), empty(keys), empty(keys)
    _pack_centers_kernel[triton.cdiv(keys, PACK_ROWS),](
        centers, origin, reach, q_centers, vector, norm, ratio, k, keys, **flags
    )
    typical, lost = norm[:k].median(), ratio.max()
    q_rows, coef = empty(rows, width, dtype=torch.float16), empty(rows)
    unit, base = empty(rows, dtype=torch.float64), empty(rows, dtype=torch.float64)
    _pack_rows_kernel[triton.cdiv(rows, PACK_ROWS),](
        x, origin, reach, typical, lost, span, q_rows, coef, unit, base, n, rows, *x.stride(), **flags
    )
    groups = tile.block_k // MEMBERS.value
    low, block, second = empty(rows, groups), empty(rows, groups, dtype=torch.int32), empty(rows)
    _screen_kernel[rows // tile.block_n,](
        q_rows, coef, q_centers, vector, low, block, second, keys // tile.block_k, WIDTH=width, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, BLOCK_D=tile.block_d, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Screen(tile, q_rows, coef, unit, base, q_centers, vector, low, block, second)
