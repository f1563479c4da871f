"""Contrast of rows against keys: the one op behind NT-Xent, InfoNCE, ProtoNCE and the classifier cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastproto._check import FLOATS, INTEGERS, expect, expect_tensor, expect_type, reads_data
from fastproto.ops._dispatch import Op
from fastproto.reference import contrast as reference

_op = Op("contrast", reference=reference.contrast)


class Contrast(NamedTuple):
    """What :func:`contrast` gives, each (N,) and on the device. Only ``loss`` carries a gradient."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    top1: Tensor
    positive_logit: Tensor


def contrast(
    features: Tensor,  # (N, D) float
    keys: Tensor,  # (K, D) float
    targets: Tensor,  # (N,) int
    *,
    scale: float | Tensor = 1.0,  # (K,) float
    bias: Tensor | None = None,  # (K,) float
    groups: Tensor | None = None,  # (N,) int
    key_groups: Tensor | None = None,  # (K,) int
    ignore_index: int = -1,
) -> Contrast:
    """Softmax cross-entropy of every row against the keys that it may see.

        s_ij = <x_i, y_j> · a_j + b_j
        L_i  = log Σ_{j ∈ A(i)} exp(s_ij) - s_{i,t(i)}

    A(i) holds the target t(i) and every key j with ``key_groups[j] != groups[i]``; without groups, all keys. Row
    numbers as groups hide a row from itself, prototype ids hide all rows of its prototype.

    Args:
        features: rows x (N, D), float16, bfloat16, float32 or float64.
        keys: y (K, D), same device; K may be 0 only where N is.
        targets: t (N,) int64 or int32, the key that is each row's positive; ``ignore_index`` leaves a row out.
        scale: a, the inverse temperature: one number, or (K,) with a gradient.
        bias: b (K,), -inf hides a key from all rows.
        groups, key_groups: (N,) and (K,) integers, both or none.
        ignore_index: the target of rows that do not count.

    Returns:
        Contrast(loss, lse, entropy, top1, positive_logit), each (N,): the loss, the log-sum-exp over A(i), the entropy
        of the softmax in nats, the index of the largest logit in A(i) (int64; ties go to the lowest), and s_{i,t(i)}.
        At least float32, whatever comes in; autocast does not lower it. Ignored rows give 0, and ``ignore_index``
        as top1.

    Raises:
        TypeError: something is no tensor, or its dtype is not one of the above.
        ValueError: shapes or devices do not fit, only one of the groups is given, or a target is neither
            ``ignore_index`` nor in 0…K-1 (read on the CPU, on CUDA with ``fastproto.set_debug(True)``).

    Example:
        >>> features, keys = torch.eye(2), torch.eye(3)[:, :2]
        >>> rows = contrast(features, keys, torch.tensor([0, -1]), scale=4.0)
        >>> rows.loss
        tensor([0.0360, 0.0000])
        >>> rows.top1
        tensor([ 0, -1])

    Source: SimCLR, arXiv 2002.05709, Eq. 1; MoCo, arXiv 1911.05722, Eq. 1; PCL, arXiv 2005.04966, Eq. 11.
    """
    expect_tensor(features, "contrast", "features", ("N", "D"))
    n, device = features.shape[0], features.device
    expect_tensor(keys, "contrast", "keys", ("K", features.shape[1]), FLOATS, device)
    k = keys.shape[0]
    expect(k > 0 or n == 0, "contrast", "keys", "at least one row", keys)
    expect_tensor(targets, "contrast", "targets", (n,), INTEGERS, device)
    if isinstance(scale, Tensor):
        expect_tensor(scale, "contrast", "scale", (k,), FLOATS, device)
    else:
        expect_type(scale, (float, int), "contrast", "scale", "a number or a (K,) tensor")
    if bias is not None:
        expect_tensor(bias, "contrast", "bias", (k,), FLOATS, device)
    expect((groups is None) == (key_groups is None), "contrast", "groups and key_groups", "both or none", "one of them")
    if groups is not None:
        expect_tensor(groups, "contrast", "groups", (n,), INTEGERS, device)
        expect_tensor(key_groups, "contrast", "key_groups", (k,), INTEGERS, device)
    expect_index(targets, "contrast", "targets", k, ignore_index)
    return Contrast(*_op(features, keys, targets, scale, bias, groups, key_groups, ignore_index))


def expect_index(index: Tensor, op: str, argument: str, size: int | None, ignore_index: int) -> None:
    """Raises ValueError where an entry is neither ``ignore_index`` nor in 0…size-1, if its data may be read now.

    ``size`` None sets no upper end.
    """
    if not index.numel() or not reads_data(index):
        return
    low, high = (int(value) for value in torch.where(index == ignore_index, 0, index).aminmax())
    expected = f"{ignore_index} or at least 0" if size is None else f"{ignore_index} or 0 to {size - 1}"
    fits = low >= 0 and (size is None or high < size)
    expect(fits, op, argument, expected, f"values from {low} to {high}")
