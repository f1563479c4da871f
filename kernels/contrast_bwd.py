# mypy: allow-untyped-defs
"""Contrast of rows against keys, backward into the keys, their scales and their biases, by two sums over the rows.

    p_ij = exp(s_ij - lse_i) on A(i)       q_ij = g_i (p_ij - [j = t(i)])
    Σ_i q_ij x_i                           db_j = Σ_i q_ij

Of the first are dy_j = a_j Σ_i q_ij x_i and da_j = <y_j, Σ_i q_ij x_i>. Symmetric, the keys are the rows and
s_ij = s_ji, up to one rounding on tensor cores: the sum is Σ_i (q_ij + q_ji) x_i, for the gradient of both roles.

N rows x, K keys y, D embedding, V the slice of D that one program sums, S parts of the rows. Rows with t(i) < 0 are
ignored. docs/math/contrast.md derives it.

A program owns a tile of keys and walks the rows, or one part of them, block by block, computing the scores again from
the saved log-sum-exp. p_t - 1 is saved too: found from the scores it would have the rounding of two large numbers; and
what exp(s - lse) is multiplied by to be p, since lse has the rounding of one. No two programs write one place and the
parts are added in their order: no atomic, the same bits for the same sizes on the same GPU. In memory are S · K · D
floats (and S is 1 where the key tiles fill the GPU), never the (N, K) scores.

Source: FlashAttention-2, arXiv 2307.08691; the derivation is ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastproto.kernels._halves import add_product, factor_rows, load_factor, scores
from fastproto.kernels._tiles import INF, LOG2E, Tile, choose_parts, load_scale, part_length, tile_for
from torch import Tensor

# What the largest gradient of a float16 batch is brought to: small ones stay above float16's 6e-8, sums are float32.
FLOAT16_PEAK = 1024.0
# So many times the largest weight, which powers() brings below 2^15, is still a float16.
MOST = tl.constexpr(1.96875)


@triton.jit
def probability(exponents, HALVES: tl.constexpr):
    """2^exponents, below 2 where float16 is to hold them: rounding may put a logit of millions far above its sum.

    Not below 1: that of a row that is sure of its key may lie above 1 by the rounding of lse, which its weight undoes.
    """
    p = tl.exp2(exponents)
    if HALVES:
        p = tl.minimum(p, MOST, propagate_nan=tl.PropagateNan.ALL)
    return p


@triton.jit(do_not_specialize=["N", "K", "part"])
def _contrast_bwd_keys_kernel(
    x_ptr,  # (N, D) at stride_x, or HALVES of them
    y_ptr,  # (K, D) at stride_y, likewise
    unit_n_ptr,  # (N,) float32, with HALVES: what rows are to be multiplied by
    unit_k_ptr,  # (K,) float32, with HALVES
    target_ptr,  # (N,) int64
    a_ptr,  # (K,) float32
    b_ptr,  # (K,) float32
    group_ptr,  # (N,) int64
    key_group_ptr,  # (K,) int64
    lse_ptr,  # (N,) float32
    weight_ptr,  # (2, N) float32: g (p_t - 1), and g p / exp(s - lse)
    sum_ptr,  # (S, K, D) float32
    db_ptr,  # (S, K) float32
    N,
    K,
    part,  # rows of one part
    stride_x,
    stride_y,
    D: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Σ_i q_ij x_i and Σ_i q_ij of BLOCK_K keys over one part of the rows: BLOCK_V columns a program."""
    WHOLE: tl.constexpr = D <= BLOCK_D and BLOCK_D == BLOCK_V
    EVEN_D: tl.constexpr = D % BLOCK_D == 0
    EVEN_V: tl.constexpr = D % BLOCK_V == 0
    pid_s, pid_v = tl.program_id(1), tl.program_id(2)
    here_n, here_k, here_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    start_k = tl.program_id(0).to(tl.int64) * BLOCK_K
    offs_k = start_k + here_k
    mask_k = offs_k < K
    y_ptr += start_k * stride_y
    a_k, b_k = load_scale(a_ptr, b_ptr, offs_k, mask_k, HAS_BIAS)
    if HALVES:
        a_k *= tl.load(unit_k_ptr + offs_k, mask=mask_k, other=0.0)
    if HAS_GROUPS:
        group_k = tl.load(key_group_ptr + offs_k, mask=mask_k, other=0)
    if SYMMETRIC:
        lse_k = tl.where(mask_k, tl.load(lse_ptr + offs_k, mask=mask_k, other=0.0) * LOG2E, INF)
        target_q_k = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0)
        weight_k = tl.load(weight_ptr + N + offs_k, mask=mask_k, other=0.0)
        largest_weight = tl.max(tl.maximum(tl.abs(weight_k), tl.abs(target_q_k)))
        target_k = tl.load(target_ptr + offs_k, mask=mask_k, other=-1)
    if WHOLE:
        y_kd = load_factor(y_ptr, stride_y, here_k, mask_k, here_d, D, EVEN_D, HALVES)

    acc_kv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    bias_k = tl.zeros((BLOCK_K,), tl.float32)
    begin = pid_s.to(tl.int64) * part
    for start_n in range(begin, tl.minimum(begin + part, N), BLOCK_N):
        mask_n = here_n < tl.minimum(N - start_n, BLOCK_N).to(tl.int32)
        block_ptr = x_ptr + start_n * stride_x
        target_n = tl.load(target_ptr + start_n + here_n, mask=mask_n, other=-1)
        if WHOLE:
            x_nv = load_factor(block_ptr, stride_x, here_n, mask_n, here_d, D, EVEN_D, HALVES)
            scores_kn = scores(y_kd, x_nv, HALVES)
        else:
            scores_kn = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
            for start_d in range(0, D, BLOCK_D):
                y_kd = load_factor(y_ptr, stride_y, here_k, mask_k, start_d + here_d, D, EVEN_D, HALVES)
                x_nd = load_factor(block_ptr, stride_x, here_n, mask_n, start_d + here_d, D, EVEN_D, HALVES)
                scores_kn += scores(y_kd, x_nd, HALVES)
        if HALVES:
            unit_n = tl.load(unit_n_ptr + start_n + here_n, mask=mask_n, other=0.0)
            scores_kn *= unit_n[None, :]
        # An ignored row has p = 0 and g = 0, whatever came in for it.
        row_ptr = weight_ptr + start_n
        lse_n = tl.where(target_n < 0, INF, tl.load(lse_ptr + start_n + here_n, mask=mask_n, other=0.0) * LOG2E)
        target_q_n = tl.load(row_ptr + here_n, mask=mask_n, other=0.0)
        weight_n = tl.where(target_n < 0, 0.0, tl.load(row_ptr + N + here_n, mask=mask_n, other=0.0))
        scores_kn = tl.fma(scores_kn, a_k[:, None], b_k[:, None])
        p_kn = probability(scores_kn - lse_n[None, :], HALVES)
        # The target's place in this tile in 32 bits, or -1: a comparison per score at half the price.
        place_n = target_n - start_k
        place_n = tl.where((place_n >= 0) & (place_n < BLOCK_K), place_n, -1).to(tl.int32)
        if HAS_GROUPS:
            group_n = tl.load(group_ptr + start_n + here_n, mask=mask_n, other=0)
            same_kn = group_k[:, None] == group_n[None, :]
            p_kn = tl.where(same_kn, 0.0, p_kn)
        q_kn = tl.where(here_k[:, None] == place_n[None, :], target_q_n[None, :], p_kn * weight_n[None, :])
        if SYMMETRIC:
            place_k = target_k - start_n
            place_k = tl.where((place_k >= 0) & (place_k < BLOCK_N), place_k, -1).to(tl.int32)
            p_kn = probability(scores_kn - lse_k[:, None], HALVES)
            if HAS_GROUPS:
                p_kn = tl.where(same_kn, 0.0, p_kn)
            # A row beyond the last is 0, and so is its score: p may be infinite where all true scores are far below.
            p_kn = tl.where(mask_n[None, :], p_kn * weight_k[:, None], 0.0)
            q_kn += tl.where(place_k[:, None] == here_n[None, :], target_q_k[:, None], p_kn)
        if HAS_BIAS:
            bias_k += tl.sum(q_kn, 1)
        if not WHOLE:
            x_nv = load_factor(block_ptr, stride_x, here_n, mask_n, offs_v, D, EVEN_V, HALVES)
        largest = 0.0
        if HALVES:
            # No q is larger than MOST of the weights that it is made of, or than the target's.
            q_kn *= unit_n[None, :]
            largest = tl.max(tl.maximum(tl.abs(weight_n), tl.abs(target_q_n)) * unit_n)
            if SYMMETRIC:
                largest += largest_weight * tl.max(unit_n)
        acc_kv = add_product(acc_kv, q_kn, largest, x_nv, HALVES)

    at = pid_s.to(tl.int64) * K + offs_k
    mask_kv = mask_k[:, None] if EVEN_V else mask_k[:, None] & (offs_v < D)[None, :]
    tl.store(sum_ptr + at[:, None] * D + offs_v[None, :], acc_kv, mask=mask_kv)
    if HAS_BIAS and pid_v == 0:
        tl.store(db_ptr + at, bias_k, mask=mask_k)


