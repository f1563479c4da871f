"""The siamese metric loss: a learnt distance that tells pairs of one prototype from pairs of two (SPCL)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastproto._check import (
    FLOATS,
    INTEGERS,
    expect,
    expect_index,
    expect_positive_ints,
    expect_tensor,
    without_ignored,
)
from fastproto.losses._common import expect_reduction, expect_views, reduce_rows
from fastproto.ops.siamese import checked_pairs, result_dtype, siamese_all_pairs


def siamese_metric(
    a: Tensor,  # (N, C) float
    b: Tensor,  # (N, C) float
    same: Tensor,  # (N,) int or bool
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    *,
    reduction: str = "mean",
    ignore_index: int = -1,
) -> Tensor:
    """Binary cross-entropy of row pairs on a learnt metric.

        M(a, b, t) = BCEwithLogits(<w, |a - b|> + β, t)

    Args:
        a, b: raw backbone features (N, C), float16, bfloat16, float32 or float64.
        same: t (N,) int64, int32 or bool, 1 where a pair shares a prototype, 0 where not, ``ignore_index`` for pairs
            that do not count.
        weight, bias: w (C,) and β ().
        reduction: "mean" over the pairs that count, "sum", or "none" for the pairs (N,), 0 where ignored.
        ignore_index: the label of pairs that do not count.

    Returns:
        The loss, at least float32; 0 where no pair counts.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, a label is out of range, or an unknown reduction.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
        >>> siamese_metric(a, b, torch.tensor([1, -1]), torch.tensor([-1.0, -1.0]), torch.tensor(2.0))
        tensor(0.1269)

    Distributed: pairs are a rank's own; DDP's mean equals one process where as many count on every rank.

    Memory: a - b (N, C).

    Source: SPCL, arXiv 2208.08819.
    """
    expect_reduction(reduction, "siamese_metric")
    loss = checked_pairs("siamese_metric", a, b, same, weight, bias, ignore_index)
    return reduce_rows(loss, reduction, (without_ignored(same, ignore_index) >= 0).sum())


def siamese_metric_all_pairs(
    features0: Tensor,  # (N, C) float
    features1: Tensor,  # (N, C) float
    assignments: Tensor,  # (N,) int
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    *,
    ignore_index: int = -1,
) -> Tensor:
    """The metric loss over all pairs of the 2N views of a batch.

        L = mean M(a, b, 1)      over the two views of each image
          + ½ · mean M(a, b, 1)  over pairs of different images with one prototype
          + ½ · mean M(a, b, 0)  over pairs of different images with two prototypes

    with M as in :func:`siamese_metric`. A mean over no pair is 0. No pair has to be drawn, and both kinds weigh the
    same, however rare one of them is.

    Args:
        features0, features1: raw backbone features of the two views (N, C), float16, bfloat16, float32 or float64.
        assignments: the prototype of each image (N,) int64 or int32; with ``ignore_index`` an image only pairs its own
            two views.
        weight, bias: w (C,) and β ().
        ignore_index: the assignment of images without a prototype.

    Returns:
        The loss, a scalar of at least float32; 0 for an empty batch.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, or a negative assignment that is not ``ignore_index``.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [4.0]])
        >>> weight, bias = torch.tensor([-1.0]), torch.tensor(2.0)
        >>> siamese_metric_all_pairs(features, features, torch.tensor([0, 0, 1]), weight, bias)
        tensor(0.3936)

    Distributed: pairs are those of a rank's own batch; SPCLLoss gathers where asked to.

    Memory: grows with N · C; nothing of size (N, N, C), and nothing of size (N, N) is kept.

    Source: SPCL, arXiv 2208.08819; the form over all pairs is this library's.
    """
    expect_views(features0, features1, "siamese_metric_all_pairs", ("features0", "features1"))
    n, device = features0.shape[0], features0.device
    expect_tensor(assignments, "siamese_metric_all_pairs", "assignments", (n,), INTEGERS, device)
    expect_index(assignments, "siamese_metric_all_pairs", "assignments", None, ignore_index)
    images = torch.arange(n, device=device).repeat(2)
    labels = assignments.repeat(2)
    dtype = result_dtype(features0, features1)
    x0, x1 = features0.to(dtype), features1.to(dtype)
    terms = siamese_all_pairs(x0, images, labels, weight, bias, second=x1, ignore_index=ignore_index)
    return terms.same_image + (terms.same_prototype + terms.different_prototype) / 2


class SiameseMetricLoss(nn.Module):
    """Tells pairs of images that share a prototype from pairs that do not, by a learnt weighting of |a - b|.

        M(a, b, t) = BCEwithLogits(<w, |a - b|> + β, t)

    ``pairs="all"`` takes all pairs of the batch, see :func:`fastproto.losses.functional.siamese_metric_all_pairs`.
    ``pairs="sampled"`` is the paper's form for a sampler that emits images in twos: with views h of images 0, 2, 4, …
    and v of images 1, 3, 5, …, and s = 1 where the two share a prototype,

        L = M(h0, h1, 1) + M(v0, v1, 1) + Σ_{a ∈ {h0, h1}} Σ_{b ∈ {v0, v1}} M(a, b, s),  each M a mean.

    Args:
        feature_dim: C.
        pairs: "all" or "sampled".

    Attributes:
        metric: the linear layer C → 1 that holds w and β.

    Shape:
        features0, features1: raw backbone features of the two views (N, C), float16, bfloat16, float32 or float64; N
        even for "sampled". assignments: (N,) int64 or int32, an image with -1 only pairs its own two views. Output:
        scalar of at least float32.

    Raises:
        ValueError: an unknown ``pairs``, a ``feature_dim`` below 1, shapes or devices that do not fit, or an assignment
            below -1.
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> loss_fn = SiameseMetricLoss(feature_dim=3)
        >>> loss = loss_fn(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]))
        >>> loss.backward()
        >>> loss_fn.metric.weight.grad.shape
        torch.Size([1, 3])
        >>> pair_loss = loss_fn.pairwise(torch.eye(3), torch.eye(3), torch.tensor([1, 1, 0]))

    Distributed: pairs are those of a rank's own batch; :class:`SPCLLoss` gathers those of all ranks where asked to.
    FSDP2 is to shard the loss as a whole: its metric is read, not called.

    Memory: "all" grows with N · C, nothing of size (N, N, C), and nothing of size (N, N) is kept; "sampled" holds six
    differences (N/2, C).

    Source: SPCL, arXiv 2208.08819.
    """

    def __init__(self, feature_dim: int, pairs: str = "all") -> None:
        super().__init__()
        expect(pairs in ("all", "sampled"), "SiameseMetricLoss", "pairs", '"all" or "sampled"', repr(pairs))
        expect_positive_ints("SiameseMetricLoss", feature_dim=feature_dim)
        self.pairs = pairs
        self.metric = nn.Linear(feature_dim, 1)

    def forward(self, features0: Tensor, features1: Tensor, assignments: Tensor) -> Tensor:
        weight, bias = self.metric.weight[0], self.metric.bias[0]
        expect_tensor(features0, "SiameseMetricLoss", "features0", ("N", len(weight)), FLOATS, weight.device)
        expect_views(features0, features1, "SiameseMetricLoss", ("features0", "features1"))
        if self.pairs == "all":
            return siamese_metric_all_pairs(features0, features1, assignments, weight, bias)
        n = features0.shape[0]
        expect(n % 2 == 0, "SiameseMetricLoss", "features0", 'an even number of rows for pairs="sampled"', features0)
        expect_tensor(assignments, "SiameseMetricLoss", "assignments", (n,), INTEGERS, features0.device)
        expect_index(assignments, "SiameseMetricLoss", "assignments", None, -1)
        labels_h, labels_v = assignments[0::2], assignments[1::2]
        unassigned = (labels_h < 0) | (labels_v < 0)
        same = torch.where(unassigned, -1, (labels_h == labels_v).long())
        views_h = features0[0::2], features1[0::2]
        views_v = features0[1::2], features1[1::2]
        loss = self.pairwise(*views_h, torch.ones_like(same)) + self.pairwise(*views_v, torch.ones_like(same))
        for a in views_h:
            for b in views_v:
                loss = loss + self.pairwise(a, b, same)
        return loss

    def pairwise(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        """Mean of M(a, b, same) over given pairs: a, b (N, C), same (N,) of 0 and 1, -1 for pairs that do not count."""
        weight, bias = self.metric.weight[0], self.metric.bias[0]
        expect_tensor(a, "SiameseMetricLoss", "a", ("N", len(weight)), FLOATS, weight.device)
        return siamese_metric(a, b, same, weight, bias)

    def extra_repr(self) -> str:
        return f"pairs={self.pairs!r}"
