"""PCA whitening, which SPCL puts before its clustering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto._check import expect, expect_tensor

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
        TypeError: ``x`` is no float tensor.
        ValueError: ``x`` is not (N, C), or ``dim`` is not in 1 ... C.

    Example:
        >>> import torch
        >>> from fastproto.cluster import whiten
        >>> whiten(torch.randn(100, 32), 8).norm(dim=1).allclose(torch.ones(100))
        True

    Source: Mo et al., "Siamese Prototypical Contrastive Learning" (arXiv 2208.08819), whose k-means runs on
    backbone features whitened to 256 dimensions.
    """
    expect_tensor(x, "whiten", "x", ("N", "C"))
    features = x.shape[1]
    expect(1 <= dim <= features, "whiten", "dim", f"1 ... {features}", dim)
    chunks = x.detach().split(max(1, CHUNK_ELEMENTS // features))
    count = max(1, x.shape[0])
    mean = sum(part.double().sum(0) for part in chunks) / count
    covariance = sum((part.double() - mean).T @ (part.double() - mean) for part in chunks) / count
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    # What is left of a direction without variance is rounding: dividing by infinity removes it.
    floor = variances[0] * features * torch.finfo(torch.float64).eps
    scale = torch.where(variances > floor, variances, torch.inf).rsqrt() * largest.sign()
    rows = [F.normalize((part.double() - mean) @ (directions * scale), dim=1) for part in chunks]
    return torch.cat(rows).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
