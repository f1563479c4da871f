"""The k nearest of many vectors, tile by tile: what a flat index of faiss is asked for beyond the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproto._check import reads_data
from fastproto.cluster._rows import Rows
from fastproto.cluster._stream import Array

TILE = 4096  # vectors at a time
SPARE = 8  # candidates beyond k, so that few rows are left with equal ones on the edge
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
    distance = torch.full((len(x), k), worst, dtype=torch.float32, device=device)
    origin = vectors.median(0).values.double()
    size = max(1, CHUNK_ELEMENTS[device.type] // max(min(TILE, total) + found, (found + SPARE) * dim))
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
    length = relative.norm(dim=1)
    longest = x.new_zeros(())
    best, labels = x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    for start in range(0, len(vectors), TILE):
        tile = vectors[start : start + TILE].double() - origin
        longest = torch.maximum(longest, tile.norm(dim=1).max())
        # ||x - v||^2 / 2 less |x|^2 / 2, or -<x, v>
        squares = tile.square().sum(1) / 2 if metric == "l2" else tile.new_zeros(len(tile))
        scores = torch.addmm(squares, relative, tile.T, alpha=-1)
        near, columns = scores.topk(min(k + SPARE, len(tile)), largest=False)
        near, labels = torch.cat([best, near], 1), torch.cat([labels, columns + start], 1)
        best, order = near.topk(min(k + SPARE, near.shape[1]), largest=False)
        labels = labels.gather(1, order)
    # The product rounds small distances away, and those of equal vectors differently: distances are summed from the
    # coordinates. They are right where no vector left out can be as near as the last one kept.
    left_out = best[:, -1]
    all_kept = labels.shape[1] == len(vectors)
    labels, distance = _nearest(x, vectors[labels], labels, k, metric)
    if all_kept:
        return labels, distance
    last = distance[:, -1].double()
    error = 2.0**-23 * last.abs()  # float32 may make two distances equal
    rounding = (x.shape[1] + 8) * 2.0**-52  # of a score, as a share of (|x| + |v|)^2 or |x| |v|
    if metric == "l2":
        left_out = 2 * left_out + length.square()
        error += rounding * (length + longest).square()
    else:
        last = x @ origin - last
        error += rounding * length * (longest + origin.norm())
    doubted = (last + error >= left_out).nonzero()[:, 0]
    size = max(1, CHUNK_ELEMENTS[x.device.type] // ((min(TILE, len(vectors)) + k) * x.shape[1]))
    for rows in doubted.split(size):
        labels[rows], distance[rows] = _search_directly(x[rows], vectors, k, metric)
    return labels, distance


def _search_directly(x: Tensor, vectors: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """As ``_search``, by the coordinates of all pairs."""
    labels = torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    for start in range(0, len(vectors), TILE):
        more = torch.arange(start, min(start + TILE, len(vectors)), device=x.device).expand(len(x), -1)
        labels = torch.cat([labels, more], 1)
        labels, distance = _nearest(x, vectors[labels], labels, min(k, labels.shape[1]), metric)
    return labels, distance


def _nearest(x: Tensor, vectors: Tensor, labels: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k nearest of every row's own vectors (n, m, D), in order: labels (n, k), and distances in float32."""
    near = vectors.double()
    distance = (near - x[:, None]).square().sum(2) if metric == "l2" else (near * x[:, None]).sum(2)
    order = _keys(distance if metric == "l2" else -distance, labels).argsort(1)[:, :k]
    return labels.gather(1, order), distance.gather(1, order).float()


def _keys(scores: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of the scores as float32, equal ones in that of their index, in the low 32 bits.

    A sort may hand out equal numbers in any order; among these none are equal.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # adding 0 makes 0 of -0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) + index
