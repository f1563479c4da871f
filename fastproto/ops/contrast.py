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
from fastproto._check import (
    FLOATS,
    INTEGERS,
    NUMBERS,
    expect,
    expect_index,
    expect_tensor,
    expect_type,
    without_ignored,
)
from fastproto.ops._dispatch import DTYPE_CODES, Op, contiguous_rows, once_differentiable
from fastproto.reference import contrast as reference

# Rows wider than this are left to plain products where there are so few scores, 16 MiB of them.
WIDE, FEW_SCORES = 256, 1 << 22


class _Results(NamedTuple):
    """What a C++ kernel writes, or takes from the forward and from above, in the order of csrc/contrast/bind.h."""

    loss: Tensor | None = None
    saved: Tensor | None = None
    dx: Tensor | None = None
    entropy: Tensor | None = None
    top1: Tensor | None = None
    positive: Tensor | None = None
    grad: Tensor | None = None
    dy: Tensor | None = None
    da: Tensor | None = None
    db: Tensor | None = None


def _cpp_fwd(features: Tensor, keys: Tensor, *rest: Any) -> list[Tensor]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_fwd(features, keys, *rest)
    *options, more_keys, need_dx, need_stats = rest
    *_, divisor, _ = options
    out = outputs(features, need_dx, need_stats, reduced=divisor is not None)
    _launch("contrast_fwd", _Results(*out), more_keys, features, keys, *options)
    return present(out)


def _cpp_bwd_keys(features: Tensor, keys: Tensor, targets: Tensor, *rest: Any) -> list[Tensor]:
    if torch.float64 in (features.dtype, keys.dtype):
        return reference.contrast_bwd_keys(features, keys, targets, *rest)
    scale, _, bias, *_, saved, grad = rest
    dy, da, db = _key_gradients(keys, scale, bias, torch.float32)
    results = _Results(saved=saved, grad=grad, dy=dy, da=da, db=db)
    _launch("contrast_bwd_keys", results, None, features, keys, targets, *rest[:-2])
    return present((dy, da, db))


def outputs(
    features: Tensor, need_dx: bool, need_stats: bool, *, reduced: bool = False, sets: tuple[int, ...] = ()
) -> tuple[Tensor | None, ...]:
    """Loss, what the backward saves, dx, entropy, top1 and positive logit to be written; None for what is not needed.

    Each (N,) or (N, D), with (G,) in front where there are that many sets of keys; one loss () where it is reduced.
    Saved are (3, N), of every row: lse, p_t - 1, and what exp(s - lse) is multiplied by to be p, as lse is rounded.
    """
    n, d = features.shape
    device, dtype = features.device, torch.float64 if features.dtype == torch.float64 else torch.float32
    loss = torch.empty(() if reduced else (*sets, n), dtype=dtype, device=device)
    saved = torch.empty(*sets, 3, n, dtype=dtype, device=device)
    dx = torch.empty(*sets, n, d, dtype=dtype, device=device) if need_dx else None
    if not need_stats:
        return loss, saved, dx, None, None, None
    entropy = torch.empty(*sets, n, dtype=dtype, device=device)
    return loss, saved, dx, entropy, torch.empty_like(entropy, dtype=torch.int64), torch.empty_like(entropy)


