"""One iteration of k-means over all rows, and the assignment that ends a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto.cluster._rows import Rows
from fastproto.cluster.bounds import Search
from fastproto.cluster.concentration import from_radii, radii
from fastproto.ops.update import two_rounders, update_parts


class Iteration(NamedTuple):
    """What one iteration makes of its centres, over all ranks, on the device: nothing of it has been waited for."""

    centers: Tensor  # (K, D) means of the rows nearest to each given centre; of none, the centre itself
    objective: Tensor  # () float64, of the given centres
    counts: Tensor  # (K,) float64, rows or their weights


# A fit may drop an iteration that it queued ahead: what a step remembers has to hold for whatever centres come next.
Step = Callable[[Tensor], Iteration]


class Assignment(NamedTuple):
    """All rows beside their centres: labels of this rank's rows, the rest over all ranks."""

    labels: Tensor  # (N,) int64
    objective: float
    counts: Tensor  # (K,) int64
    concentration: Tensor  # (K,)


def lloyd(rows: Rows, spherical: bool, search: Search) -> Step:
    """The mean of the rows nearest to each centre; with ``spherical``, of unit length. Reads all rows once."""

    def step(centers: Tensor) -> Iteration:
        parts = torch.zeros(2, *centers.shape, dtype=torch.float64, device=centers.device)
        count_parts = torch.zeros_like(parts[..., 0])
        distance = torch.zeros(rows.local, dtype=torch.float32, device=rows.device)
        for here, x, weights in rows.chunks():
            labels, distance[here] = search.nearest(here.start, x, centers)
            chunk_sums, chunk_counts = update_parts(x, labels, len(centers), weights, rows.rounders)
            parts += chunk_sums
            count_parts += chunk_counts
        rows.sum(parts, count_parts)
        sums, counts = parts.sum(0), count_parts.sum(0)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None], centers.double()).to(centers.dtype)
        return Iteration(unit(means) if spherical else means, rows.weighted_sum(distance), counts)

    return step


def assign_all(rows: Rows, centers: Tensor, search: Search) -> Assignment:
    """Where every row belongs, and what follows from it, in one pass."""
    labels = torch.zeros(rows.local, dtype=torch.int64, device=rows.device)
    distance = torch.zeros(rows.local, dtype=torch.float32, device=rows.device)
    radius = torch.zeros(rows.local, 1, dtype=torch.float64, device=rows.device)
    for here, x, _ in rows.chunks():
        labels[here], distance[here] = search.nearest(here.start, x, centers)
        radius[here, 0] = radii(x, labels[here], centers)
    most = rows.largest(radius)
    rounders = two_rounders(torch.stack([most, torch.ones_like(most)]), rows.total)
    parts, count_parts = update_parts(radius, labels, len(centers), None, rounders)
    rows.sum(parts, count_parts)
    counts = count_parts.sum(0)
    phi = from_radii(parts.sum(0)[:, 0], counts).to(centers.dtype)
    return Assignment(labels.to(rows.home), float(rows.weighted_sum(distance)), counts.long(), phi)


def unit(centers: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    # Of the largest number's size first: squares of tiny ones are 0 in float64 too.
    most = centers.double().abs().amax(1, keepdim=True)
    return F.normalize(centers.double() / torch.where(most > 0, most, 1), dim=1).to(centers.dtype)
