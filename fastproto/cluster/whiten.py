"""PCA whitening, which SPCL puts before its clustering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto._check import expect, expect_tensor, is_integer, reads_data
from fastproto.cluster._rows import Rows

CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def whiten(
    x: Tensor,  # (N, C) float
    dim: int,
) -> Tensor:
    """The rows along their ``dim`` principal directions, scaled to unit variance there, then to unit length: (N, dim).

    With mean μ and covariance V diag(λ) Vᵀ of the rows:  y_n = unit( diag(λ)^-½ Vᵀ (x_n - μ) ).
    Directions without variance give 0. Signs are fixed, so the same rows always give the same result.

    Returns:
        (N, dim) float32, or float64 for float64 rows. Not differentiable.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: ``x`` is not (N, C), ``dim`` is not in 1 ... C, or (where data is read) a row holds NaN or infinity.

    Example:
        >>> import torch
        >>> from fastproto.cluster import whiten
        >>> whiten(torch.randn(100, 32), 8).norm(dim=1).allclose(torch.ones(100))
        True

    Source: Mo et al., "Siamese Prototypical Contrastive Learning" (arXiv 2208.08819), whose k-means runs on
    backbone features whitened to 256 dimensions.
    """
    expect_tensor(x, "whiten", "x", ("N", "C"))
    fits = is_integer(dim) and 1 <= dim <= x.shape[1]
    expect(fits, "whiten", "dim", f"an integer in 1 ... {x.shape[1]}", dim)
    mean, variances, directions = principal_directions(x, dim, "whiten")
    projection = directions * power(variances, -0.5)
    rows = [F.normalize((part.double() - mean) @ projection, dim=1) for part in _chunks(x)]
    return torch.cat(rows).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def principal_directions(x: Tensor, dim: int, op: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,) of the rows, their ``dim`` largest variances and the directions (C, dim) of those, all float64.

    A variance that is only rounding is 0. Of each direction the number farthest from 0 is positive.
    """
    nothing = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    mean = sum((part.double().sum(0) for part in _chunks(x)), start=nothing[0]) / max(1, len(x))
    squares = ((part.double() - mean).T @ (part.double() - mean) for part in _chunks(x))
    covariance = sum(squares, start=nothing) / max(1, len(x))
    if reads_data(x) and not covariance.isfinite().all():
        Rows(x).refuse(op)
    variances, directions = torch.linalg.eigh(covariance)
    floor = variances[-1] * x.shape[1] * torch.finfo(torch.float64).eps
    variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, torch.where(variances > floor, variances, 0), directions * largest.sign()


def power(variances: Tensor, exponent: float) -> Tensor:
    """The variances to that power, 0 where there is none."""
    return torch.where(variances > 0, variances**exponent, 0)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.detach().split(max(1, CHUNK_ELEMENTS // x.shape[1]))
