"""update: the sum and the number of the rows that carry each label.

    sums_kd = Σ_{n: label_n = k} w_n x_nd        counts_k = Σ_{n: label_n = k} w_n

Rows labelled -1 belong nowhere. Rows are added one after the other in float64, so the bits depend neither on the run
nor on the number of threads. N rows, K clusters, D dimensions.
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
) -> tuple[Tensor, Tensor]:
    # Row K collects what is ignored, and is cut off at the end.
    sums_kd = torch.zeros(num_clusters + 1, x.shape[1], dtype=torch.float64, device=x.device)
    counts_k = torch.zeros(num_clusters + 1, dtype=torch.float64, device=x.device)
    index_n = torch.where(labels < 0, num_clusters, labels)
    weight_n = torch.ones_like(index_n, dtype=torch.float64) if weights is None else weights.double()
    _add_rows(counts_k, index_n, weight_n)
    chunk = max(1, CHUNK_ELEMENTS // x.shape[1])
    for start in range(0, x.shape[0], chunk):
        here = slice(start, start + chunk)
        values_nd = x[here].double()
        _add_rows(sums_kd, index_n[here], values_nd if weights is None else values_nd * weight_n[here, None])
    return sums_kd[:num_clusters], counts_k[:num_clusters]


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds in a fixed order: on the CPU index_add_ goes row by row; on CUDA it races, and index_put_ sorts."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)
