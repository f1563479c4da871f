"""Negative cosine similarity: the regression of BYOL and SimSiam."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastproto._check import FLOATS, INTS, NUMBERS, expect, expect_tensor, expect_type
from fastproto.losses._common import widen


class NegativeCosineSimilarity(nn.Module):
    """The negative cosine between predictions and targets.

        L = -mean( <x0, x1> / (max(||x0||, ε) · max(||x1||, ε)) )

    It stops no gradient: detach the target branch.

    Args:
        dim: the dimension the cosine is taken over.
        eps: ε.

    Shape:
        x0, x1: the same shape, (N, D) as a rule; float16, bfloat16, float32 or float64. Output: scalar of at least
        float32, 0 for an empty batch.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices differ, there is no dimension ``dim``, or ``eps`` is negative.

    Example:
        >>> loss_fn = NegativeCosineSimilarity()
        >>> loss_fn(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(-0.6000)

    Distributed: row by row, so under DDP the mean of the gradients equals one process on the whole batch, where every
    rank has the same N.

    Memory: grows with N · D.

    Source: SimSiam, arXiv 2011.10566, Eq. 1; BYOL, arXiv 2006.07733, Eq. 2 (2 + 2 · L).
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        expect_type(dim, INTS, "NegativeCosineSimilarity", "dim", "an int")
        expect_type(eps, NUMBERS, "NegativeCosineSimilarity", "eps", "a number of at least 0")
        expect(eps >= 0, "NegativeCosineSimilarity", "eps", "a number of at least 0", eps)
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        sizes = tuple(x0.shape) if isinstance(x0, Tensor) else ("N", "D")
        expect_tensor(x0, "NegativeCosineSimilarity", "x0", sizes)
        expect_tensor(x1, "NegativeCosineSimilarity", "x1", sizes, FLOATS, x0.device)
        fits = -x0.dim() <= self.dim < x0.dim()
        expect(fits, "NegativeCosineSimilarity", "x0", f"a tensor with a dimension {self.dim}", x0)
        cosine = F.cosine_similarity(widen(x0), widen(x1), self.dim, self.eps)
        return -cosine.sum() / max(cosine.numel(), 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"
