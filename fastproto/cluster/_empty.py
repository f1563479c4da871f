"""What becomes of clusters that lose all their rows: half of a large one, chosen as faiss chooses it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# How far faiss moves the two halves of a split cluster: the spacing of float16 at 1.
SPLIT_EPSILON = 1 / 1024


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
