"""One iteration of k-means, by fastproto or by faiss, and what becomes of clusters that lose all their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto.cluster._rows import Rows, block_sums
from fastproto.cluster.concentration import from_radii, radius_sums
from fastproto.ops.assign import assign
from fastproto.ops.update import update

# Centres (K, D) -> better centres, and the objective of the given ones.
Step = Callable[[Tensor], tuple[Tensor, float]]

# How far faiss moves the two halves of a split cluster: a little more than float16 resolves.
SPLIT_EPSILON = 1 / 1024


class Assignment(NamedTuple):
    """All rows beside their centres: labels of this rank's rows, the rest over all ranks."""

    labels: Tensor  # (N,) int64
    objective: float
    counts: Tensor  # (K,) int64
    concentration: Tensor  # (K,)


def lloyd(rows: Rows, spherical: bool, keep_empty: bool) -> Step:
    """The mean of the rows nearest to each centre; with ``spherical``, of unit length."""
    metric = "ip" if spherical else "l2"

    def step(centers: Tensor) -> tuple[Tensor, float]:
        total = torch.zeros(1, dtype=torch.float64, device=rows.device)
        sums = torch.zeros_like(centers, dtype=torch.float64)
        counts = torch.zeros_like(sums[:, 0])
        for _, x, weights in rows.chunks():
            labels, distance = assign(x, centers, metric)
            chunk_sums, chunk_counts = update(x, labels, len(centers), weights)
            sums += chunk_sums
            counts += chunk_counts
            total += _objective(distance, weights)
        rows.sum(sums, counts, total)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None], centers.double()).to(centers.dtype)
        if not keep_empty and bool((counts == 0).any()):
            # The rule below is stated for counts of rows: weights enter it scaled to a mean of 1.
            means = split_empty(means, counts * (rows.total / counts.sum()), rows.total)
        return unit(means) if spherical else means, float(total)

    return step


def faiss_lloyd(rows: Rows, spherical: bool) -> Step:
    """The same iteration by the installed faiss, which holds all rows in memory as float32."""
    import faiss

    x = np.concatenate([x.float().numpy() for _, x, _ in rows.chunks()])
    weights = None
    if rows.weights is not None:
        weights = (rows.weights * (rows.total / rows.weights.sum())).float().numpy()

    def step(centers: Tensor) -> tuple[Tensor, float]:
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": rows.total}
        kmeans = faiss.Kmeans(rows.dim, len(centers), niter=1, spherical=spherical, **limits)
        objective = kmeans.train(x, weights=weights, init_centroids=centers.float().numpy())
        return torch.from_numpy(kmeans.centroids).to(centers.dtype), float(objective)

    return step


def assign_all(rows: Rows, centers: Tensor, spherical: bool) -> Assignment:
    """Where every row belongs, and what follows from it, in one pass."""
    metric = "ip" if spherical else "l2"
    labels = torch.empty(rows.local, dtype=torch.int64, device=rows.home)
    total = torch.zeros(1, dtype=torch.float64, device=rows.device)
    radii = torch.zeros(len(centers), dtype=torch.float64, device=rows.device)
    counts = torch.zeros_like(radii)
    for here, x, weights in rows.chunks():
        chunk_labels, distance = assign(x, centers, metric)
        chunk_radii, chunk_counts = radius_sums(x, chunk_labels, centers)
        labels[here] = chunk_labels.to(rows.home)
        radii += chunk_radii
        counts += chunk_counts
        total += _objective(distance, weights)
    rows.sum(radii, counts, total)
    return Assignment(labels, float(total), counts.long(), from_radii(radii, counts).to(centers.dtype))


def split_empty(
    centers: Tensor,  # (K, D) float
    counts: Tensor,  # (K,) float, summing to ``rows``
    rows: int,
) -> Tensor:
    """Gives every empty cluster half of another one, as faiss does: (K, D).

    Empty clusters are served in order. Each walks round the clusters from the first and takes cluster j with a chance
    of (count_j - 1) / (rows - K); its centre becomes that one's, the two are pushed apart by 1 ± 1/1024 with signs that
    alternate along the dimensions, and they share the count. The draws are faiss's own, so that the same clusters are
    split. Source: faiss, Clustering.cpp, split_clusters.
    """
    total = len(counts)
    members = counts.cpu().numpy().astype(np.float32)
    moved = centers.cpu().numpy().copy()
    sign = np.where(np.arange(moved.shape[1]) % 2 == 0, SPLIT_EPSILON, -SPLIT_EPSILON)
    uniforms = _Uniforms()
    for empty in np.flatnonzero(members == 0):
        donor = uniforms.first_below((members - 1) / np.float32(max(1, rows - total)))
        moved[empty] = moved[donor] * (1 + sign)
        moved[donor] = moved[donor] * (1 - sign)
        members[empty] = members[donor] / 2
        members[donor] -= members[empty]
    return torch.from_numpy(moved).to(centers.device)


def unit(centers: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return F.normalize(centers.double(), dim=1, eps=1e-300).to(centers.dtype)


class _Uniforms:
    """faiss's stream of uniform numbers: the Mersenne twister of 32 bits from seed 1234, divided by 2³²."""

    def __init__(self) -> None:
        self.generator = np.random.RandomState(1234)
        self.drawn = np.empty(0, dtype=np.float32)

    def first_below(self, chances: np.ndarray) -> int:
        """Walks round the chances, one draw for each, to the first whose draw lies below it."""
        while True:
            if len(self.drawn) < len(chances):
                fresh = self.generator.randint(0, 1 << 32, size=max(4096, len(chances)), dtype=np.uint32)
                self.drawn = np.concatenate([self.drawn, fresh.astype(np.float32) / np.float32(1 << 32)])
            hits = self.drawn[: len(chances)] < chances
            first = int(hits.argmax())
            self.drawn = self.drawn[first + 1 if hits[first] else len(chances) :]
            if hits[first]:
                return first


def _objective(distance: Tensor, weights: Tensor | None) -> float:
    return float(block_sums(distance if weights is None else distance * weights).sum())
