"""update: the sum and the number of the rows that carry each label, the same in any order.

    sums_kd = Σ_{n: label_n = k} [w_n x_nd]        counts_k = Σ_{n: label_n = k} [w_n]

[v] is v rounded to a grid so coarse that float64 adds up all rows without an error. Sums of parts then add up to the
sum of the whole, bit by bit, whatever the threads, chunks or ranks that they come from. Rows labelled -1 belong
nowhere. N rows, K clusters, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def update(
    x: Tensor,  # (N, D) float
    labels: Tensor,  # (N,) int64
    num_clusters: int,
    weights: Tensor | None,  # (N,) float
    rounders: Tensor,  # (2,) float64, of w x and of w
) -> tuple[Tensor, Tensor]:
    # Row K collects what is ignored, and is cut off at the end.
    sums_kd = torch.zeros(num_clusters + 1, x.shape[1], dtype=torch.float64, device=x.device)
    counts_k = torch.zeros(num_clusters + 1, dtype=torch.float64, device=x.device)
    index_n = torch.where(labels < 0, num_clusters, labels)
    weight_n = torch.ones_like(index_n, dtype=torch.float64) if weights is None else weights.double()
    counts_k.index_add_(0, index_n, round_to_grid(weight_n, rounders[1]))
    chunk = max(1, CHUNK_ELEMENTS // x.shape[1])
    for start in range(0, x.shape[0], chunk):
        here = slice(start, start + chunk)
        values_nd = x[here].double() * weight_n[here, None]
        sums_kd.index_add_(0, index_n[here], round_to_grid(values_nd, rounders[0]))
    return sums_kd[:num_clusters], counts_k[:num_clusters]


def rounder(
    largest: Tensor,  # () float, at least 0
    count: int,
) -> Tensor:
    """1.5 · 2^e with 2^e ≥ count · largest, () float64: :func:`round_to_grid` with it makes sums of ``count`` exact.

    Numbers up to ``largest`` lie within 2^(e - 1). Added to 1.5 · 2^e they stay between 2^e and 2^(e + 1), where
    float64 resolves 2^(e - 52); sums of multiples of that are exact up to 2^(e + 1).
    """
    exponent = torch.frexp(largest.double()).exponent + max(1, count.bit_length())
    return torch.ldexp(torch.full_like(largest, 1.5, dtype=torch.float64), exponent)


def round_to_grid(values: Tensor, rounder: Tensor) -> Tensor:
    """The values, in float64, as multiples of what float64 resolves at ``rounder``."""
    return (values.double() + rounder) - rounder
