# mypy: allow-untyped-defs
"""Several sets of keys in one launch: which set a part of the keys belongs to, and where a set begins."""

from __future__ import annotations

import triton
import triton.language as tl

# Each has its K as an argument of its own: Triton would specialise a tuple of them, and compile for every size.
MAX_SETS = 4


@triton.jit
def set_of_part(pid_s, y_ptrs, sizes, part):
    """The set that a part of the keys belongs to."""
    g = 0
    end = 0
    for i in tl.static_range(len(y_ptrs) - 1):
        end += tl.cdiv(sizes[i], part)
        g += (pid_s >= end).to(tl.int32)
    return g


@triton.jit
def keys_of_set(g, y_ptrs, strides_y, sizes, part):
    """Keys, stride and K of set g, and how many keys and parts the sets before it have."""
    y_ptr, stride_y, K = y_ptrs[0], strides_y[0], sizes[0]
    first_k = 0
    first_s = 0
    for i in tl.static_range(1, len(y_ptrs)):
        reached = g >= i
        y_ptr = tl.where(reached, y_ptrs[i], y_ptr)
        stride_y = tl.where(reached, strides_y[i], stride_y)
        K = tl.where(reached, sizes[i], K)
        first_k += tl.where(reached, sizes[i - 1], 0).to(tl.int64)
        first_s += tl.where(reached, tl.cdiv(sizes[i - 1], part), 0)
    return y_ptr, stride_y, K, first_k, first_s
