"""Where k-means starts: rows drawn without replacement, rows drawn by k-means++, or centres that are given.

Rows are drawn by their index among all ranks' rows, so that the start does not depend on how they are spread.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproto._check import expect, expect_tensor, expect_type
from fastproto.cluster._lloyd import unit
from fastproto.cluster._rows import Rows
from fastproto.cluster._stream import Array, as_tensor
from fastproto.cluster.concentration import CHUNK_ELEMENTS, EXACT

METHODS = ("random", "k-means++")


def given_centers(init: Array, op: str, count: int, dim: int | str, argument: str = "init") -> Tensor:
    """The centres as a tensor. TypeError or ValueError unless they are (count, dim) and finite."""
    expect_type(init, (Tensor, np.ndarray), op, argument, f"{', '.join(METHODS)} or centres ({count}, {dim})")
    centers = as_tensor(init)
    expect_tensor(centers, op, argument, (count, dim))
    expect(bool(centers.isfinite().all()), op, argument, "finite centres", "NaN or infinity")
    return centers


def random_centers(rows: Rows, count: int, rng: np.random.Generator) -> Tensor:
    """``count`` different rows, all equally likely: (count, D)."""
    return rows.take(rng.choice(rows.total, size=count, replace=False))


def plus_plus_centers(rows: Rows, count: int, rng: np.random.Generator, spherical: bool = False) -> Tensor:
    """Rows drawn one after the other, each with a chance that grows with its squared distance to those before it.

    Weights multiply the chances. ``spherical`` measures between unit rows. Each draw reads all rows once, to see which
    of them are nearer to the new centre than to those before it.
    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, section 2.2.
    """
    centers = torch.zeros(count, rows.dim, dtype=rows.dtype, device=rows.device)
    nearest = torch.ones(rows.local, dtype=rows.dtype, device=rows.device)
    scale = _inverse_norms(rows) if spherical else None
    for k in range(count):
        centers[k] = rows.take(np.array([_draw(rows, nearest, rng)]))[0]
        if k + 1 == count:
            break
        center = unit(centers[k : k + 1])[0] if spherical else centers[k]
        for here, x, _ in rows.chunks():
            distance = _squared_distances(x, center, None if scale is None else scale[here])
            nearest[here] = distance if k == 0 else torch.minimum(nearest[here], distance)
    return centers


def _inverse_norms(rows: Rows) -> Tensor:
    """1 / ||x_n|| (N,), and 1 for rows of zeros."""
    squares = torch.ones(rows.local, dtype=rows.dtype, device=rows.device)
    origin = squares.new_zeros(rows.dim)
    for here, x, _ in rows.chunks():
        squares[here] = _squared_distances(x, origin)
    return torch.where(squares > 0, squares, 1).sqrt().reciprocal()


def _squared_distances(x: Tensor, center: Tensor, scale: Tensor | None = None) -> Tensor:
    """||s_n x_n - c||² (n,) in the dtype of ``center``. The same bits whatever rows stand beside a row."""
    chunk = max(1, CHUNK_ELEMENTS[x.device.type] // x.shape[1])
    out = center.new_zeros(len(x))
    for start in range(0, len(x), chunk):
        here = slice(start, start + chunk)
        x_nd = x[here].to(center.dtype)
        if scale is not None:
            x_nd = x_nd * scale[here, None]
        out[here] = torch.cdist(x_nd, center[None], compute_mode=EXACT)[:, 0]
    return out.square_()


def _draw(rows: Rows, chances: Tensor, rng: np.random.Generator) -> int:
    """An index into all ranks' rows, drawn in proportion to chance times weight; any row where all of those are 0.

    Every row holds a whole number of tickets, and one ticket is drawn. Whole numbers have the same sums wherever the
    rows are divided into ranks, so the same ticket belongs to the same row.
    """
    chances = chances.double() if rows.weights is None else chances * rows.weights
    # Rows whose distance float32 cannot hold are refused when the first iteration finds them.
    chances = chances.clamp(max=torch.finfo(torch.float32).max)
    largest = rows.max(chances.max() if rows.local else chances.new_zeros(()))
    # All ranks' tickets stay below 2^62. Where no row has a chance, each gets one ticket.
    tickets = (chances / largest * 2.0 ** (62 - rows.total.bit_length())).long()
    ends = torch.where(largest > 0, tickets, 1).cumsum(0)
    totals = rows.gather(ends[-1] if rows.local else ends.new_zeros(()))
    ticket = (rng.random() * totals.sum().double()).long().clamp(max=totals.sum() - 1) - totals[: rows.rank].sum()
    index = rows.offset + torch.searchsorted(ends, ticket, right=True)
    index = torch.where((ticket >= 0) & (ticket < totals[rows.rank]), index, 0)
    rows.sum(index)
    return int(index)
