"""update: the sum and the number of the rows that carry each label, the same in any order.

    sums_kd = Σ_{n: label_n = k} w_n x_nd        counts_k = Σ_{n: label_n = k} w_n

Each number v is taken in two parts, [v] + [v - [v]]': v rounded to a grid so coarse that float64 adds up all rows
without an error, and what is left of it on a grid as much finer, so that one huge row does not round away the others.
Sums of parts then add up to the sum of the whole, bit by bit, whatever threads, chunks or ranks they come from. Rows
labelled -1 belong nowhere. N rows, K clusters, D dimensions.
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
    rounders: Tensor,  # (2, 2) float64: coarse and fine, of w x and of w
) -> tuple[Tensor, Tensor]:
    """The coarse and the fine part of the sums (2, K, D) and of the counts (2, K), float64."""
    # Row K collects what is ignored, and is cut off at the end.
    sums_2kd = torch.zeros(2, num_clusters + 1, x.shape[1], dtype=torch.float64, device=x.device)
    counts_2k = torch.zeros(2, num_clusters + 1, dtype=torch.float64, device=x.device)
    index_n = torch.where(labels < 0, num_clusters, labels)
    weight_n = torch.ones_like(index_n, dtype=torch.float64) if weights is None else weights.double()
    _add(counts_2k, index_n, weight_n, rounders[:, 1])
    chunk = max(1, CHUNK_ELEMENTS // x.shape[1])
    for start in range(0, x.shape[0], chunk):
        here = slice(start, start + chunk)
        values_nd = x[here].double() * weight_n[here, None]
        _add(sums_2kd, index_n[here], values_nd, rounders[:, 0])
    return sums_2kd[:, :num_clusters].contiguous(), counts_2k[:, :num_clusters].contiguous()


def _add(totals: Tensor, index: Tensor, values: Tensor, rounders: Tensor) -> None:
    coarse = round_to_grid(values, rounders[0])
    totals[0].index_add_(0, index, coarse)
    totals[1].index_add_(0, index, round_to_grid(values - coarse, rounders[1]))


def two_rounders(
    most: Tensor,  # (2,) float64: the largest w |x| and the largest w
    count: int,
) -> Tensor:
    """Coarse and fine rounders of ``count`` such numbers, (2, 2) float64.

    What the coarse grid leaves of a number is at most half of its step, 2^-52 of the power of two in its rounder.
    """
    coarse = torch.stack([rounder(value, count) for value in most])
    fine = torch.stack([rounder(value * 2.0**-52, count) for value in coarse])
    return torch.stack([coarse, fine])


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