def _key_gradients(
    keys: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Gradients of keys, scale and bias, to be written; None for those that are not there."""
    return tuple(None if x is None else torch.empty(x.shape, dtype=dtype, device=x.device) for x in (keys, scale, bias))


def present(out: Sequence[Tensor | None]) -> list[Tensor]:
    """What an op returns of its outputs."""
    return [tensor for tensor in out if tensor is not None]


def _launch(
    name: str,
    results: _Results,
    more_keys: Tensor | None,
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    scale_all: float,
    bias: Tensor | None,
    groups: Tensor | None,
    key_groups: Tensor | None,
    normalize: bool,
    divisor: float | None,
    symmetric: bool,
) -> None:
    """Calls the C++ kernel of that name with addresses in the order of csrc/contrast/bind.h."""
    features, keys = contiguous_rows(features), contiguous_rows(keys)
    more_keys = None if more_keys is None else contiguous_rows(more_keys)
    scale, bias = None if scale is None else scale.float(), None if bias is None else bias.float()
    vectors = (targets, scale, bias, groups, key_groups)
    dense = (None if vector is None else vector.contiguous() for vector in vectors)
    tensors = (features, keys, *dense, *results, more_keys)
    grad = results.grad
    sizes = (
        *(features.shape[0], *keys.shape, features.stride(0), keys.stride(0)),
        0 if grad is None or grad.ndim == 0 else grad.stride(0),
        *(DTYPE_CODES[features.dtype], DTYPE_CODES[keys.dtype], normalize, symmetric, divisor is not None),
        *((0, 0) if more_keys is None else (more_keys.shape[0], more_keys.stride(0))),
    )
    getattr(_native.cpp, name)(
        sizes,
        (scale_all, 1.0 if divisor is None else divisor),
        [0 if t is None else t.data_ptr() for t in tensors],
        torch.get_num_threads(),
    )


def _triton_fwd(
    features: Tensor, keys: Tensor, targets: Tensor, scale: Tensor | None, scale_all: float, *rest: Any
) -> list[Tensor]:
    *options, normalize, divisor, symmetric, more_keys, need_dx, need_stats = rest
    if _suits_matrices(features, keys, more_keys):
        return reference.contrast_fwd(features, keys, targets, scale, scale_all, *rest)
    from fastproto.kernels.contrast_fwd import contrast_fwd

    keys = keys if more_keys is None else torch.cat([keys, more_keys])
    loss, saved, dx, *stats = outputs(features, need_dx, need_stats)
    a = _scale_of(keys, scale, scale_all)
    x, ys, a = _inputs(features, keys, a, normalize, symmetric)
    none = features.new_empty(0)
    out = tuple(none if t is None else t for t in (loss, saved, dx, *stats))
    contrast_fwd(x, ys, targets, a, *options, need_dx, need_stats, out)
    if dx is not None and normalize:
        counted = (targets >= 0)[:, None]
        dx = reference.through_length(dx, *reference.unit_rows(torch.where(counted, features, 0)))
    if divisor is not None:
        assert loss is not None
        loss, dx = loss.sum() / divisor, None if dx is None else dx / divisor
    return present((loss, saved, dx, *stats))


def _triton_bwd_keys(
    features: Tensor, keys: Tensor, targets: Tensor, scale: Tensor | None, scale_all: float, *rest: Any
) -> list[Tensor]:
    if _suits_matrices(features, keys):
        return reference.contrast_bwd_keys(features, keys, targets, scale, scale_all, *rest)
    from fastproto.kernels.contrast_bwd import contrast_bwd_keys

    *options, normalize, divisor, symmetric, saved, grad = rest
    grad = (grad if divisor is None else grad / divisor).expand(len(features))
    given = _scale_of(keys, scale, scale_all)
    x, (y,), a = _inputs(features, keys, given, normalize, symmetric)
    total, db = contrast_bwd_keys(x, y, targets, a, *options, symmetric, saved, grad)
    wide, a = keys.float(), given.float()
    along = (wide * total).sum(1)
    if normalize:
        length = torch.linalg.vector_norm(wide, dim=1).clamp(min=reference.SHORTEST)
        a, along = a / length, along / length
        total.addcmul_(wide, torch.where(length > reference.SHORTEST, along / length, 0)[:, None], value=-1)
    return present((total.mul_(a[:, None]), None if scale is None else along, db))


def _suits_matrices(features: Tensor, *keys: Tensor | None) -> bool:
    """Whether plain matrix products serve better than Triton: of float64 or no columns, or few scores of wide rows.

    A Triton program sums 128 or 256 columns of the gradient, and finds the scores anew for every so many of them.
    """
    given = [y for y in keys if y is not None]
    if features.shape[1] == 0 or any(x.dtype == torch.float64 for x in (features, *given)):
        return True
    return features.shape[1] > WIDE and features.shape[0] * sum(y.shape[0] for y in given) <= FEW_SCORES


def _scale_of(keys: Tensor, scale: Tensor | None, scale_all: float) -> Tensor:
    """The scale of each key, for a kernel that takes no number for all."""
    return keys.new_full((len(keys),), scale_all, dtype=torch.float32) if scale is None else scale


def _inputs(
    features: Tensor, keys: Tensor, scale: Tensor, normalize: bool, symmetric: bool
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """Rows, keys and scale for a Triton kernel.

    Symmetric, rows and keys are one tensor: s_ij is s_ji up to one rounding on tensor cores.
    """
    if not normalize:
        return features, (keys,), scale
    if symmetric:
        x = reference.unit_rows(features)[0].to(features.dtype)
        return x, (x,), scale
    return unit_inputs(features, (keys,), scale)


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
    return x, keys, scale.float() / length.clamp(min=reference.SHORTEST)


_ARGUMENTS = (
    "Tensor features, Tensor keys, Tensor targets, Tensor? scale, float scale_all, Tensor? bias, Tensor? groups, "
    "Tensor? key_groups, bool normalize, float? divisor, bool symmetric, "
)
contrast_fwd = Op(
    "contrast_fwd",
    f"({_ARGUMENTS} Tensor? more_keys, bool need_dx, bool need_stats) -> Tensor[]",
    reference=reference.contrast_fwd,
    cpp=_cpp_fwd,
    triton=_triton_fwd,
)
_bwd_keys = Op(
    "contrast_bwd_keys",
    f"({_ARGUMENTS} Tensor saved, Tensor grad) -> Tensor[]",
    reference=reference.contrast_bwd_keys,
    cpp=_cpp_bwd_keys,
    triton=_triton_bwd_keys,
)


@contrast_fwd.fake
def _fake_fwd(features: Tensor, keys: Tensor, *rest: Any) -> list[Tensor]:
    *_, divisor, _, _, need_dx, need_stats = rest
    wide = features.to(torch.promote_types(features.dtype, keys.dtype))
    return present(outputs(wide, need_dx, need_stats, reduced=divisor is not None))


@_bwd_keys.fake
def _fake_bwd_keys(features: Tensor, keys: Tensor, targets: Tensor, *rest: Any) -> list[Tensor]:
    scale, _, bias, *_ = rest
    dtype = torch.promote_types(torch.promote_types(features.dtype, keys.dtype), torch.float32)
    return present(_key_gradients(keys, scale, bias, dtype))


class _Contrast(torch.autograd.Function):
    """The two ops tied together. dx waits from forward to backward, where the upstream gradient scales its rows.

    Without keys they are the rows themselves, and the pass is symmetric.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        keys: Tensor | None,
        targets: Tensor,
        scale: Tensor | float,
        bias: Tensor | None,
        groups: Tensor | None,
        key_groups: Tensor | None,
        normalize: bool,
        divisor: Tensor | float | None,
        more_keys: Tensor | None,
        need_stats: bool,
    ) -> tuple[Tensor, ...]:
        need_x, need_y, _, need_a, need_b, *_ = ctx.needs_input_grad
        # Symmetric, the backward pass has the gradient of both roles in two products, and the forward one.
        symmetric, y = keys is None, features if keys is None else keys
        need_dx, need_backward = need_x and not symmetric, need_y or need_a or need_b or (need_x and symmetric)
        # A tensor is for autograd to keep, a number is not.
        a, ctx.scale_all = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
        count, ctx.divisor = (divisor, None) if isinstance(divisor, Tensor) else (None, divisor)
        ctx.normalize, ctx.dtype = normalize, features.dtype
        vectors, numbers = (bias, groups, key_groups), (normalize, ctx.divisor, symmetric)
        options = (*vectors, *numbers, more_keys, need_dx, need_stats)
        loss, saved, *rest = contrast_fwd(features, y, targets, a, ctx.scale_all, *options)
        dx, *stats = rest if need_dx else (None, *rest)
        loss = loss if count is None else loss.sum() / count
        for_keys = (saved, features, keys, targets, a, *vectors) if need_backward else ()
        # The rows, for the way back that refuses to be differentiated again.
        ctx.save_for_backward(dx, count, None if dx is None else features, *for_keys)
        # No zeros as upstream gradients of what has none. The compiler makes none, and does not know the method.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        if not need_stats:
            return (loss,)
        lse = saved[0].clone()
        ctx.mark_non_differentiable(lse, *stats)
        return loss, lse, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Sequence[Any], grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * 11
        if grad is None:
            return tuple(gradients)
        dx, count, _, *for_keys = kept
        grad = grad if count is None else grad / count
        if dx is not None:
            gradients[0] = ((grad[:, None] if grad.ndim else grad) * dx).to(ctx.dtype)
        if for_keys:
            saved, features, keys, targets, scale, bias, *groups = for_keys
            symmetric, y = keys is None, features if keys is None else keys
            numbers = (ctx.normalize, ctx.divisor, symmetric)
            results = _bwd_keys(features, y, targets, scale, ctx.scale_all, bias, *groups, *numbers, saved, grad)
            # Of keys, or the rows that they are, scale and bias: arguments 1 or 0, 3 and 4.
            leaves = ((0 if symmetric else 1, y), (3, scale), (4, bias))
            there = [(i, leaf) for i, leaf in leaves if leaf is not None]
            for (i, leaf), gradient in zip(there, results, strict=True):
                if ctx.needs_input_grad[i]:
                    gradients[i] = gradient.to(leaf.dtype)
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
        stats: whether lse, entropy, top1 and positive_logit are wanted; without, they are empty.

    Returns:
        Contrast(loss, lse, entropy, top1, positive_logit), each (N,): the loss, the log-sum-exp over A(i), the entropy
        of the softmax in nats, the index of the largest logit in A(i) (int64; ties go to the lowest), and s_{i,t(i)}.
        At least float32, whatever comes in; autocast does not lower it. Ignored rows give 0, and ``ignore_index``
        as top1.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of the above.
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
        expect_type(scale, NUMBERS, "contrast", "scale", "a number or a (K,) tensor")
    if bias is not None:
        expect_tensor(bias, "contrast", "bias", (k,), FLOATS, device)
    expect((groups is None) == (key_groups is None), "contrast", "groups and key_groups", "both or none", "one of them")
    if groups is not None:
        expect_tensor(groups, "contrast", "groups", (n,), INTEGERS, device)
        expect_tensor(key_groups, "contrast", "key_groups", (k,), INTEGERS, device)
    expect_index(targets, "contrast", "targets", k, ignore_index)
    loss, *rest = contrast_unchecked(
        features, keys, targets, scale, bias, groups, key_groups, normalize=normalize, divisor=divisor,
        ignore_index=ignore_index, stats=stats,
    )  # fmt: skip
    return Contrast(loss, *(rest if stats else [loss.new_empty(0)] * 4))