def with_groups(tile: Tile) -> Tile:
    """The tile of float32 rows where groups hide keys, which want registers of their own."""
    return tile._replace(block_n=tile.block_n // 2)


def contrast_bwd_keys(
    features: Tensor,  # (N, D) float32, float16 or bfloat16
    keys: Tensor,  # (K, D) likewise
    targets: Tensor,  # (N,) int64, -1 for an ignored row
    scale: Tensor,  # (K,) float
    bias: Tensor | None,  # (K,) float
    groups: Tensor | None,  # (N,) int64
    key_groups: Tensor | None,  # (K,) int64
    symmetric: bool,
    saved: Tensor,  # (3, N) float32, of the forward
    grad: Tensor,  # (N,) float32, dL / dL_i
    *,
    tile: Tile | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Σ_i q_ij x_i (K, D), and dL/db (K,) where there is a bias, float32; tile and parts are for tests."""
    n, k, columns_out = len(features), *keys.shape
    has_bias = bias is not None
    if n == 0:
        total = keys.new_zeros(k, columns_out, dtype=torch.float32)
        return total, total.new_zeros(k) if has_bias else None
    counted = targets >= 0
    # An ignored row is emptied before the product, so that not even a NaN in it reaches the keys' gradient. Masking
    # its load instead would let every load wait for a target.
    dtype = torch.promote_types(features.dtype, keys.dtype)
    x, unit_n = factor_rows(torch.where(counted[:, None], features, 0), dtype)
    y, unit_k = factor_rows(keys, dtype)
    halves = unit_n is not None
    peak = None
    if dtype == torch.float16:
        peak = torch.where(counted, grad.abs(), 0).amax().clamp(min=1e-30) / FLOAT16_PEAK
        grad = grad / peak
    d = x.shape[1] // 2 if halves else x.shape[1]
    tile = tile or tile_for("contrast_bwd_keys", dtype, d, x.device)
    if halves and groups is not None:
        tile = with_groups(tile)
    columns, tiles = triton.cdiv(d, tile.block_v), triton.cdiv(k, tile.block_k)
    parts = parts or choose_parts(tiles * columns, triton.cdiv(n, tile.block_n), x.device)
    part = part_length(n, parts, tile.block_n)
    parts = triton.cdiv(n, part)
    total = torch.empty(parts, k, d, dtype=torch.float32, device=x.device)
    db = torch.empty(parts, k if has_bias else 0, dtype=torch.float32, device=x.device)
    bias = None if bias is None else bias.float().contiguous()
    groups, key_groups = (None if group is None else group.contiguous() for group in (groups, key_groups))
    lse, weights = saved[0].contiguous(), saved[1:] * grad
    inputs = (x, y, unit_n, unit_k, targets.contiguous(), scale.float().contiguous(), bias, groups, key_groups)
    with torch.cuda.device_of(x):
        _contrast_bwd_keys_kernel[tiles, parts, columns](
            *inputs, lse, weights, total, db, n, k, part, x.stride(0), y.stride(0),
            D=d, HALVES=halves, HAS_BIAS=has_bias, HAS_GROUPS=groups is not None, SYMMETRIC=symmetric,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_D=tile.block_d, BLOCK_V=tile.block_v,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    total, db = (total[0], db[0]) if parts == 1 else (total.sum(0), db.sum(0))
    total = total[:, :columns_out].contiguous()
    if peak is not None:
        total, db = total * peak, db * peak
    return total, db if has_bias else None
