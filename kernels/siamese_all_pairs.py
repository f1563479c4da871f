# mypy: allow-untyped-defs
"""The siamese metric loss of SPCL over all pairs of rows, forward and backward; siamese_pairs.py has given pairs.

    s(a, b)    = <w, |a - b|> + β
    M(a, b, t) = log(1 + e^z),  z = -s where t = 1, s where t = 0
    q_ij       = dL/ds_ij,  G_i = Σ_j q_ij sign(x_i - x_j),  dx_i = w ∘ G_i,  dw = Σ_i (x_i - m) ∘ G_i

N rows, C backbone features, R rows of a panel; m the mean of the rows x that have a pair. docs/math/siamese.md derives
it. It is no matrix product: everything runs on the CUDA cores in float32.

Forward: a program takes a tile of rows against every PARTS-th tile before it, and writes its sums, which torch.sum adds
up in a fixed order. Backward, in panels of R rows: q (N, R), then G by programs that own rows and channels. R is the
larger of C and PANEL, or N, so q is larger than the gradient only where C < PANEL; (N, N) is in memory only where
N <= R, (N, N, C) never. There is no atomic and no host synchronisation: the same bits every time.

Source: SPCL, arXiv 2208.08819; the form over all pairs is this library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pairs and channels of a tile of logits: 16 · 16 · 32 sums, 64 registers of each of 128 threads.
TILE, TILE_C = 16, 32
# Rows and channels whose gradient a program keeps in registers.
ROWS, ROWS_C = 32, 64
# Channels of a program that walks over all rows, and rows at a time.
WALK_C, WALK_ROWS = 32, 64
PARTS = 16
PANEL = 256


@triton.jit
def _loss_of(z):
    """M = log(1 + e^z) and dM/dz. log1p(e) = 2 artanh(e / (2 + e)), whose series keeps the digits of a small M."""
    e = tl.exp(-tl.abs(z))
    t = e / (2 + e)
    u = t * t
    series = u / 15 + 1.0 / 13
    series = series * u + 1.0 / 11
    series = series * u + 1.0 / 9
    series = series * u + 1.0 / 7
    series = series * u + 1.0 / 5
    series = series * u + 1.0 / 3
    series = series * u + 1
    return tl.where(z < 0, 0.0, z) + 2 * t * series, tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _load(ptr, rows, stride_n, columns, stride_c, mask):
    """Elements of a matrix as float32, 0 where masked; rows and columns broadcast against each other."""
    return tl.load(ptr + rows.to(tl.int64) * stride_n + columns.to(tl.int64) * stride_c, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _pairs_of_tile(
    x_ptr, image_ptr, prototype_ptr, w_ptr, beta_ptr, offs_n, offs_m, N, C, stride_n, stride_c, TILE_C: tl.constexpr
):
    """M, dM/ds and the kind (0, 1, 2; 3: does not count) of the pairs of rows offs_n and offs_m."""
    mask_n, mask_m = offs_n < N, offs_m < N
    acc_nmc = tl.zeros((offs_n.shape[0], offs_m.shape[0], TILE_C), tl.float32)
    for start_c in range(0, C, TILE_C):
        offs_c = start_c + tl.arange(0, TILE_C)
        mask_c = offs_c < C
        x_nc = _load(x_ptr, offs_n[:, None], stride_n, offs_c[None, :], stride_c, mask_n[:, None] & mask_c[None, :])
        x_mc = _load(x_ptr, offs_m[:, None], stride_n, offs_c[None, :], stride_c, mask_m[:, None] & mask_c[None, :])
        w_c = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        acc_nmc += tl.abs(x_nc[:, None, :] - x_mc[None, :, :]) * w_c[None, None, :]
    s_nm = tl.sum(acc_nmc, 2) + tl.load(beta_ptr).to(tl.float32)

    image_n = tl.load(image_ptr + offs_n, mask=mask_n, other=0)
    image_m = tl.load(image_ptr + offs_m, mask=mask_m, other=0)
    prototype_n = tl.load(prototype_ptr + offs_n, mask=mask_n, other=-1)
    prototype_m = tl.load(prototype_ptr + offs_m, mask=mask_m, other=-1)
    assigned_nm = (prototype_n >= 0)[:, None] & (prototype_m >= 0)[None, :]
    kind_nm = tl.where(prototype_n[:, None] == prototype_m[None, :], 1, 2)
    kind_nm = tl.where(assigned_nm, kind_nm, 3)
    kind_nm = tl.where(image_n[:, None] == image_m[None, :], 0, kind_nm)
    counted_nm = mask_n[:, None] & mask_m[None, :] & (offs_n[:, None] != offs_m[None, :])
    kind_nm = tl.where(counted_nm, kind_nm, 3)
    loss_nm, slope_nm = _loss_of(tl.where(kind_nm < 2, -s_nm, s_nm))
    return loss_nm, tl.where(kind_nm < 2, -slope_nm, slope_nm), kind_nm


@triton.jit(do_not_specialize=["N"])
def _all_pairs_fwd_kernel(
    x_ptr,  # (N, C) at stride_n, stride_c
    image_ptr,  # (N,) int64
    prototype_ptr,  # (N,) int64
    w_ptr,  # (C,)
    beta_ptr,  # ()
    sums_ptr,  # (programs, 9) float32: M, dM/ds and number of pairs, by kind
    N,
    C,
    stride_n,
    stride_c,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Sums by kind of pair: TILE rows, against every PARTS-th tile up to their own, a program."""
    pid = tl.program_id(0)
    tile_n = pid // PARTS
    offs_n = tile_n * TILE + tl.arange(0, TILE)
    loss0, loss1, loss2 = 0.0, 0.0, 0.0
    slope0, slope1, slope2 = 0.0, 0.0, 0.0
    count0, count1, count2 = 0.0, 0.0, 0.0
    for tile_m in range(pid % PARTS, tile_n + 1, PARTS):
        offs_m = tile_m * TILE + tl.arange(0, TILE)
        loss_nm, slope_nm, kind_nm = _pairs_of_tile(
            x_ptr, image_ptr, prototype_ptr, w_ptr, beta_ptr, offs_n, offs_m, N, C, stride_n, stride_c, TILE_C
        )
        kind_nm = tl.where(offs_m[None, :] < offs_n[:, None], kind_nm, 3)
        loss0 += tl.sum(tl.where(kind_nm == 0, loss_nm, 0.0))
        loss1 += tl.sum(tl.where(kind_nm == 1, loss_nm, 0.0))
        loss2 += tl.sum(tl.where(kind_nm == 2, loss_nm, 0.0))
        slope0 += tl.sum(tl.where(kind_nm == 0, slope_nm, 0.0))
        slope1 += tl.sum(tl.where(kind_nm == 1, slope_nm, 0.0))
        slope2 += tl.sum(tl.where(kind_nm == 2, slope_nm, 0.0))
        count0 += tl.sum(tl.where(kind_nm == 0, 1.0, 0.0))
        count1 += tl.sum(tl.where(kind_nm == 1, 1.0, 0.0))
        count2 += tl.sum(tl.where(kind_nm == 2, 1.0, 0.0))
    sums_ptr += pid.to(tl.int64) * 9
    tl.store(sums_ptr, loss0)
    tl.store(sums_ptr + 1, loss1)
    tl.store(sums_ptr + 2, loss2)
    tl.store(sums_ptr + 3, slope0)
    tl.store(sums_ptr + 4, slope1)
    tl.store(sums_ptr + 5, slope2)
    tl.store(sums_ptr + 6, count0)
    tl.store(sums_ptr + 7, count1)
    tl.store(sums_ptr + 8, count2)


