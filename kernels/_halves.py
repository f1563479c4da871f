# mypy: allow-untyped-defs
"""Float32 rows as pairs of float16 rows, so that tensor cores multiply them.

    x = 2^-e (h + l)      h = float16(2^e x)      l = float16(2^e x - h)      2^e max |x| in [2^14, 2^15)
    <x, y> = 2^-e 2^-f (<l_x, h_y> + <h_x, l_y> + <h_x, h_y>)

Each half has 11 bits and the second one a sign of its own: 23 bits of float32's 24, down to 2^-39 of a row's largest
number. What is left out, <l_x, l_y>, is at most 2^-22 of each |x_d y_d|. Three products at the rate of float16 are
several times as fast as float32 on the ordinary cores: an H200 has 790 / 3 TFLOP/s against 60. docs/math/contrast.md
has the bounds.

Tensor cores cut off what is below the last digit of the sum, always towards zero. So the small terms come first, and
sums of a loop, over columns (scores) or keys (add_product), are made of each block's own by the ordinary cores, which
round.

Source: the split is that of Ootomo and Yokota, arXiv 2203.03341.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastproto.kernels._tiles import ALIGNED, aligned_rows, load_rows
from torch import Tensor

BLOCK_N, BLOCK_D = 16, 128


@triton.jit
def powers(largest):
    """2^e and 2^-e with 2^e · largest in [2^14, 2^15): float16 ends below 2^16. Below 2^-112, and so for 0, e is 126:
    the inverse is to be a normal number too."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    up = tl.minimum(tl.maximum(2 * 127 + 14 - exponent, 1), 253)
    return (up << 23).to(tl.float32, bitcast=True), ((254 - up) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """h and l of float32 numbers: what float16 has of them, and of what that leaves."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def load_factor(ptr, stride, offs_n, mask_n, offs_d, D: tl.constexpr, EVEN: tl.constexpr, HALVES: tl.constexpr):
    """Columns offs_d of rows offs_n, as load_rows has them: a tuple of one tile, or of the high and the low one."""
    high = load_rows(ptr, stride, offs_n, mask_n, offs_d, D, EVEN)
    if HALVES:
        return high, load_rows(ptr + D, stride, offs_n, mask_n, offs_d, D, EVEN)
    else:
        return (high,)


@triton.jit
def scores(x, y, HALVES: tl.constexpr):
    """x · yᵀ in float32, of tuples as load_factor has them."""
    if HALVES:
        small = tl.dot(x[1], tl.trans(y[0]))
        small = tl.dot(x[0], tl.trans(y[1]), small)
        return tl.dot(x[0], tl.trans(y[0]), small)
    else:
        return tl.dot(x[0], tl.trans(y[0]))


@triton.jit
def add_product(acc, weights, largest, y, HALVES: tl.constexpr):
    """acc + weights · y in float32.

    As halves, no |weight| may exceed 1.99 of ``largest``, or float16 overflows; else they are rounded to y's dtype.
    """
    if HALVES:
        up, down = powers(largest)
        high, low = split(weights * up)
        block = tl.dot(low, y[0])
        block = tl.dot(high, y[1], block)
        block = tl.dot(high, y[0], block)
        return acc + block * down
    else:
        return tl.dot(weights.to(y[0].dtype), y[0], acc)


@triton.jit(do_not_specialize=["N"])
def _halves_kernel(
    x_ptr,  # (N, D) at stride_n, stride_d
    halves_ptr,  # (N, 2 D_OUT): h, then l, each padded by zeros
    unit_ptr,  # (N,) float32: 2^-e
    N,
    stride_n,
    stride_d,
    D: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes h, l and 2^-e: BLOCK_N rows a program."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)  # a column may be as far from the next as rows are many
    mask_n = offs_n < N
    row_ptr = x_ptr + offs_n[:, None] * stride_n
    largest_n = tl.zeros((BLOCK_N,), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        here_d = start_d + offs_d
        x_nd = tl.load(row_ptr + here_d[None, :] * stride_d, mask=mask_n[:, None] & (here_d < D)[None, :], other=0.0)
        largest_n = tl.maximum(largest_n, tl.max(tl.abs(x_nd.to(tl.float32)), 1))
    up_n, down_n = powers(largest_n)
    tl.store(unit_ptr + offs_n, down_n, mask=mask_n)
    out_ptr = halves_ptr + offs_n[:, None] * (2 * D_OUT)
    for start_d in range(0, D_OUT, BLOCK_D):
        here_d = start_d + offs_d
        x_nd = tl.load(row_ptr + here_d[None, :] * stride_d, mask=mask_n[:, None] & (here_d < D)[None, :], other=0.0)
        high_nd, low_nd = split(x_nd.to(tl.float32) * up_n[:, None])
        mask_nd = mask_n[:, None] & (here_d < D_OUT)[None, :]
        tl.store(out_ptr + here_d[None, :], high_nd, mask=mask_nd)
        tl.store(out_ptr + D_OUT + here_d[None, :], low_nd, mask=mask_nd)


def factor_rows(x: Tensor, dtype: torch.dtype, unit: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows x (N, D) as a kernel multiplies them, in vectors of 16 bytes, and what their products are to be scaled by.

    In half precision x itself or a padded copy, and None; of float32 the pairs of halves (N, 2 D), D rounded up to 16,
    and 2^-e (N,), which ``unit`` has room for. They are as many bytes as x.
    """
    if dtype != torch.float32:
        return aligned_rows(x, dtype), None
    n, d = x.shape
    padded = d + -d % ALIGNED
    halves = torch.empty(n, 2 * padded, dtype=torch.float16, device=x.device)
    unit = torch.empty(n, dtype=torch.float32, device=x.device) if unit is None else unit
    with torch.cuda.device_of(x):
        _halves_kernel[(triton.cdiv(n, BLOCK_N),)](
            x, halves, unit, n, *x.stride(), D=d, D_OUT=padded, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4
        )
    return halves, unit
