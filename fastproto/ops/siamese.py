"""The siamese metric loss of SPCL: on given pairs, and over all pairs of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastproto._check import FLOATS, INTEGERS, expect_tensor
from fastproto.ops._dispatch import Op
from fastproto.ops.contrast import expect_index
from fastproto.reference import siamese as reference

_pairs_op = Op("siamese_pairs", reference=reference.siamese_pairs)
_all_pairs_op = Op("siamese_all_pairs", reference=reference.siamese_all_pairs)


class AllPairs(NamedTuple):
    """What :func:`siamese_all_pairs` gives: three means, each () and with a gradient; 0 where there is no such pair."""

    same_image: Tensor
    same_prototype: Tensor
    different_prototype: Tensor


def siamese_pairs(
    a: Tensor,  # (N, C) float
    b: Tensor,  # (N, C) float
    same: Tensor,  # (N,) int or bool
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    *,
    ignore_index: int = -1,
) -> Tensor:
    """Binary cross-entropy of every row pair on a learnt metric.

        M(a, b, t) = BCEwithLogits(<w, |a - b|> + β, t)

    Args:
        a, b: raw backbone features (N, C), float16, bfloat16, float32 or float64.
        same: t (N,) bool, int64 or int32: 1 where a pair belongs together, 0 where not, ``ignore_index`` leaves it out.
        weight: w (C,).
        bias: β, a tensor without dimensions.
        ignore_index: the value of pairs that do not count.

    Returns:
        M (N,), at least float32, 0 for ignored pairs.

    Raises:
        TypeError: something is no tensor, or its dtype is not one of the above.
        ValueError: shapes or devices do not fit, or a label is not 0, 1 or ``ignore_index`` (read on the CPU, on CUDA
            with ``fastproto.set_debug(True)``).

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
        >>> siamese_pairs(a, b, torch.tensor([1, 0]), torch.tensor([-1.0, -1.0]), torch.tensor(2.0))
        tensor([0.1269, 0.1269])

    Source: SPCL, arXiv 2208.08819.
    """
    expect_tensor(a, "siamese_pairs", "a", ("N", "C"))
    expect_tensor(b, "siamese_pairs", "b", tuple(a.shape), FLOATS, a.device)
    expect_tensor(same, "siamese_pairs", "same", (a.shape[0],), (torch.bool, *INTEGERS), a.device)
    _expect_metric(weight, bias, a, "siamese_pairs")
    same = same.long()
    expect_index(same, "siamese_pairs", "same", 2, ignore_index)
    return _pairs_op(a, b, same, weight, bias, ignore_index)


def siamese_all_pairs(
    features: Tensor,  # (N, C) float
    images: Tensor,  # (N,) int
    prototypes: Tensor,  # (N,) int
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    *,
    ignore_index: int = -1,
) -> AllPairs:
    """The metric loss M of :func:`siamese_pairs` averaged over every unordered pair of rows, by kind of pair.

    Rows of one image belong together (t = 1), rows of two images where they share a prototype. A row without a
    prototype is paired with the rows of its own image only. Nothing of size (N, N, C) is kept.

    Args:
        features: raw backbone features (N, C), float16, bfloat16, float32 or float64.
        images: (N,) int64 or int32, the image that each row is a view of.
        prototypes: (N,) int64 or int32, the prototype of each row, or ``ignore_index`` for none.
        weight: w (C,).
        bias: β, a tensor without dimensions.
        ignore_index: the prototype of rows that have none.

    Returns:
        AllPairs(same_image, same_prototype, different_prototype): three means, at least float32, 0 where there is no
        such pair.

    Raises:
        TypeError: something is no tensor, or its dtype is not one of the above.
        ValueError: shapes or devices do not fit, or a prototype is negative and not ``ignore_index`` (read on the CPU,
            on CUDA with ``fastproto.set_debug(True)``).

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [3.0]])
        >>> images, prototypes = torch.tensor([0, 0, 1]), torch.tensor([7, 7, 7])
        >>> siamese_all_pairs(features, images, prototypes, torch.tensor([1.0]), torch.tensor(0.0))
        AllPairs(same_image=tensor(0.3133), same_prototype=tensor(0.0878), different_prototype=tensor(0.))

    Source: SPCL, arXiv 2208.08819; the form over all pairs is this library's.
    """
    expect_tensor(features, "siamese_all_pairs", "features", ("N", "C"))
    n, device = features.shape[0], features.device
    expect_tensor(images, "siamese_all_pairs", "images", (n,), INTEGERS, device)
    expect_tensor(prototypes, "siamese_all_pairs", "prototypes", (n,), INTEGERS, device)
    _expect_metric(weight, bias, features, "siamese_all_pairs")
    expect_index(prototypes, "siamese_all_pairs", "prototypes", None, ignore_index)
    return AllPairs(*_all_pairs_op(features, images, prototypes, weight, bias, ignore_index))


def _expect_metric(weight: Tensor, bias: Tensor, features: Tensor, op: str) -> None:
    expect_tensor(weight, op, "weight", (features.shape[1],), FLOATS, features.device)
    expect_tensor(bias, op, "bias", (), FLOATS, features.device)
