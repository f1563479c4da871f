# mypy: allow-untyped-defs
"""Contrast of rows against keys, forward: loss, log-sum-exp and dL/dx in one pass over the keys.

    s_ij = <x_i, y_j> · a_j + b_j          A(i): t(i), and the keys j whose group is not row i's
    L_i  = log Σ_{j ∈ A(i)} exp(s_ij) - s_{i,t(i)}
    dx_i = Σ_j p_ij a_j y_j - a_t y_t

N rows x, K keys y, D embedding, V the slice of D that one program sums, S parts of the keys. Rows with t(i) < 0 are
ignored. docs/math/contrast.md derives it.

The same rows may meet G sets of keys, each with targets of its own, in one launch: a set is some of the parts. The
keys of the sets stay where they are; what is one number for each key follows on from set to set.

A program takes a tile of rows through one part of the keys, block by block, as attention with keys = values does: the
running maximum m, l = Σ exp(s - m), o = Σ exp(s - m) a y. contrast_merge.py merges the parts in their order. In memory
are S · N · D floats for o (and S is 1 where the row tiles fill the GPU), never the (N, K) scores. There is no atomic:
the same sizes on the same GPU give the same bits.

Scores are kept in base 2: a_j · log2 e and b_j · log2 e meet the float32 sums of the product, so the keys enter it at
unit scale. All sums are float32. Float32 rows and keys come as pairs of halves (_halves.py), and their powers of two
meet the sums as a_j does. Half-precision probabilities enter the second product rounded to the keys' dtype: near the
target that loses more than 1 - p_t, so the target stays out of o and gets its share from the loss, in the merge.

Source: FlashAttention-2, arXiv 2307.08691; the derivation is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastproto.kernels._halves import add_product, factor_rows, load_factor, scores
from fastproto.kernels._sets import MAX_SETS, keys_of_set, set_of_part
from fastproto.kernels._tiles import INF, Tile, choose_parts, common_part, load_scale, tile_for
from fastproto.kernels.contrast_merge import MERGE_COLUMNS, MERGE_ROWS, MERGE_WARPS, _contrast_merge_kernel
from torch import Tensor


@triton.jit(do_not_specialize=["N", "K0", "K1", "K2", "K3", "part"])
def _contrast_fwd_kernel(
    x_ptr,  # (N, D) at stride_x, or HALVES of them
    y_ptrs,  # G of (K, D) at strides_y, likewise
    unit_n_ptr,  # (N,) float32, with HALVES: what rows are to be multiplied by
    unit_k_ptr,  # (ΣK,) float32, with HALVES
    target_ptr,  # (G, N) int64
    a_ptr,  # (ΣK,) float32
    b_ptr,  # (ΣK,) float32
    group_ptr,  # (N,) int64
    key_group_ptr,  # (ΣK,) int64
    max_ptr,  # (S, N) float32, in base 2
    sum_ptr,  # (S, N) float32
    acc_ptr,  # (S, N, D) float32: Σ exp(s - m) a y, a in base 2; without j = t but with HALVES
    spread_ptr,  # (S, N) float32: Σ exp(s - m) (s - m), in base 2
    top1_ptr,  # (S, N) int64
    N,
    K0,
    K1,
    K2,
    K3,
    part,  # keys of one part
    stride_x,
    strides_y,
    D: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """m, l, o and the statistics of BLOCK_N rows over one part of the keys: of o BLOCK_V columns a program."""
    WHOLE: tl.constexpr = D <= BLOCK_D and BLOCK_D == BLOCK_V
    EVEN_D: tl.constexpr = D % BLOCK_D == 0
    EVEN_V: tl.constexpr = D % BLOCK_V == 0
    pid_s, pid_v = tl.program_id(1), tl.program_id(2)
    here_n, here_k, here_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    sizes = (K0, K1, K2, K3)
    g = set_of_part(pid_s, y_ptrs, sizes, part)
    y_ptr, stride_y, K, first_k, first_s = keys_of_set(g, y_ptrs, strides_y, sizes, part)
    target_ptr += g * N.to(tl.int64)
    a_ptr += first_k
    if HALVES:
        unit_k_ptr += first_k
    if HAS_BIAS:
        b_ptr += first_k
    if HAS_GROUPS:
        key_group_ptr += first_k
    start_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = start_n + here_n
    mask_n = offs_n < N
    x_ptr += start_n * stride_x
    target_n = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    # Ignored rows are taken as zeros: not even a NaN in one goes further.
    counted_n = target_n >= 0
    if HAS_GROUPS:
        group_n = tl.load(group_ptr + offs_n, mask=mask_n, other=0)
    if HALVES:
        unit_n = tl.load(unit_n_ptr + offs_n, mask=mask_n, other=0.0)
    if WHOLE:
        x_nd = load_factor(x_ptr, stride_x, here_n, counted_n, here_d, D, EVEN_D, HALVES)

    max_n = tl.full((BLOCK_N,), -INF, tl.float32)
    sum_n = tl.zeros((BLOCK_N,), tl.float32)
    acc_nv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    spread_n = tl.zeros((BLOCK_N,), tl.float32)
    top1_n = tl.zeros((BLOCK_N,), tl.int64)
    begin = (pid_s - first_s).to(tl.int64) * part
    for start_k in range(begin, tl.minimum(begin + part, K), BLOCK_K):
        mask_k = here_k < tl.minimum(K - start_k, BLOCK_K).to(tl.int32)
        block_ptr = y_ptr + start_k * stride_y
        if WHOLE:
            y_kv = load_factor(block_ptr, stride_y, here_k, mask_k, here_d, D, EVEN_D, HALVES)
            scores_nk = scores(x_nd, y_kv, HALVES)
        else:
            scores_nk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for start_d in range(0, D, BLOCK_D):
                x_nd = load_factor(x_ptr, stride_x, here_n, counted_n, start_d + here_d, D, EVEN_D, HALVES)
                y_kd = load_factor(block_ptr, stride_y, here_k, mask_k, start_d + here_d, D, EVEN_D, HALVES)
                scores_nk += scores(x_nd, y_kd, HALVES)
        a_k, b_k = load_scale(a_ptr + start_k, b_ptr + start_k if HAS_BIAS else None, here_k, mask_k, HAS_BIAS)
        if HALVES:
            a_k *= tl.load(unit_k_ptr + start_k + here_k, mask=mask_k, other=0.0)
            scores_nk *= unit_n[:, None]
        scores_nk = tl.fma(scores_nk, a_k[None, :], b_k[None, :])
        # The target's place in this block in 32 bits, or -1: a comparison per score at half the price.
        place_n = target_n - start_k
        place_n = tl.where((place_n >= 0) & (place_n < BLOCK_K), place_n, -1).to(tl.int32)
        others_nk = place_n[:, None] != here_k[None, :]
        if HAS_GROUPS:
            group_k = tl.load(key_group_ptr + start_k + here_k, mask=mask_k, other=0)
            hidden_nk = (group_n[:, None] == group_k[None, :]) & others_nk
            scores_nk = tl.where(hidden_nk, -INF, scores_nk)

        block_max_n = tl.max(scores_nk, 1)
        if NEED_STATS:
            first_n = tl.min(tl.where(scores_nk == block_max_n[:, None], here_k[None, :], BLOCK_K), 1)
            top1_n = tl.where(block_max_n > max_n, start_k + first_n, top1_n)
        before_n = max_n
        max_n = tl.maximum(max_n, block_max_n)
        # Where nothing has been seen yet, m = -inf, the exponents are -inf - 0 and not -inf + inf.
        level_n = tl.where(max_n == -INF, 0.0, max_n)
        shrink_n = tl.exp2(before_n - level_n)
        below_nk = scores_nk - level_n[:, None]
        p_nk = tl.exp2(below_nk)
        if NEED_STATS:
            # No -inf · 0 where all before is far below.
            lowered_n = sum_n * tl.where(shrink_n == 0.0, 0.0, before_n - level_n)
            below_nk = tl.where(p_nk == 0.0, 0.0, below_nk)
            spread_n = (spread_n + lowered_n) * shrink_n + tl.sum(p_nk * below_nk, 1)
        sum_n = sum_n * shrink_n + tl.sum(p_nk, 1)
        if NEED_DX:
            if not WHOLE:
                y_kv = load_factor(block_ptr, stride_y, here_k, mask_k, offs_v, D, EVEN_V, HALVES)
            # p ≤ 1, and 0 where a bias of -inf hides the key.
            largest = tl.max(tl.where(b_k == -INF, 0.0, tl.abs(a_k))) if HALVES else 0.0
            weights_nk = p_nk * a_k[None, :]
            if not HALVES:
                # Rounded, it would hide what 1 - p_t is.
                weights_nk = tl.where(others_nk, weights_nk, 0.0)
            acc_nv = add_product(acc_nv * shrink_n[:, None], weights_nk, largest, y_kv, HALVES)

    at = pid_s.to(tl.int64) * N + offs_n
    if pid_v == 0:
        tl.store(max_ptr + at, max_n, mask=mask_n)
        tl.store(sum_ptr + at, sum_n, mask=mask_n)
        if NEED_STATS:
            tl.store(spread_ptr + at, spread_n, mask=mask_n)
            tl.store(top1_ptr + at, top1_n, mask=mask_n)
    if NEED_DX:
        mask_nv = mask_n[:, None] if EVEN_V else mask_n[:, None] & (offs_v < D)[None, :]
        tl.store(acc_ptr + at[:, None] * D + offs_v[None, :], acc_nv, mask=mask_nv)


def with_stats(tile: Tile, halves: bool) -> Tile:
    """The tile where stats are needed, which want registers of their own."""
    return tile._replace(block_k=max(16, tile.block_k // (4 if halves else 2)))


def contrast_fwd(
    features: Tensor,  # (N, D) float32, float16 or bfloat16
    keys: Sequence[Tensor],  # G of (K, D) likewise, at most MAX_SETS
    targets: Tensor,  # (G, N) int64, -1 for an ignored row
    scale: Tensor,  # (ΣK,) float
    bias: Tensor | None,  # (ΣK,) float
    groups: Tensor | None,  # (N,) int64
    key_groups: Tensor | None,  # (ΣK,) int64
    need_dx: bool,
    need_stats: bool,
    out: tuple[Tensor, ...],  # loss, saved, dx, entropy, top1, positive logit; what is not needed has size 0
    *,
    tile: Tile | None = None,
    parts: int | None = None,
) -> None:
    """Writes what a row has in every set: loss, saved (see contrast_merge.py), dx, entropy, top1 and positive logit.

    With one set the (1, ...) in front may be left out. tile and parts are for tests.
    """
    n, sizes = len(features), tuple(map(len, keys))
    if n == 0:
        return
    dtype = functools.reduce(torch.promote_types, (y.dtype for y in keys), features.dtype)
    halves = dtype == torch.float32
    unit_k = torch.empty(sum(sizes) if halves else 0, dtype=dtype, device=features.device)
    unit_ks = unit_k.split(sizes) if halves else [None] * len(sizes)
    x, unit_n = factor_rows(features, dtype)
    ys = tuple(factor_rows(y, dtype, unit)[0] for y, unit in zip(keys, unit_ks, strict=True))
    d = x.shape[1] // 2 if halves else x.shape[1]
    tile = tile or tile_for("contrast_fwd", dtype, d, x.device)
    if need_stats:
        tile = with_stats(tile, halves)
    columns = triton.cdiv(d, tile.block_v) if need_dx else 1
    tiles = triton.cdiv(n, tile.block_n)
    blocks = sum(triton.cdiv(k, tile.block_k) for k in sizes)
    part = common_part(sizes, parts or choose_parts(tiles * columns, blocks, x.device), tile.block_k)
    parts = sum(triton.cdiv(k, part) for k in sizes)
    stats = n if need_stats else 0

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    partial = (empty(parts, n), empty(parts, n), empty(parts, n if need_dx else 0, d),
               empty(parts, stats), empty(parts, stats, dtype=torch.int64))  # fmt: skip
    bias = None if bias is None else bias.float().contiguous()
    groups, key_groups = (None if group is None else group.contiguous() for group in (groups, key_groups))
    units = (unit_n, unit_k if halves else None)
    shared = (x, ys, *units, targets.contiguous(), scale.float().contiguous(), bias)
    flags = {"D": d, "HALVES": halves, "HAS_BIAS": bias is not None, "NEED_DX": need_dx, "NEED_STATS": need_stats}
    lengths = (n, *sizes, *[0] * (MAX_SETS - len(sizes)), part)
    strides = (x.stride(0), tuple(y.stride(0) for y in ys))
    with torch.cuda.device_of(x):
        _contrast_fwd_kernel[tiles, parts, columns](
            *shared, groups, key_groups, *partial, *lengths, *strides, **flags, HAS_GROUPS=groups is not None,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_D=tile.block_d, BLOCK_V=tile.block_v,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _contrast_merge_kernel[triton.cdiv(n, MERGE_ROWS), triton.cdiv(d, MERGE_COLUMNS) if need_dx else 1, len(ys)](
            *shared, *partial, *out, *lengths, *strides, **flags, D_OUT=features.shape[1],
            BLOCK_N=MERGE_ROWS, BLOCK_D=tile.block_d, BLOCK_V=MERGE_COLUMNS, num_warps=MERGE_WARPS[halves],
        )  # fmt: skip
