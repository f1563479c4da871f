"""The k nearest of many vectors, tile by tile: what a flat index of faiss is asked for beyond the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproto._check import reads_data
from fastproto.cluster._rows import Rows
from fastproto.cluster._stream import Array

TILE = 4096  # vectors at a time
# Of the scores at a time.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


def several_nearest(
    x: Array,  # (N, D) float32
    vectors: Tensor,  # (M, D) float32, M >= 1
    k: int,
    metric: str,
    op: str,
) -> tuple[Tensor, Tensor]:
    """Labels (N, k) int64 and distances (N, k) float32 of the nearest vectors, nearest first, on their device.

    Distances are as ``assign`` has them, right to the last digits; equal ones go to the lowest index first. Where there
    are fewer vectors than ``k``, labels of -1 at the worst distance fill up. What is held beside the result grows with
    neither N nor M.

    Raises:
        ValueError: a row holds NaN or infinity, or is too far away for float32, where data is read.
    """
    device, (total, dim) = vectors.device, vectors.shape
    found = min(k, total)
    worst = torch.finfo(torch.float32).max * (1 if metric == "l2" else -1)
    labels = torch.full((len(x), k), -1, device=device)
    distance = torch.full((len(x), k), worst, device=device)
    origin = vectors.median(0).values.double()
    size = max(1, CHUNK_ELEMENTS[device.type] // max(min(TILE, total) + found, found * dim))
    rows = Rows(x, device=device, chunk_rows=size)
    for here, part, _ in rows.chunks():
        labels[here, :found], distance[here, :found] = _search(part.double(), vectors, found, metric, origin)
    if reads_data(distance) and not distance.isfinite().all():
        rows.refuse(op)
    return labels, distance


def _search(
    x: Tensor,  # (n, D) float64
    vectors: Tensor,
    k: int,
    metric: str,
    origin: Tensor,  # (D,) amid the vectors: a common offset takes no digits
) -> tuple[Tensor, Tensor]:
    # <x, v - origin> orders the vectors as <x, v> does, so for the inner product the rows stay as they are.
    relative = x - origin if metric == "l2" else x
    best = torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    for start in range(0, len(vectors), TILE):
        tile = vectors[start : start + TILE].double() - origin
        scores = -(relative @ tile.T)
        if metric == "l2":
            squares = relative.square().sum(1, keepdim=True)
            scores = scores.mul_(2).add_(tile.square().sum(1)).add_(squares).clamp_(min=0)
        keys = _keys(scores, torch.arange(start, start + len(tile), device=x.device))
        best = torch.cat([best, keys], 1)
        best = best.topk(min(k, best.shape[1]), largest=False).values
    labels = best & 0xFFFFFFFF
    # The product rounds small distances away; they are summed from the coordinates, and put in order by that.
    near = vectors[labels].double()
    distance = (near - x[:, None]).square().sum(2) if metric == "l2" else (near * x[:, None]).sum(2)
    order = _keys(distance if metric == "l2" else -distance, labels).argsort(1)
    return labels.gather(1, order), distance.gather(1, order).float()


def _keys(scores: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of the scores as float32, equal ones in that of their index, in the low 32 bits.

    topk and sort may hand out equal numbers in any order; among these none are equal.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # adding 0 makes 0 of -0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) + index
