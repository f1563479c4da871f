# mypy: allow-untyped-defs
"""The siamese metric loss on given pairs, forward and backward; the form over all pairs is in siamese_all_pairs.py.

    s_i  = <w, |a_i - b_i|> + β,  M_i = log(1 + e^z), z = -s where t = 1, s where t = 0
    da_i = q_i w ∘ sign(a_i - b_i),  dw = Σ_i q_i |a_i - b_i|,  q_i = dL/ds_i, sign(0) = 0

N pairs, C backbone features; t is `same` in the code. Every element is read once a pass. A program of the backward pass
owns channels of all pairs: no partial sums, no atomic. Pairs with t < 0 are ignored, even where they hold NaN.

Source: SPCL, arXiv 2208.08819.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastproto.kernels.siamese_all_pairs import WALK_C, WALK_ROWS, _load, _loss_of
from torch import Tensor

PAIRS, PAIRS_C = 16, 128


@triton.jit(do_not_specialize=["N"])
def _pairs_fwd_kernel(
    a_ptr,  # (N, C) at stride_an, stride_ac
    b_ptr,  # (N, C) at stride_bn, stride_bc
    same_ptr,  # (N,) int64: t
    w_ptr,  # (C,)
    beta_ptr,  # ()
    loss_ptr,  # (N,) float32: M
    slope_ptr,  # (N,) float32: dM/ds
    N,
    C,
    stride_an,
    stride_ac,
    stride_bn,
    stride_bc,
    PAIRS: tl.constexpr,
    PAIRS_C: tl.constexpr,
):
    """M and dM/ds: PAIRS pairs a program, over all channels."""
    offs_n = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    same_n = tl.load(same_ptr + offs_n, mask=offs_n < N, other=-1)
    acc_nc = tl.zeros((PAIRS, PAIRS_C), tl.float32)
    for start_c in range(0, C, PAIRS_C):
        offs_c = start_c + tl.arange(0, PAIRS_C)
        mask_nc = (same_n >= 0)[:, None] & (offs_c < C)[None, :]
        a_nc = _load(a_ptr, offs_n[:, None], stride_an, offs_c[None, :], stride_ac, mask_nc)
        b_nc = _load(b_ptr, offs_n[:, None], stride_bn, offs_c[None, :], stride_bc, mask_nc)
        w_c = tl.load(w_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        acc_nc += tl.abs(a_nc - b_nc) * w_c[None, :]
    s_n = tl.sum(acc_nc, 1) + tl.load(beta_ptr).to(tl.float32)
    loss_n, slope_n = _loss_of(tl.where(same_n == 1, -s_n, s_n))
    slope_n = tl.where(same_n == 1, -slope_n, slope_n)
    tl.store(loss_ptr + offs_n, tl.where(same_n >= 0, loss_n, 0.0), mask=offs_n < N)
    tl.store(slope_ptr + offs_n, tl.where(same_n >= 0, slope_n, 0.0), mask=offs_n < N)


@triton.jit(do_not_specialize=["N"])
def _pairs_bwd_kernel(
    a_ptr,  # a, b, same and w as above
    b_ptr,
    same_ptr,
    w_ptr,
    q_ptr,  # (N,) float32: dL/ds
    da_ptr,  # (N, C) float32
    dw_ptr,  # (C,) float32
    N,
    C,
    stride_an,
    stride_ac,
    stride_bn,
    stride_bc,
    NEED_ROWS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    WALK_C: tl.constexpr,
    WALK_ROWS: tl.constexpr,
):
    """da and dw: WALK_C channels of all pairs a program."""
    offs_c = tl.program_id(0) * WALK_C + tl.arange(0, WALK_C)
    mask_c = offs_c < C
    w_c = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dw_c = tl.zeros((WALK_C,), tl.float32)
    for start_n in range(0, N, WALK_ROWS):
        offs_n = start_n + tl.arange(0, WALK_ROWS)
        counted_n = tl.load(same_ptr + offs_n, mask=offs_n < N, other=-1) >= 0
        mask_nc = counted_n[:, None] & mask_c[None, :]
        a_nc = _load(a_ptr, offs_n[:, None], stride_an, offs_c[None, :], stride_ac, mask_nc)
        b_nc = _load(b_ptr, offs_n[:, None], stride_bn, offs_c[None, :], stride_bc, mask_nc)
        q_n = tl.load(q_ptr + offs_n, mask=counted_n, other=0.0)
        if NEED_WEIGHT:
            dw_c += tl.sum(q_n[:, None] * tl.abs(a_nc - b_nc), 0)
        if NEED_ROWS:
            sign_nc = tl.where(a_nc == b_nc, 0.0, tl.where(a_nc < b_nc, -1.0, 1.0))
            da_nc = q_n[:, None] * w_c[None, :] * sign_nc
            mask_nc = (offs_n < N)[:, None] & mask_c[None, :]
            tl.store(da_ptr + offs_n.to(tl.int64)[:, None] * C + offs_c[None, :], da_nc, mask=mask_nc)
    if NEED_WEIGHT:
        tl.store(dw_ptr + offs_c, dw_c, mask=mask_c)


def siamese_pairs_fwd(a: Tensor, b: Tensor, same: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """M (N,) and dM/ds (N,), float32; 0 for ignored pairs."""
    n, c = a.shape
    loss = torch.empty(n, dtype=torch.float32, device=a.device)
    slope = torch.empty_like(loss)
    if n:
        with torch.cuda.device_of(a):
            _pairs_fwd_kernel[(triton.cdiv(n, PAIRS),)](
                a, b, same, weight.contiguous(), bias, loss, slope, n, c, *a.stride(), *b.stride(), PAIRS=PAIRS,
                PAIRS_C=PAIRS_C,
            )  # fmt: skip
    return loss, slope


def siamese_pairs_bwd(
    a: Tensor, b: Tensor, same: Tensor, weight: Tensor, coefficient: Tensor, need_rows: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dL/da = -dL/db (N, C) and dL/dw (C,), float32; what is not needed has size 0. coefficient (N,) is q."""
    n, c = a.shape
    da = torch.empty((n, c) if need_rows else (0,), dtype=torch.float32, device=a.device)
    dw = torch.empty(c if need_weight else 0, dtype=torch.float32, device=a.device)
    with torch.cuda.device_of(a):
        _pairs_bwd_kernel[(triton.cdiv(c, WALK_C),)](
            a, b, same, weight.contiguous(), coefficient.contiguous(), da, dw, n, c, *a.stride(), *b.stride(),
            NEED_ROWS=need_rows, NEED_WEIGHT=need_weight, WALK_C=WALK_C, WALK_ROWS=WALK_ROWS,
        )  # fmt: skip
    return da, dw