def contrast_unchecked(
    features: Tensor,
    keys: Tensor | None,
    targets: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    *,
    normalize: bool = False,
    divisor: float | Tensor | None = None,
    more_keys: Tensor | None = None,
    ignore_index: int = -1,
    stats: bool = False,
) -> tuple[Tensor, ...]:
    """:func:`contrast` for callers that have checked the arguments themselves: a small batch would feel it twice.

    Without ``stats`` it gives the loss alone. Keys that are None promise that they and their groups are those of the
    rows, the scale is a number, there is no bias and no row is ignored. s_ij = s_ji then saves one of four products.
    ``more_keys`` follow the keys, of their dtype, where none takes a gradient: the two need not be joined.
    """
    targets = without_ignored(targets, ignore_index)
    if groups is not None and key_groups is not None:
        groups, key_groups = groups.long(), key_groups.long()
    if torch.compiler.is_compiling():
        # The compiler cannot trace an autograd.Function that is given one tensor twice.
        keys = keys.view_as(keys) if keys is not None and keys is features else keys
        key_groups = key_groups.view_as(key_groups) if key_groups is not None and key_groups is groups else key_groups
        if isinstance(divisor, int):  # a number of rows, for each of which the op's number would be compiled anew
            divisor = torch.scalar_tensor(divisor, dtype=torch.int64, device=features.device)
    options = (normalize, divisor, more_keys, stats)
    out = _Contrast.apply(features, keys, targets, scale, bias, groups, key_groups, *options)
    if stats and ignore_index != -1:
        rows = Contrast(*out)
        return rows._replace(top1=torch.where(targets < 0, ignore_index, rows.top1))
    return out
