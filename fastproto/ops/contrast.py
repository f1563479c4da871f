"""Contrast of rows against keys: the one op behind NT-Xent, InfoNCE, ProtoNCE and the classifier cross-entropy.

The forward returns dL_i/dx_i beside the loss (attention with keys = values), so that a frozen set of keys costs two
matrix products in all; the gradient of the keys is a pass of its own. docs/math/contrast.md derives both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import FLOATS, INTEGERS, expect, expect_tensor, expect_type, reads_data
from fastproto.ops._dispatch import DTYPE_CODES, Op
from fastproto.reference import contrast as reference


def _cpp_fwd(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_fwd(features, keys, *rest)
    *options, need_dx, need_stats = rest
    out = _outputs(features, need_dx, need_stats)
    _launch("contrast_fwd", (features, keys, *options), out, None, None)
    return out


def _cpp_bwd_keys(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_bwd_keys(features, keys, *rest)
    *options, lse, grad = rest
    dy = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    db = torch.empty(len(keys), dtype=torch.float32, device=keys.device)
    none = features.new_empty(0)
    out = (none, lse, none, none, none, none)
    _launch("contrast_bwd_keys", (features, keys, *options), out, grad.contiguous(), (dy, db))
    return dy, db


def _outputs(features: Tensor, need_dx: bool, need_stats: bool) -> tuple[Tensor, ...]:
    """Loss, lse, dx, entropy, top1 and positive logit to be written, of size 0 where they are not needed."""
    n, stats = len(features), len(features) if need_stats else 0
    dtype = torch.promote_types(features.dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=features.device)

    dx = empty(n, features.shape[1]) if need_dx else empty(0)
    return empty(n), empty(n), dx, empty(stats), empty(stats, dtype=torch.int64), empty(stats)


def _launch(
    name: str,
    args: tuple[Tensor | None, ...],
    out: tuple[Tensor, ...],
    grad: Tensor | None,
    gradients: tuple[Tensor, Tensor] | None,
) -> None:
    """Calls the C++ kernel of that name with addresses in the order of csrc/contrast/bind.h."""
    features, keys, targets, scale, bias, groups, key_groups = args
    assert features is not None and keys is not None and scale is not None
    features, keys = _rows(features), _rows(keys)
    scale = scale.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    loss, lse, dx, entropy, top1, positive = out
    tensors = [features, keys, targets, scale, bias, groups, key_groups, loss, lse, dx, entropy, top1, positive, grad]
    sizes = (len(features), *keys.shape, features.stride(0), keys.stride(0))
    getattr(_native.cpp, name)(
        (*sizes, DTYPE_CODES[features.dtype], DTYPE_CODES[keys.dtype]),
        [0 if t is None or not t.numel() else t.data_ptr() for t in (*tensors, *(gradients or (None, None)))],
        torch.get_num_threads(),
    )


def _rows(x: Tensor) -> Tensor:
    """x with its rows contiguous, at any distance from each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


_ARGUMENTS = (
    "Tensor features, Tensor keys, Tensor targets, Tensor scale, Tensor? bias, Tensor? groups, Tensor? key_groups, "
)
_fwd = Op(
    "contrast_fwd",
    f"({_ARGUMENTS} bool need_dx, bool need_stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.contrast_fwd,
    cpp=_cpp_fwd,
)
_bwd_keys = Op(
    "contrast_bwd_keys",
    f"({_ARGUMENTS} Tensor lse, Tensor grad) -> (Tensor, Tensor)",
    reference=reference.contrast_bwd_keys,
    cpp=_cpp_bwd_keys,
)


@_fwd.fake
def _fake_fwd(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(features.to(torch.promote_types(features.dtype, keys.dtype)), *rest[-2:])


@_bwd_keys.fake
def _fake_bwd_keys(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(features.dtype, keys.dtype), torch.float32)
    return keys.new_empty(keys.shape, dtype=dtype), keys.new_empty(len(keys), dtype=dtype)


class _Contrast(torch.autograd.Function):
    """The two ops tied together. dx waits from forward to backward, where the upstream gradient scales its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        keys: Tensor,
        targets: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        groups: Tensor | None,
        key_groups: Tensor | None,
        need_stats: bool,
    ) -> tuple[Tensor, ...]:
        need_dx = ctx.needs_input_grad[0]
        args = (features, keys, targets, scale, bias, groups, key_groups)
        loss, lse, dx, *stats = _fwd(*args, need_dx, need_stats)
        need_keys = any(ctx.needs_input_grad[i] for i in (1, 3, 4))
        ctx.save_for_backward(dx, lse, *(args if need_keys else ()))
        ctx.dtype = features.dtype
        ctx.mark_non_differentiable(lse, *stats)
        return loss, lse, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx, lse, *args = ctx.saved_tensors
        need_x, need_y, _, need_a, need_b, *_ = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 8
        if need_x:
            gradients[0] = (grad[:, None] * dx).to(ctx.dtype)
        if args:
            _, keys, _, scale, bias, _, _ = args
            dy, db = _bwd_keys(*args, lse, grad)
            # Σ_i q_ij <x_i, y_j> = <y_j, dy_j> / a_j
            gradients[3] = ((keys.to(dy.dtype) * dy).sum(1) / scale.to(dy.dtype)).to(scale.dtype) if need_a else None
            gradients[1] = dy.to(keys.dtype) if need_y else None
            gradients[4] = db.to(bias.dtype) if need_b else None
        return tuple(gradients)


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
    stats: bool = True,
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
        stats: whether entropy, top1 and positive_logit are wanted; without, they are empty.

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
    targets = torch.where(targets == ignore_index, -1, targets.long())
    if not isinstance(scale, Tensor):
        scale = torch.full((k,), float(scale), dtype=torch.promote_types(keys.dtype, torch.float32), device=device)
    if groups is not None and key_groups is not None:
        groups, key_groups = groups.long().contiguous(), key_groups.long().contiguous()
        key_groups = key_groups.view_as(key_groups) if key_groups is groups else key_groups
    # The compiler cannot trace an autograd.Function that is given one tensor twice.
    keys = keys.view_as(keys) if keys is features else keys
    rows = Contrast(*_Contrast.apply(features, keys, targets, scale, bias, groups, key_groups, stats))
    return rows if ignore_index == -1 else rows._replace(top1=torch.where(targets < 0, ignore_index, rows.top1))


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
