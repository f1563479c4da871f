"""How points are spread on the sphere: alignment, uniformity, and the correlation of dimensions.

All take plain features, or the rows of :func:`batch_prototypes` with their mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastproto._check import INTEGERS, NUMBERS, expect, expect_index, expect_tensor, expect_type, without_ignored
from fastproto.losses._common import expect_reduction, expect_views, reduce_rows, unit, widen, without_autocast
from fastproto.ops.uniformity import uniformity_unchecked

# Barlow Twins' weight of the off-diagonal entries, arXiv 2103.03230.
OFF_DIAGONAL = 0.0051
# Added to a variance before its root, so that a constant dimension standardises to 0.
VARIANCE_EPS = 1e-8


class BatchPrototypes(NamedTuple):
    """What :func:`batch_prototypes` gives: one row per sample (N, D), and a mask (N,) with each prototype once."""

    prototypes: Tensor
    mask: Tensor


def batch_prototypes(features: Tensor, assignments: Tensor, *, ignore_index: int = -1) -> BatchPrototypes:
    """The prototypes that a batch itself spans, with a gradient to all of its members.

        p_y = unit( mean of unit(x_j) over the rows j with assignment y )

    Shapes do not depend on the data or on the number of prototypes K: row i holds p_y of its own assignment, so rows of
    one prototype are equal, and ``mask`` is true at the first row of each prototype present.

    Args:
        features: (N, D) float16, bfloat16, float32 or float64, not normalised.
        assignments: (N,) int64 or int32, non-negative, or ``ignore_index``: such a row is in no prototype, is 0 and not
            in the mask.
        ignore_index: the assignment of rows without a prototype.

    Returns:
        BatchPrototypes(prototypes, mask): (N, D) of at least float32, and (N,) bool.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, or a negative assignment that is not ``ignore_index``.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> batch_prototypes(features, torch.tensor([7, 7, 3]))
        BatchPrototypes(prototypes=tensor([[0.7071, 0.7071],
                [0.7071, 0.7071],
                [0.0000, 1.0000]]), mask=tensor([ True, False,  True]))

    Distributed: the batch is a rank's own.

    Memory: grows with N · D and N².

    Source: our reading of PAUC, arXiv 2210.10194.
    """
    expect_tensor(features, "batch_prototypes", "features", ("N", "D"))
    expect_tensor(assignments, "batch_prototypes", "assignments", (features.shape[0],), INTEGERS, features.device)
    expect_index(assignments, "batch_prototypes", "assignments", None, ignore_index)
    assigned_n = without_ignored(assignments, ignore_index) >= 0
    same_nn = (assignments[:, None] == assignments) & assigned_n
    x_nd = unit(_masked(features, assigned_n))
    # A product and no scatter: sums in a fixed order. Their count cancels in unit().
    with without_autocast(features):
        prototypes = unit(same_nn.to(x_nd.dtype) @ x_nd)
    first_n = ~same_nn.tril(-1).any(1) & assigned_n
    return BatchPrototypes(_masked(prototypes, assigned_n), first_n)


def alignment(
    x0: Tensor,  # (N, D) float
    x1: Tensor,  # (N, D) float
    *,
    alpha: float = 2,
    mask: Tensor | None = None,  # (N,) bool
    reduction: str = "mean",
) -> Tensor:
    """How far the two views of a sample are apart on the sphere.

        L_i = ||unit(x0_i) - unit(x1_i)||^alpha

    Args:
        x0, x1: (N, D) float16, bfloat16, float32 or float64, not normalised.
        alpha: alpha >= 1.
        mask: the rows that count (N,) bool; by default all.
        reduction: "mean" over the rows that count, "sum", or "none" for the rows (N,), 0 where masked.

    Returns:
        The loss, at least float32; 0 where no row counts.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, alpha < 1, or an unknown reduction.

    Distributed: row by row; DDP's mean equals one process where as many rows count on every rank.

    Memory: grows with N · D.

    Example:
        >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(2.0000)

    Source: Wang and Isola, arXiv 2005.10242, section 4.1.
    """
    expect_views(x0, x1, "alignment", ("x0", "x1"))
    expect_reduction(reduction, "alignment")
    expect_alpha(alpha, "alignment")
    expect_mask(mask, x0, "alignment")
    difference = unit(_masked(x0, mask)) - unit(_masked(x1, mask))
    counted = None if mask is None else mask.sum()
    return reduce_rows(torch.linalg.vector_norm(difference, dim=1) ** alpha, reduction, counted)


def uniformity(x: Tensor, *, t: float = 2, mask: Tensor | None = None) -> Tensor:
    """How unevenly points cover the sphere: the logarithm of their mean Gaussian potential.

        L = log mean_{i≠j} exp(-t · ||unit(x_i) - unit(x_j)||²)

    Args:
        x: (N, D) float16, bfloat16, float32 or float64, not normalised.
        t: t > 0.
        mask: the rows that count (N,) bool; by default all.

    Returns:
        The loss, a scalar of at least float32; 0 where fewer than two rows count.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, or t is not positive.

    Distributed: pairs are those of a rank's own batch.

    Memory: grows with N · D; with N² on the reference backend, which float64 takes everywhere.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        tensor(-8.)

    Source: Wang and Isola, arXiv 2005.10242, section 4.1.
    """
    expect_tensor(x, "uniformity", "x", ("N", "D"))
    expect_t(t, "uniformity")
    expect_mask(mask, x, "uniformity")
    counted = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if mask is None else mask
    return uniformity_unchecked(unit(_masked(x, mask)), counted, t)


def cross_correlation(x0: Tensor, x1: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """How far the cross-correlation of two views is from the identity.

        R = Z0ᵀ Z1 / N,  Z = (x - mean) / √(variance + 1e-8) per dimension
        L = Σ_a (1 - R_aa)² + 0.0051 · Σ_{a≠b} R_ab²

    Rows are not scaled to length 1. A dimension that is constant has R_ab = 0.

    Args:
        x0, x1: (N, D) float16, bfloat16, float32 or float64.
        mask: the rows that count (N,) bool; by default all.

    Returns:
        The loss, a scalar of at least float32; 0 where fewer than two rows count.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit.

    Distributed: statistics are those of a rank's own batch.

    Memory: grows with N · D and D².

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> cross_correlation(x, -x)
        tensor(8.)

    Source: Barlow Twins, arXiv 2103.03230, Eq. 1.
    """
    expect_views(x0, x1, "cross_correlation", ("x0", "x1"))
    expect_mask(mask, x0, "cross_correlation")
    count = _count(x0, mask)
    divisor = _at_least_one(count)
    dtype = torch.promote_types(x0.dtype, x1.dtype)
    z0, z1 = (_standardise(x.to(dtype), mask, divisor) for x in (x0, x1))
    with without_autocast(x0):
        r_dd = z0.T @ z1 / divisor
    loss = (1 - r_dd.diagonal()).square().sum() + OFF_DIAGONAL * _off_diagonal(r_dd).square().sum()
    if isinstance(count, Tensor):
        return torch.where(count > 1, loss, 0)
    return loss if count > 1 else loss * 0


def covariance(x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """How much the dimensions of a set of points vary together.

        L = (1/D) · Σ_{a≠b} Cov(x)_ab²,  Cov over N - 1

    Rows are not scaled to length 1.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64.
        mask: the rows that count (N,) bool; by default all.

    Returns:
        The loss, a scalar of at least float32; 0 where fewer than two rows count.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit.

    Distributed: statistics are those of a rank's own batch.

    Memory: grows with N · D and D².

    Example:
        >>> covariance(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor(4.)

    Source: VICReg, arXiv 2105.04906, section 4.
    """
    expect_tensor(x, "covariance", "x", ("N", "D"))
    expect_mask(mask, x, "covariance")
    count = _count(x, mask)
    centred = _centre(x, mask, _at_least_one(count))
    with without_autocast(x):
        covariance_dd = centred.T @ centred / _at_least_one(count - 1)
    return _off_diagonal(covariance_dd).square().sum() / max(x.shape[1], 1)


def expect_alpha(alpha: float, op: str) -> None:
    # Below 1 the gradient is infinite where two views agree.
    expect_type(alpha, NUMBERS, op, "alpha", "a number")
    expect(1 <= alpha < math.inf, op, "alpha", "at least 1, finite", alpha)


def expect_t(t: float, op: str, argument: str = "t") -> None:
    expect_type(t, NUMBERS, op, argument, "a number")
    # Beyond float32 it is infinite there.
    expect(0 < t <= torch.finfo(torch.float32).max, op, argument, "a positive number that float32 can hold", t)


def expect_kind(kind: str, op: str, argument: str = "kind") -> None:
    expect(kind in ("cross", "covariance"), op, argument, '"cross" or "covariance"', repr(kind))


def expect_mask(mask: Tensor | None, x: Tensor, op: str) -> None:
    if mask is not None:
        expect_tensor(mask, op, "mask", (x.shape[0],), (torch.bool,), x.device)


def _count(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many rows count."""
    return x.shape[0] if mask is None else mask.sum()


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that do not count become 0, so that not even a NaN in them reaches the others."""
    return x if mask is None else torch.where(mask[:, None], x, 0)


def _centre(x: Tensor, mask: Tensor | None, count: Tensor | int) -> Tensor:
    """Rows that count minus their mean; the others are 0."""
    x = _masked(widen(x), mask)
    return _masked(x - x.sum(0) / count, mask)


def _off_diagonal(square_dd: Tensor) -> Tensor:
    """All but the diagonal, without a copy: in rows of D + 1 numbers from the second on the diagonal is a column."""
    size = len(square_dd)
    return square_dd.flatten()[1:].view(max(size - 1, 0), size + 1)[:, :-1]


def _standardise(x: Tensor, mask: Tensor | None, count: Tensor | int) -> Tensor:
    centred = _centre(x, mask, count)
    return centred / (centred.square().sum(0) / count + VARIANCE_EPS).sqrt()


class AlignmentLoss(nn.Module):
    """Distance of the two views of a sample on the sphere: mean ||unit(x0) - unit(x1)||^alpha.

    Args:
        alpha: alpha >= 1.

    Shape:
        x0, x1: (N, D) float16, bfloat16, float32 or float64, not normalised. mask: (N,) bool, the rows that count.
        Output: scalar of at least float32.

    Raises:
        ValueError: alpha < 1, or shapes or devices that do not fit.
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> AlignmentLoss()(torch.eye(2), torch.eye(2))
        tensor(0.)

    Distributed: row by row; DDP's mean equals one process on the whole batch where as many rows count on every rank.

    Memory: grows with N · D.

    Source: Wang and Isola, arXiv 2005.10242, section 4.1.
    """

    def __init__(self, alpha: float = 2) -> None:
        super().__init__()
        expect_alpha(alpha, "AlignmentLoss")
        self.alpha = alpha

    def forward(self, x0: Tensor, x1: Tensor, mask: Tensor | None = None) -> Tensor:
        return alignment(x0, x1, alpha=self.alpha, mask=mask)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class UniformityLoss(nn.Module):
    """Logarithm of the mean Gaussian potential: log mean_{i≠j} exp(-t · ||unit(x_i) - unit(x_j)||²).

    Args:
        t: t > 0.

    Shape:
        x: (N, D) float16, bfloat16, float32 or float64, not normalised. mask: (N,) bool, the rows that count. Output:
        scalar of at least float32, 0 for fewer than two rows.

    Raises:
        ValueError: t is not positive, or shapes or devices that do not fit.
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> UniformityLoss()(torch.eye(3))
        tensor(-4.0000)

    Distributed: pairs are those of a rank's own batch.

    Memory: grows with N · D; with N² on the reference backend, which float64 takes everywhere.

    Source: Wang and Isola, arXiv 2005.10242, section 4.1.
    """

    def __init__(self, t: float = 2) -> None:
        super().__init__()
        expect_t(t, "UniformityLoss")
        self.t = t

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return uniformity(x, t=self.t, mask=mask)

    def extra_repr(self) -> str:
        return f"t={self.t}"


class CorrelationLoss(nn.Module):
    """Correlation of dimensions: ``functional.cross_correlation`` of two views, or the mean of their ``covariance``.

    Args:
        kind: "cross" or "covariance".

    Shape:
        x0, x1: (N, D) float16, bfloat16, float32 or float64. mask: (N,) bool, the rows that count. Output: scalar of
        at least float32, 0 for fewer than two rows.

    Raises:
        ValueError: an unknown kind, or shapes or devices that do not fit.
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> CorrelationLoss("covariance")(x, 2 * x)
        tensor(34.)

    Distributed: statistics are those of a rank's own batch.

    Memory: grows with N · D and D².

    Source: Barlow Twins, arXiv 2103.03230, Eq. 1; VICReg, arXiv 2105.04906, section 4.
    """

    def __init__(self, kind: str = "cross") -> None:
        super().__init__()
        expect_kind(kind, "CorrelationLoss")
        self.kind = kind

    def forward(self, x0: Tensor, x1: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.kind == "cross":
            return cross_correlation(x0, x1, mask=mask)
        expect_views(x0, x1, "CorrelationLoss", ("x0", "x1"))
        return (covariance(x0, mask=mask) + covariance(x1, mask=mask)) / 2

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"
