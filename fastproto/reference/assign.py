"""assign: the nearest centre of every row, and how near it is.

    l2    label_n = argmin_k ||x_n - c_k||²     distance_n = ||x_n - c_label||²
    ip    label_n = argmax_k <x_n, c_k>         distance_n = <x_n, c_label>

A matrix product finds the best centre from ½||c_k||² - <x_n, c_k>, everything taken relative to the centres' median so
that a common offset does not eat the digits; the distance itself is then summed from the coordinates. All in float64,
exact or not.
N rows, K centres, D dimensions; n the rows of one chunk, so that never more than a chunk of N x K exists.
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

    chunk = max(1, CHUNK_ELEMENTS[x.device.type] // max(*centers.shape))
    parts = []
    for part in x.split(chunk):
        x_nd = part.double()
        # <x, c_k - origin> orders the centres as <x, c_k> does, so for the inner product the rows stay as they are.
        relative_nd = x_nd - origin_d if metric == "l2" else x_nd
        score_nk = torch.addmm(bias_k, relative_nd, relative_kd.T, alpha=-1)
        best_n = score_nk.argmin(1)
        # Equal centres may come out of the product a rounding error apart: the first one this close is tried too.
        rounding_n = 2 * x.shape[1] * EPSILON * (relative_nd.norm(dim=1) * norm_k[best_n] + bias_k[best_n])
        close_nk = score_nk <= (score_nk.gather(1, best_n[:, None]) + rounding_n[:, None])
        first_n = close_nk.byte().argmax(1)

        best_distance_n = _distance(x_nd, centers_kd[best_n], metric)
        first_distance_n = _distance(x_nd, centers_kd[first_n], metric)
        nearer_n = best_distance_n < first_distance_n if metric == "l2" else best_distance_n > first_distance_n
        label_n = torch.where(nearer_n, best_n, first_n)
        distance_n = torch.where(nearer_n, best_distance_n, first_distance_n)
        parts.append((label_n, distance_n.float()))
    return torch.cat([label_n for label_n, _ in parts]), torch.cat([distance_n for _, distance_n in parts])


def _distance(x_nd: Tensor, center_nd: Tensor, metric: str) -> Tensor:
    return (x_nd - center_nd).square().sum(1) if metric == "l2" else (x_nd * center_nd).sum(1)