@triton.jit(do_not_specialize=["N", "first", "R"])
def _coefficients_kernel(
    x_ptr,  # x, image, prototype, w and beta as above
    image_ptr,
    prototype_ptr,
    w_ptr,
    beta_ptr,
    coefficient_ptr,  # (3,) float32: dL/dM of a pair of each kind
    q_ptr,  # (N, R) float32
    N,
    C,
    first,  # row of the panel
    R,  # rows of the panel
    stride_n,
    stride_c,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """q_ji = dL/ds of rows j and the panel's rows i, 0 where a pair does not count: a TILE × TILE tile a program."""
    tiles_r = tl.cdiv(R, TILE)
    offs_r = tl.program_id(0) % tiles_r * TILE + tl.arange(0, TILE)
    offs_n = tl.program_id(0) // tiles_r * TILE + tl.arange(0, TILE)
    offs_m = tl.where(offs_r < R, first + offs_r, N)
    _, slope_nm, kind_nm = _pairs_of_tile(
        x_ptr, image_ptr, prototype_ptr, w_ptr, beta_ptr, offs_n, offs_m, N, C, stride_n, stride_c, TILE_C
    )
    scale_nm = tl.where(kind_nm == 0, tl.load(coefficient_ptr), tl.load(coefficient_ptr + 1))
    scale_nm = tl.where(kind_nm == 2, tl.load(coefficient_ptr + 2), scale_nm)
    q_nm = tl.where(kind_nm < 3, scale_nm * slope_nm, 0.0)
    mask_nm = (offs_n < N)[:, None] & (offs_r < R)[None, :]
    tl.store(q_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :], q_nm, mask=mask_nm)


