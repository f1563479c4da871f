"""search: the few nearest of many vectors for every row, nearest first.

    l2    the `count` least ||x_n - v_k||²      ip    the `count` largest <x_n, v_k>

Equal distances, as float32, go to the lowest index first. Matrix products in float64 find candidates, tile by tile,
taken relative to the vectors' median so that a common offset does not eat the digits; distances are then summed from
the coordinates. Rows whose candidates rounding may have mixed up are looked at once more, without products.
N rows, K vectors, D dimensions; n the rows of one chunk, m the vectors of one tile or the candidates of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 4096  # vectors at a time
SPARE = 8  # candidates beyond those wanted, so that few rows are left with equal ones on the edge
# Of the scores at a time.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


@torch.no_grad()
def search(
    x: Tensor,  # (N, D) float
    vectors: Tensor,  # (K, D) float
    count: int,
    metric: str,
) -> tuple[Tensor, Tensor]:
    labels = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    distance = torch.empty(len(x), count, dtype=torch.float32, device=x.device)
    origin_d = vectors.double().median(0).values
    wide = max(min(TILE, len(vectors)) + count, (count + SPARE) * x.shape[1])
    size = max(1, CHUNK_ELEMENTS[x.device.type] // wide)
    for start in range(0, len(x), size):
        here = slice(start, start + size)
        labels[here], distance[here] = _search(x[here].double(), vectors, count, metric, origin_d)
    return labels, distance


def _search(
    x_nd: Tensor,  # float64
    vectors: Tensor,
    count: int,
    metric: str,
    origin_d: Tensor,  # float64
) -> tuple[Tensor, Tensor]:
    # <x, v - origin> orders the vectors as <x, v> does, so for the inner product the rows stay as they are.
    relative_nd = x_nd - origin_d if metric == "l2" else x_nd
    length_n = relative_nd.norm(dim=1)
    longest = x_nd.new_zeros(())
    best_nm, label_nm = x_nd.new_zeros(len(x_nd), 0), x_nd.new_zeros(len(x_nd), 0, dtype=torch.int64)
    for start in range(0, len(vectors), TILE):
        tile_md = vectors[start : start + TILE].double() - origin_d
        longest = torch.maximum(longest, tile_md.norm(dim=1).max())
        # ||x - v||^2 / 2 less |x|^2 / 2, or -<x, v>
        bias_m = tile_md.square().sum(1) / 2 if metric == "l2" else torch.zeros_like(tile_md[:, 0])
        score_nm = torch.addmm(bias_m, relative_nd, tile_md.T, alpha=-1)
        near_nm, columns = score_nm.topk(min(count + SPARE, len(tile_md)), largest=False)
        near_nm, label_nm = torch.cat([best_nm, near_nm], 1), torch.cat([label_nm, columns + start], 1)
        best_nm, order = near_nm.topk(min(count + SPARE, near_nm.shape[1]), largest=False)
        label_nm = label_nm.gather(1, order)
    # The product rounds small distances away, and those of equal vectors differently. What the coordinates say is right
    # where no vector left out can be as near as the last one kept.
    left_out_n = best_nm[:, -1]
    all_kept = label_nm.shape[1] == len(vectors)
    labels, distance = _nearest(x_nd, vectors[label_nm], label_nm, count, metric)
    if all_kept:
        return labels, distance
    last_n = distance[:, -1].double()
    error_n = 2.0**-23 * last_n.abs() + 2.0**-149  # float32 may make two distances equal
    rounding = (x_nd.shape[1] + 8) * 2.0**-52  # of a score, as a share of (|x| + |v|)^2 or |x| |v|
    if metric == "l2":
        left_out_n = 2 * left_out_n + length_n.square()
        error_n += rounding * (length_n + longest).square()
    else:
        last_n = x_nd @ origin_d - last_n
        error_n += rounding * length_n * (longest + origin_d.norm())
    # Of what is not finite nothing is known.
    doubted = (~(last_n + error_n < left_out_n)).nonzero()[:, 0]
    size = max(1, CHUNK_ELEMENTS[x_nd.device.type] // ((min(TILE, len(vectors)) + count) * x_nd.shape[1]))
    for rows in doubted.split(size):
        labels[rows], distance[rows] = _search_directly(x_nd[rows], vectors, count, metric)
    return labels, distance


def _search_directly(x_nd: Tensor, vectors: Tensor, count: int, metric: str) -> tuple[Tensor, Tensor]:
    """As ``_search``, by the coordinates of all pairs."""
    label_nm = x_nd.new_zeros(len(x_nd), 0, dtype=torch.int64)
    for start in range(0, len(vectors), TILE):
        more = torch.arange(start, min(start + TILE, len(vectors)), device=x_nd.device).expand(len(x_nd), -1)
        label_nm = torch.cat([label_nm, more], 1)
        label_nm, distance = _nearest(x_nd, vectors[label_nm], label_nm, min(count, label_nm.shape[1]), metric)
    return label_nm, distance


def _nearest(
    x_nd: Tensor,
    near_nmd: Tensor,
    label_nm: Tensor,
    count: int,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """The nearest of every row's own vectors, in order: labels (n, count), and distances in float32."""
    near_nmd = near_nmd.double()
    x_n1d = x_nd[:, None]
    distance_nm = (near_nmd - x_n1d).square().sum(2) if metric == "l2" else (near_nmd * x_n1d).sum(2)
    order = _keys(distance_nm if metric == "l2" else -distance_nm, label_nm).argsort(1)[:, :count]
    return label_nm.gather(1, order), distance_nm.gather(1, order).float()


def _keys(score_nm: Tensor, index_nm: Tensor) -> Tensor:
    """Integers in the order of the scores as float32, equal ones in that of their index, in the low 32 bits.

    A sort may hand out equal numbers in any order; among these none are equal. What is not a number comes last.
    """
    numbers = score_nm.float().nan_to_num(torch.inf, torch.inf, -torch.inf)
    bits = (numbers + 0.0).view(torch.int32)  # adding 0 makes 0 of -0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) + index_nm
