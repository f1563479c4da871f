# mypy: allow-untyped-defs
"""Loss, gradient and statistics of every row, from what the parts of the keys left: the end of contrast_fwd.py.

    m = max_s m_s        l = Σ_s exp(m_s - m) l_s        o = Σ_s exp(m_s - m) o_s
    L = (m - s_t) + log l        dx = o / l - a_t y_t, or o / l + (exp(-L) - 1) a_t y_t where o has no target
    entropy = log l - Σ_s exp(m_s - m) (w_s + l_s (m_s - m)) / l

N rows, D embedding, V the slice of D that one program sums, G sets of keys, S parts of the keys, of which a set has
some. Of part s: m_s the largest score of its keys, l_s = Σ exp(score - m_s), o_s = Σ exp(score - m_s) a y,
w_s = Σ exp(score - m_s) (score - m_s). In the code m is `max`, l `sum`, o `acc`, w `spread`, all of scores in base 2:
hence the factors LN2. The parts are added in their order. The positive score s_t is found here, from the target's own
key.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastproto.kernels._halves import load_factor, scores
from fastproto.kernels._sets import keys_of_set
from fastproto.kernels._tiles import INF, LN2, LOG2E, load_rows, load_scale

MERGE_ROWS, MERGE_COLUMNS = 64, 64
MERGE_WARPS = {False: 4, True: 8}  # with HALVES four have too few registers on sm_80
# Loads of the parts to come on their way: the few programs that merge have nothing else to wait beside.
MERGE_STAGES = tl.constexpr(4)


@triton.jit
def expm1_of_minus(x):
    """exp(-x) - 1 for x ≥ 0, with all digits where x is small."""
    # Below 1/4 the series, whose next term is x^6 / 5040 of it.
    s = tl.minimum(x, 0.25)
    series = -s * (1 - s / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6)))))
    return tl.where(x < 0.25, series, tl.exp(-x) - 1)


@triton.jit(do_not_specialize=["N", "K0", "K1", "K2", "K3", "part"])
def _contrast_merge_kernel(
    x_ptr,  # (N, D) at stride_x, or HALVES of them
    y_ptrs,  # G of (K, D) at strides_y, likewise
    unit_n_ptr,  # (N,) float32, with HALVES: what rows are to be multiplied by
    unit_k_ptr,  # (ΣK,) float32, with HALVES
    target_ptr,  # (G, N) int64
    a_ptr,  # (ΣK,) float32
    b_ptr,  # (ΣK,) float32
    max_ptr,  # (S, N) float32, in base 2
    sum_ptr,  # (S, N) float32
    acc_ptr,  # (S, N, D) float32: Σ exp(s - m) a y, a in base 2; without j = t but with HALVES
    spread_ptr,  # (S, N) float32: Σ exp(s - m) (s - m), in base 2
    part_top1_ptr,  # (S, N) int64
    loss_ptr,  # (G, N) float32
    saved_ptr,  # (G, 3, N) float32: lse, p_t - 1, and what exp(s - lse) is multiplied by to be p
    dx_ptr,  # (G, N, D_OUT) float32
    entropy_ptr,  # (G, N) float32
    top1_ptr,  # (G, N) int64
    positive_ptr,  # (G, N) float32
    N,
    K0,
    K1,
    K2,
    K3,
    part,  # keys of one part
    stride_x,
    strides_y,
    D: tl.constexpr,
    D_OUT: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Merges the parts: BLOCK_N rows of a set and BLOCK_V columns of dx a program; the first columns' has the rest."""
    g = tl.program_id(2)
    y_ptr, stride_y, K, first_k, first_s = keys_of_set(g, y_ptrs, strides_y, (K0, K1, K2, K3), part)
    parts = tl.cdiv(K, part)
    a_ptr += first_k
    if HALVES:
        unit_k_ptr += first_k
    if HAS_BIAS:
        b_ptr += first_k
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    out_n = g * N.to(tl.int64) + offs_n
    first_n = first_s * N.to(tl.int64) + offs_n
    target_n = tl.load(target_ptr + out_n, mask=mask_n, other=-1)
    counted_n = target_n >= 0
    # A target beyond the keys, which only debug mode refuses on a GPU, is not read; its loss is NaN.
    known_n = target_n < K
    key_n = tl.minimum(tl.maximum(target_n, 0), K - 1)
    if HALVES:
        unit_k = tl.load(unit_k_ptr + key_n, mask=counted_n, other=0.0)

    positive_n = tl.zeros((BLOCK_N,), tl.float32)
    if tl.program_id(1) == 0 or (NEED_DX and not HALVES):
        # The positive scores are the diagonal of one more tile, of the same instructions on the same columns as all
        # scores, so that a positive that is the maximum has its very bits. Finding each in its block would cost every
        # score one more sum.
        offs_d = tl.arange(0, BLOCK_D)
        scores_nn = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        for start_d in tl.range(0, D, BLOCK_D, num_stages=1):
            x_nd = load_factor(x_ptr, stride_x, offs_n, counted_n, start_d + offs_d, D, False, HALVES)
            y_nd = load_factor(y_ptr, stride_y, key_n, counted_n, start_d + offs_d, D, False, HALVES)
            scores_nn += scores(x_nd, y_nd, HALVES)
        here = tl.arange(0, BLOCK_N)
        diagonal_n = tl.sum(tl.where(here[:, None] == here[None, :], scores_nn, 0.0), 1)
        scale_n, bias_n = load_scale(a_ptr, b_ptr, key_n, counted_n, HAS_BIAS)
        if HALVES:
            scale_n *= unit_k
            diagonal_n *= tl.load(unit_n_ptr + offs_n, mask=mask_n, other=0.0)
        positive_n = tl.fma(diagonal_n, scale_n, bias_n)

    max_n = tl.full((BLOCK_N,), -INF, tl.float32)
    top1_n = tl.zeros((BLOCK_N,), tl.int64)
    at = first_n
    for _ in tl.range(0, parts, num_stages=MERGE_STAGES):
        here_n = tl.load(max_ptr + at, mask=mask_n, other=0.0)
        if NEED_STATS:
            top1_n = tl.where(here_n > max_n, tl.load(part_top1_ptr + at, mask=mask_n, other=0), top1_n)
        max_n = tl.maximum(max_n, here_n)
        at += N
    level_n = tl.where(max_n == -INF, 0.0, max_n)

    sum_n = tl.zeros((BLOCK_N,), tl.float32)
    spread_n = tl.zeros((BLOCK_N,), tl.float32)
    at = first_n
    for _ in tl.range(0, parts, num_stages=MERGE_STAGES):
        below_n = tl.load(max_ptr + at, mask=mask_n, other=0.0) - level_n
        part_n = tl.load(sum_ptr + at, mask=mask_n, other=0.0)
        shrink_n = tl.exp2(below_n)
        sum_n += part_n * shrink_n
        if NEED_STATS:
            # No -inf · 0 where a part is far below.
            lowered_n = part_n * tl.where(shrink_n == 0.0, 0.0, below_n)
            spread_n += (tl.load(spread_ptr + at, mask=mask_n, other=0.0) + lowered_n) * shrink_n
        at += N

    # An ignored row may see no key at all.
    sum_n = tl.where(counted_n, sum_n, 1.0)
    log_sum_n = tl.log(sum_n)
    # (m - s_t) + log l, not lse - s_t: the difference of two large numbers would lose the digits of a small loss.
    loss_n = tl.where(known_n, (max_n - positive_n) * LN2 + log_sum_n, float("nan"))
    loss_n = tl.where(counted_n, loss_n, 0.0)
    # p_t - 1. Rounding may leave a loss below 0, p not above 1. NaN stays.
    less_n = expm1_of_minus(tl.where(loss_n < 0, 0.0, loss_n))
    if NEED_DX:
        offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        acc_nv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        at = first_n
        for _ in tl.range(0, parts, num_stages=MERGE_STAGES):
            shrink_n = tl.exp2(tl.load(max_ptr + at, mask=mask_n, other=0.0) - level_n)
            acc_nv += load_rows(acc_ptr, D, at, mask_n, offs_v, D, False) * shrink_n[:, None]
            at += N
        y_nv = load_rows(y_ptr, stride_y, key_n, counted_n, offs_v, D, False).to(tl.float32)
        a_n = tl.load(a_ptr + key_n, mask=counted_n, other=0.0)
        if HALVES:
            y_nv += load_rows(y_ptr + D, stride_y, key_n, counted_n, offs_v, D, False).to(tl.float32)
            a_n *= unit_k
        share_n = LN2 / sum_n
        # As pairs of halves the target is in o, with all the digits that p_t - 1 has in float32.
        left_n = -a_n if HALVES else less_n * a_n
        dx_nv = acc_nv * share_n[:, None] + left_n[:, None] * y_nv
        dx_nv = tl.where(counted_n[:, None], dx_nv, 0.0)
        mask_nv = mask_n[:, None] & (offs_v < D_OUT)[None, :]
        tl.store(dx_ptr + out_n[:, None] * D_OUT + offs_v[None, :], dx_nv, mask=mask_nv)

    if tl.program_id(1) == 0:
        saved_n = 2 * g * N.to(tl.int64) + out_n
        tl.store(loss_ptr + out_n, loss_n, mask=mask_n)
        lse_n = tl.where(counted_n, max_n * LN2 + log_sum_n, 0.0)
        tl.store(saved_ptr + saved_n, lse_n, mask=mask_n)
        # lse has the rounding of a number as large as the scores: by so much the backward's p would be off. Chosen, and
        # not multiplied where it is used, it is rounded there and here: nothing makes one operation of the two.
        rounded_n = tl.where(counted_n, lse_n * LOG2E, 0.0)
        off_n = tl.exp2(rounded_n - max_n - tl.log2(sum_n))
        tl.store(saved_ptr + 2 * N.to(tl.int64) + saved_n, tl.where(counted_n, off_n, 1.0), mask=mask_n)
        tl.store(saved_ptr + N + saved_n, less_n, mask=mask_n)
        if NEED_STATS:
            # Neither term is negative: log l, and Σ p (m - s).
            entropy_n = log_sum_n - spread_n / sum_n * LN2
            tl.store(entropy_ptr + out_n, tl.where(counted_n, entropy_n, 0.0), mask=mask_n)
            tl.store(top1_ptr + out_n, tl.where(counted_n, top1_n, -1), mask=mask_n)
            tl.store(positive_ptr + out_n, tl.where(counted_n, positive_n * LN2, 0.0), mask=mask_n)