@triton.jit(do_not_specialize=["N", "first", "R"])
def _rows_kernel(
    x_ptr,
    q_ptr,  # (N, R) float32
    g_ptr,  # (N, C) float32: rows first ... first + R - 1 are written
    N,
    C,
    first,
    R,
    stride_n,
    stride_c,
    ROWS: tl.constexpr,
    ROWS_C: tl.constexpr,
):
    """G_i = Σ_j q_ij sign(x_i - x_j) of the panel: ROWS rows × ROWS_C channels a program, over all j."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.program_id(1) * ROWS_C + tl.arange(0, ROWS_C)
    mask_r, mask_c = offs_r < R, offs_c < C
    mask_rc = mask_r[:, None] & mask_c[None, :]
    x_rc = _load(x_ptr, (first + offs_r)[:, None], stride_n, offs_c[None, :], stride_c, mask_rc)
    q_ptrs = q_ptr + offs_r
    x_ptrs = x_ptr + offs_c.to(tl.int64) * stride_c
    g_rc = tl.zeros((ROWS, ROWS_C), tl.float32)
    for _ in tl.range(0, N, loop_unroll_factor=4):
        q_r = tl.load(q_ptrs, mask=mask_r, other=0.0)[:, None]
        x_c = tl.load(x_ptrs, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        # q with the sign of x_i - x_j; 0 where they are equal, not where one is NaN.
        g_rc += tl.where(x_rc == x_c, 0.0, tl.where(x_rc < x_c, -q_r, q_r))
        q_ptrs += R
        x_ptrs += stride_n
    tl.store(g_ptr + (first + offs_r).to(tl.int64)[:, None] * C + offs_c[None, :], g_rc, mask=mask_rc)


@triton.jit(do_not_specialize=["N"])
def _finish_kernel(
    x_ptr,
    w_ptr,
    g_ptr,  # (N, C) float32: G, becomes w ∘ G
    dw_ptr,  # (C,) float32
    N,
    C,
    stride_n,
    stride_c,
    WALK_C: tl.constexpr,
    WALK_ROWS: tl.constexpr,
):
    """dx = w ∘ G in place, dw = Σ_i (x_i - m) ∘ G_i: WALK_C channels of all rows a program."""
    offs_c = tl.program_id(0) * WALK_C + tl.arange(0, WALK_C)
    mask_c = offs_c < C
    w_c = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    total_c = tl.zeros((WALK_C,), tl.float32)
    count_c = tl.zeros((WALK_C,), tl.float32)
    dw_c = tl.zeros((WALK_C,), tl.float32)
    # A row without a pair has G = 0, and not even a NaN in it reaches dw.
    for start_n in range(0, N, WALK_ROWS):
        offs_n = start_n + tl.arange(0, WALK_ROWS)
        mask_nc = (offs_n < N)[:, None] & mask_c[None, :]
        g_nc = _load(g_ptr, offs_n[:, None], C, offs_c[None, :], 1, mask_nc)
        x_nc = _load(x_ptr, offs_n[:, None], stride_n, offs_c[None, :], stride_c, mask_nc)
        total_c += tl.sum(tl.where(g_nc != 0, x_nc, 0.0), 0)
        count_c += tl.sum(tl.where(g_nc != 0, 1.0, 0.0), 0)
    mean_c = total_c / tl.maximum(count_c, 1.0)
    for start_n in range(0, N, WALK_ROWS):
        offs_n = start_n + tl.arange(0, WALK_ROWS)
        mask_nc = (offs_n < N)[:, None] & mask_c[None, :]
        g_nc = _load(g_ptr, offs_n[:, None], C, offs_c[None, :], 1, mask_nc)
        x_nc = _load(x_ptr, offs_n[:, None], stride_n, offs_c[None, :], stride_c, mask_nc)
        dw_c += tl.sum(tl.where(g_nc != 0, (x_nc - mean_c[None, :]) * g_nc, 0.0), 0)
        tl.store(g_ptr + offs_n.to(tl.int64)[:, None] * C + offs_c[None, :], g_nc * w_c[None, :], mask=mask_nc)
    tl.store(dw_ptr + offs_c, dw_c, mask=mask_c)


def siamese_all_pairs_fwd(
    features: Tensor, images: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean M, mean dM/ds and one over the number of pairs, each (3,), by kind; as the reference gives them."""
    n, c = features.shape
    programs = triton.cdiv(n, TILE) * PARTS
    sums = torch.empty(programs, 9, dtype=torch.float32, device=features.device)
    if n:
        with torch.cuda.device_of(features):
            _all_pairs_fwd_kernel[(programs,)](
                features, images, prototypes, weight.contiguous(), bias, sums, n, c, *features.stride(), PARTS=PARTS,
                TILE=TILE, TILE_C=TILE_C,
            )  # fmt: skip
    # In float64: a number of pairs above 2^24 is no float32.
    loss, slope, count = sums.sum(0, dtype=torch.float64).view(3, 3).unbind()
    share = torch.where(count > 0, 1 / count, 0)
    return (loss * share).float(), (slope * share).float(), share.float()


