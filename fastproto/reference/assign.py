"""assign: the nearest centre of every row, and how near it is.

    l2    label_n = argmin_k ||x_n - c_k||²     distance_n = ||x_n - c_label||²
    ip    label_n = argmax_k <x_n, c_k>         distance_n = <x_n, c_label>

A matrix product finds the best centres from ½||c_k||² - <x_n, c_k>, everything taken relative to the centres' median so
that a common offset does not eat the digits. All that its rounding may have put behind are compared by distances that
are summed from the coordinates. All in float64, exact or not.
N rows, K centres, D dimensions; n the rows of one chunk, so that never more than a chunk of N x K exists; p its pairs
of a row and a centre that may be its nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the N x K scores at a time: what stays in a CPU's cache, what fills a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
EPSILON = torch.finfo(torch.float64).eps


@torch.no_grad()
def assign(
    x: Tensor,  # (N, D) float
    centers: Tensor,  # (K, D) float
    metric: str,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    centers_kd = centers.double()
    # The median, unlike the mean, stays with the data when one centre is far away.
    origin_d = centers_kd.median(0).values
    relative_kd = centers_kd - origin_d
    bias_k = relative_kd.square().sum(1) / 2 if metric == "l2" else torch.zeros_like(relative_kd[:, 0])
    norm_k = relative_kd.norm(dim=1)

    # Of a score, twice over: D products and their sum, the difference from the origin, the bias and its addition.
    rounding = 2 * (x.shape[1] + 8) * EPSILON
    chunk = max(1, CHUNK_ELEMENTS[x.device.type] // max(*centers.shape))
    parts = []
    for part in x.split(chunk):
        x_nd = part.double()
        # <x, c_k - origin> orders the centres as <x, c_k> does, so for the inner product the rows stay as they are.
        relative_nd = x_nd - origin_d if metric == "l2" else x_nd
        score_nk = torch.addmm(bias_k, relative_nd, relative_kd.T, alpha=-1)
        error_nk = torch.addcmul(bias_k, relative_nd.norm(dim=1)[:, None], norm_k).mul_(rounding)
        certain_n = (score_nk + error_nk).amin(1)
        row_p, center_p = (score_nk.sub_(error_nk) <= certain_n[:, None]).nonzero().unbind(1)
        label_n = _nearest(x_nd, centers_kd, row_p, center_p, metric)
        parts.append((label_n, _distance(x_nd, centers_kd[label_n], metric).float()))
    return torch.cat([label_n for label_n, _ in parts]), torch.cat([distance_n for _, distance_n in parts])


def _nearest(x_nd: Tensor, centers_kd: Tensor, row_p: Tensor, center_p: Tensor, metric: str) -> Tensor:
    """Labels (n,): of each row's pairs the nearest centre, the lowest where several are; 0 for a row without pairs."""
    size = max(1, CHUNK_ELEMENTS[x_nd.device.type] // x_nd.shape[1])
    gap_p = torch.cat(
        [
            _distance(x_nd[row], centers_kd[center], metric)
            for row, center in zip(row_p.split(size), center_p.split(size), strict=True)
        ]
    )
    gap_p = gap_p if metric == "l2" else -gap_p
    least_n = gap_p.new_full((len(x_nd),), torch.inf).scatter_reduce_(0, row_p, gap_p, "amin")
    wins_p = gap_p == least_n[row_p]
    none = len(centers_kd)
    label_n = row_p.new_full((len(x_nd),), none).scatter_reduce_(0, row_p[wins_p], center_p[wins_p], "amin")
    return label_n.where(label_n < none, 0)


def _distance(x_nd: Tensor, center_nd: Tensor, metric: str) -> Tensor:
    return (x_nd - center_nd).square().sum(1) if metric == "l2" else (x_nd * center_nd).sum(1)
