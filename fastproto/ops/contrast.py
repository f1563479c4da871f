"""Contrast of rows against keys: the one op behind NT-Xent, InfoNCE, ProtoNCE and the classifier cross-entropy.

The forward returns dL_i/dx_i beside the loss (attention with keys = values), so that a frozen set of keys costs two
matrix products in all; the gradient of the keys is a pass of its own. docs/math/contrast.md derives both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import FLOATS, INTEGERS, expect, expect_tensor, expect_type, reads_data
from fastproto.ops._dispatch import DTYPE_CODES, Op, contiguous_rows, once_differentiable
from fastproto.reference import contrast as reference

# Python looks at so many integers in the time that two small ops take to be called.
FEW = 256


def _cpp_fwd(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_fwd(features, keys, *rest)
    *options, need_dx, need_stats = rest
    out = outputs(features, need_dx, need_stats)
    _launch("contrast_fwd", (*out, None, None, None, None), features, keys, *options)
    return out


def _cpp_bwd_keys(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_bwd_keys(features, keys, *rest)
    *options, lse, grad = rest
    dy, da, db = (torch.empty(shape, dtype=torch.float32) for shape in (keys.shape, len(keys), len(keys)))
    grad = grad.contiguous()
    _launch("contrast_bwd_keys", (None, lse, None, None, None, None, grad, dy, da, db), features, keys, *options)
    return dy, da, db


def outputs(features: Tensor, need_dx: bool, need_stats: bool, sets: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """Loss, lse, dx, entropy, top1 and positive logit to be written, of size 0 where they are not needed.

    Each (N,) or (N, D), with (G,) in front where there are that many sets of keys.
    """
    rows, d = (*sets, features.shape[0]), features.shape[1]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    dx = features.new_empty((*rows, d) if need_dx else 0, dtype=dtype)
    loss, lse = features.new_empty(rows, dtype=dtype), features.new_empty(rows, dtype=dtype)
    stats = rows if need_stats else 0
    entropy, positive = features.new_empty(stats, dtype=dtype), features.new_empty(stats, dtype=dtype)
    return loss, lse, dx, entropy, features.new_empty(stats, dtype=torch.int64), positive


def _launch(
    name: str,
    results: tuple[Tensor | None, ...],
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    key_groups: Tensor | None,
    normalize: bool,
    symmetric: bool,
) -> None:
    """Calls the C++ kernel of that name with addresses in the order of csrc/contrast/bind.h."""
    features, keys = contiguous_rows(features), contiguous_rows(keys)
    vectors = (targets, scale.float(), None if bias is None else bias.float(), groups, key_groups)
    tensors = (features, keys, *(None if vector is None else vector.contiguous() for vector in vectors), *results)
    sizes = (len(features), *keys.shape, features.stride(0), keys.stride(0))
    getattr(_native.cpp, name)(
        (*sizes, DTYPE_CODES[features.dtype], DTYPE_CODES[keys.dtype], normalize, symmetric),
        [0 if t is None else t.data_ptr() for t in tensors],
        torch.get_num_threads(),
    )


def _triton_fwd(features: Tensor, keys: Tensor, targets: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_fwd(features, keys, targets, scale, *rest)
    from fastproto.kernels.contrast_fwd import contrast_fwd

    *options, normalize, _, need_dx, need_stats = rest
    out = outputs(features, need_dx, need_stats)
    x, ys, a = unit_inputs(features, (keys,), scale) if normalize else (features, (keys,), scale)
    contrast_fwd(x, ys, targets, a, *options, need_dx, need_stats, out)
    if normalize and need_dx:
        counted = (targets >= 0)[:, None]
        out[2].copy_(reference.through_length(out[2], *reference.unit_rows(torch.where(counted, features, 0))))
    return out


def _triton_bwd_keys(features: Tensor, keys: Tensor, targets: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_bwd_keys(features, keys, targets, scale, *rest)
    from fastproto.kernels.contrast_bwd import contrast_bwd_keys

    *options, normalize, symmetric, lse, grad = rest
    x, (y,), a = unit_inputs(features, (keys,), scale) if normalize else (features, (keys,), scale)
    dy, db = contrast_bwd_keys(x, y, targets, a, *options, symmetric, lse, grad)
    wide = keys.float()
    if normalize:
        length = torch.linalg.vector_norm(wide, dim=1).clamp(min=1e-12)
        dy = dy if a is not scale else dy / length[:, None]
    # dy is a_j / |y_j| Σ_i q_ij x_i here.
    along = (wide * dy).sum(1)
    if normalize:
        dy = dy - wide * (along / length.square())[:, None]
    return dy, along / scale.float(), db


def unit_inputs(features: Tensor, keys: Sequence[Tensor], scale: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """Unit rows, sets of keys and their scales, set after set, for a kernel that takes them as they are.

    Unit keys are not written out: their lengths go into the scale, a_j / |y_j|. Only float16 lacks the range for that.
    """
    x = reference.unit_rows(features)[0].to(features.dtype)
    if keys[0].dtype == torch.float16:
        return x, [reference.unit_rows(y)[0].to(y.dtype) for y in keys], scale
    length = torch.empty_like(scale, dtype=torch.float32, memory_format=torch.contiguous_format)
    for y, out in zip(keys, length.split([len(y) for y in keys]), strict=True):
        torch.linalg.vector_norm(y, dim=1, dtype=torch.float32, out=out)
    return x, keys, scale.float() / length.clamp(min=1e-12)


_ARGUMENTS = (
    "Tensor features, Tensor keys, Tensor targets, Tensor scale, Tensor? bias, Tensor? groups, Tensor? key_groups, "
    "bool normalize, bool symmetric, "
)
_fwd = Op(
    "contrast_fwd",
    f"({_ARGUMENTS} bool need_dx, bool need_stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.contrast_fwd,
    cpp=_cpp_fwd,
    triton=_triton_fwd,
)
_bwd_keys = Op(
    "contrast_bwd_keys",
    f"({_ARGUMENTS} Tensor lse, Tensor grad) -> (Tensor, Tensor, Tensor)",
    reference=reference.contrast_bwd_keys,
    cpp=_cpp_bwd_keys,
    triton=_triton_bwd_keys,
)


@_fwd.fake
def _fake_fwd(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return outputs(features.to(torch.promote_types(features.dtype, keys.dtype)), *rest[-2:])


@_bwd_keys.fake
def _fake_bwd_keys(features: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(torch.promote_types(features.dtype, keys.dtype), torch.float32)
    k = len(keys)
    return keys.new_empty(keys.shape, dtype=dtype), keys.new_empty(k, dtype=dtype), keys.new_empty(k, dtype=dtype)


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
        normalize: bool,
        divisor: Tensor | float | None,
        symmetric: bool,
        need_stats: bool,
    ) -> tuple[Tensor, ...]:
        need_x, need_y, _, need_a, need_b, *_ = ctx.needs_input_grad
        # Symmetric, the backward pass has the gradient of both roles in two products, and the forward one.
        need_dx, need_backward = need_x and not symmetric, need_y or need_a or need_b or (need_x and symmetric)
        args = (features, keys, targets, scale, bias, groups, key_groups)
        loss, lse, dx, *stats = _fwd(*args, normalize, symmetric, need_dx, need_stats)
        if divisor is not None:
            loss = loss.sum() / divisor
        ctx.normalize, ctx.symmetric, ctx.dtype = normalize, symmetric, features.dtype
        # A tensor is for autograd to keep, a number is not.
        ctx.divisor = None if isinstance(divisor, Tensor) else divisor
        for_keys = (lse, *args) if need_backward else ()
        ctx.save_for_backward(dx, divisor if isinstance(divisor, Tensor) else None, *for_keys)
        ctx.mark_non_differentiable(lse, *stats)
        # No zeros as upstream gradients of what has none. The compiler makes none, and does not know the method.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return loss, lse, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * 11
        if grad is None:
            return tuple(gradients)
        dx, divisor, *for_keys = ctx.saved_tensors
        divisor = ctx.divisor if divisor is None else divisor
        grad = grad if divisor is None else grad / divisor
        if ctx.needs_input_grad[0] and not ctx.symmetric:
            gradients[0] = ((grad[:, None] if grad.ndim else grad) * dx).to(ctx.dtype)
        if for_keys:
            lse, *args = for_keys
            # Of keys, or the rows that they are, scale and bias: arguments 1 or 0, 3 and 4.
            results = _bwd_keys(*args, ctx.normalize, ctx.symmetric, lse, grad.expand(lse.shape).contiguous())
            for i, gradient in zip((0 if ctx.symmetric else 1, 3, 4), results, strict=True):
                if ctx.needs_input_grad[i]:
                    gradients[i] = gradient.to(args[i].dtype)
        return tuple(gradients)


class Contrast(NamedTuple):
    """What :func:`contrast` gives: ``loss`` (N,), or () with a divisor; the others (N,), without a gradient."""

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
    normalize: bool = False,
    divisor: float | Tensor | None = None,  # () float
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
        normalize: scale rows and keys to length 1 first; a zero row stays zero. No copy of the keys is made.
        divisor: the loss is the sum over the rows divided by it; None leaves the rows.
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
    return contrast_unchecked(
        features, keys, targets, scale, bias, groups, key_groups, normalize=normalize, divisor=divisor,
        ignore_index=ignore_index, stats=stats,
    )  # fmt: skip


def contrast_unchecked(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    *,
    normalize: bool = False,
    divisor: float | Tensor | None = None,
    ignore_index: int = -1,
    stats: bool = False,
    symmetric: bool = False,
) -> Contrast:
    """:func:`contrast` for callers that have checked the arguments themselves: a small batch would feel it twice.

    ``symmetric`` promises that keys and groups are those of the rows, the scale is a number, there is no bias and no
    row is ignored. s_ij = s_ji then saves one of four matrix products.
    """
    targets = targets.long() if ignore_index == -1 else torch.where(targets == ignore_index, -1, targets.long())
    if not isinstance(scale, Tensor):
        dtype = torch.promote_types(keys.dtype, torch.float32)
        scale = keys.new_full((len(keys),), float(scale), dtype=dtype)
    if groups is not None and key_groups is not None:
        groups, key_groups = groups.long().contiguous(), key_groups.long().contiguous()
        key_groups = key_groups.view_as(key_groups) if key_groups is groups else key_groups
    # The compiler cannot trace an autograd.Function that is given one tensor twice.
    keys = keys.detach() if symmetric else keys.view_as(keys) if keys is features else keys
    rows = Contrast(
        *_Contrast.apply(features, keys, targets, scale, bias, groups, key_groups, normalize, divisor, symmetric, stats)
    )
    return rows if ignore_index == -1 else rows._replace(top1=torch.where(targets < 0, ignore_index, rows.top1))


def expect_index(index: Tensor, op: str, argument: str, size: int | None, ignore_index: int) -> int | None:
    """Raises ValueError where an entry is neither ``ignore_index`` nor in 0…size-1, if its data may be read now.

    ``size`` None sets no upper end. Returns how many entries are not ``ignore_index`` where it has counted them.
    """
    if not index.numel() or not reads_data(index):
        return None
    count = None
    if index.numel() <= FEW:
        entries = index.tolist()
        count = len(entries) - entries.count(ignore_index)
        if count < len(entries):
            entries = [0 if entry == ignore_index else entry for entry in entries]
        low, high = min(entries), max(entries)
    else:
        low, high = map(int, index.aminmax())
        if low < 0 or low == ignore_index or high == ignore_index:
            low, high = map(int, torch.where(index == ignore_index, 0, index).aminmax())
    if low < 0 or (size is not None and high >= size):
        expected = f"{ignore_index} or at least 0" if size is None else f"{ignore_index} or 0 to {size - 1}"
        expect(False, op, argument, expected, f"values from {low} to {high}")
    return count