def siamese_all_pairs_bwd(
    features: Tensor, images: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dx (N, C) and dL/dw (C,), float32; coefficient (3,) is dL/dM of a pair of each kind."""
    n, c = features.shape
    dx = torch.empty(n, c, dtype=torch.float32, device=features.device)
    dw = torch.empty(c, dtype=torch.float32, device=features.device)
    weight, coefficient, strides = weight.contiguous(), coefficient.contiguous(), features.stride()
    panel = max(PANEL, c)
    q_nr = torch.empty(n * min(n, panel), dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        for first in range(0, n, panel):
            rows = min(panel, n - first)
            _coefficients_kernel[(triton.cdiv(rows, TILE) * triton.cdiv(n, TILE),)](
                features, images, prototypes, weight, bias, coefficient, q_nr, n, c, first, rows, *strides, TILE=TILE,
                TILE_C=TILE_C,
            )  # fmt: skip
            _rows_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(c, ROWS_C))](
                features, q_nr, dx, n, c, first, rows, *strides, ROWS=ROWS, ROWS_C=ROWS_C
            )
        _finish_kernel[(triton.cdiv(c, WALK_C),)](
            features, weight, dx, dw, n, c, *strides, WALK_C=WALK_C, WALK_ROWS=WALK_ROWS
        )
    return dx, dw
