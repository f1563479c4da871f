"""Where k-means starts: rows drawn without replacement, rows drawn by k-means++, or centres that are given.

Rows are drawn by their index among all ranks' rows, so that the start does not depend on how they are spread.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto._check import expect, expect_tensor, expect_type
from fastproto.cluster._rows import Array, Rows, as_tensor, block_sums

METHODS = ("random", "k-means++")


def given_centers(init: Array, op: str, count: int, dim: int | str) -> Tensor:
    """The centres as a tensor. TypeError or ValueError unless they are (count, dim) and finite."""
    expect_type(init, (Tensor, np.ndarray), op, "init", f"{', '.join(METHODS)} or centres ({count}, {dim})")
    centers = as_tensor(init)
    expect_tensor(centers, op, "init", (count, dim))
    expect(bool(centers.isfinite().all()), op, "init", "finite centres", "NaN or infinity")
    return centers


def random_centers(rows: Rows, count: int, rng: np.random.Generator) -> Tensor:
    """``count`` different rows, all equally likely: (count, D)."""
    return rows.take(rng.choice(rows.total, size=count, replace=False))


def plus_plus_centers(rows: Rows, count: int, rng: np.random.Generator, spherical: bool = False) -> Tensor:
    """Rows drawn one after the other, each with a chance that grows with its squared distance to those before it.

    Weights multiply the chances. ``spherical`` measures between unit rows. Reads all rows ``count`` times.
    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, section 2.2.
    """
    centers = torch.zeros(count, rows.dim, dtype=rows.dtype, device=rows.device)
    nearest = torch.ones(rows.local, dtype=torch.float64, device=rows.device)
    for k in range(count):
        centers[k] = rows.take(np.array([_draw(rows, nearest, rng)]))[0]
        for here, x, _ in rows.chunks():
            x, center = x.to(rows.dtype), centers[k : k + 1]
            if spherical:
                x, center = F.normalize(x, dim=1), F.normalize(center, dim=1)
            # Straight from the differences, which a matrix product would lose for data with a common offset.
            distance = torch.cdist(x, center, compute_mode="donot_use_mm_for_euclid_dist")[:, 0].double().square()
            nearest[here] = distance if k == 0 else torch.minimum(nearest[here], distance)
    return centers


def _draw(rows: Rows, chances: Tensor, rng: np.random.Generator) -> int:
    """An index into all ranks' rows, drawn in proportion to chance times weight; any row where all of those are 0."""
    if rows.weights is not None:
        chances = chances * rows.weights.to(chances.device)
    blocks = block_sums(chances)
    totals = rows.gather(torch.tensor(blocks.sum(), dtype=torch.float64, device=rows.device)).cpu().numpy()
    uniform = rng.random()
    if not totals.sum() > 0:
        return int(uniform * rows.total)
    rank, rest = _find(totals, uniform * totals.sum())
    drawn = torch.zeros(1, dtype=torch.int64, device=rows.device)
    if rank == rows.rank:
        block, rest = _find(blocks, rest)
        inside, _ = _find(chances[block * 1024 : (block + 1) * 1024].cpu().numpy(), rest)
        drawn += rows.offset + block * 1024 + inside
    rows.sum(drawn)
    return int(drawn)


def _find(chances: np.ndarray, target: float) -> tuple[int, float]:
    """Which of the stretches of these lengths, laid end to end, holds the target, and how far into it."""
    ends = chances.cumsum()
    # The target may lie past the end by a rounding error: then it is the last stretch that has a length.
    index = min(int(np.searchsorted(ends, target, side="right")), int(np.flatnonzero(chances)[-1]))
    return index, target - (ends[index - 1] if index else 0.0)
