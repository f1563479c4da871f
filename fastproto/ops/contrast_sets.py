"""The contrast of the same rows against several sets of keys, as one op and one node of autograd.

At PCL's batches of 256 rows a GPU is bound by launches: the Triton kernel takes up to four sets in one, without a copy
of their keys. What is one number for each key comes concatenated, set after set. docs/math/contrast.md derives it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastproto.ops._dispatch import OPS, Op, once_differentiable
from fastproto.ops.contrast import outputs, present, unit_inputs
from fastproto.reference import contrast as reference


def _one_by_one(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """The forward op as a loop over the sets."""
    forward = OPS["contrast_fwd"].implementations[backend]

    def run(
        features: Tensor,
        keys: Sequence[Tensor],
        targets: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        normalize: bool,
        need_dx: bool,
    ) -> tuple[Tensor, ...]:
        sets = zip(keys, targets, *_by_set(keys, scale, bias), strict=True)
        results = [
            forward(features, y, t, a, 1.0, b, None, None, normalize, None, False, None, need_dx, False)
            for y, t, a, b in sets
        ]
        loss, saved, *dx = (torch.stack(values) for values in zip(*results, strict=True))
        return loss, saved, *(dx or [loss.new_empty(0)])

    return run


_reference_fwd = _one_by_one("reference")


def _triton_fwd(
    features: Tensor,
    keys: Sequence[Tensor],
    targets: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    normalize: bool,
    need_dx: bool,
) -> tuple[Tensor, ...]:
    if torch.float64 in (features.dtype, keys[0].dtype):
        return _reference_fwd(features, keys, targets, scale, bias, normalize, need_dx)
    from fastproto.kernels.contrast_fwd import MAX_SETS, contrast_fwd

    loss, saved, dx = _outputs(features, keys, need_dx)
    none = loss.new_empty(0)
    x, ys, a = unit_inputs(features, keys, scale) if normalize else (features, keys, scale)
    start_k = 0
    for first in range(0, len(ys), MAX_SETS):
        sets = slice(first, first + MAX_SETS)
        here_k = slice(start_k, start_k + sum(map(len, ys[sets])))
        b = None if bias is None else bias[here_k]
        out = (loss[sets], saved[sets], dx[sets], none, none, none)
        contrast_fwd(x, ys[sets], targets[sets], a[here_k], b, None, None, need_dx, False, out)
        start_k = here_k.stop
    if normalize and need_dx:
        # A row that no set counts gives nothing, not even a NaN.
        counted = (targets >= 0).any(0)[:, None]
        dx = reference.through_length(dx, *reference.unit_rows(torch.where(counted, features, 0)))
    return loss, saved, dx


def _outputs(features: Tensor, keys: Sequence[Tensor], need_dx: bool) -> tuple[Tensor, ...]:
    """Loss (G, N), what the backward wants (G, 3, N) and dx (G, N, D), of size 0 where not needed, to be written."""
    out = present(outputs(features, need_dx, False, sets=(len(keys),)))
    return tuple(out if need_dx else [*out, out[0].new_empty(0)])


def _by_set(keys: Sequence[Tensor], scale: Tensor, bias: Tensor | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """Scale and bias (ΣK,) as one (K,) or None for each set."""
    sizes = [len(y) for y in keys]
    return scale.split(sizes), [None] * len(sizes) if bias is None else bias.split(sizes)


_fwd = Op(
    "contrast_sets_fwd",
    "(Tensor features, Tensor[] keys, Tensor targets, Tensor scale, Tensor? bias, bool normalize, bool need_dx) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference_fwd,
    cpp=_one_by_one("cpp"),
    triton=_triton_fwd,
)


@_fwd.fake
def _fake_fwd(features: Tensor, keys: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    wide = features.to(torch.promote_types(features.dtype, keys[0].dtype))
    return _outputs(wide, keys, rest[-1])


class _ContrastSets(torch.autograd.Function):
    """The forward op of all sets, and the backward op of those whose keys, scale or bias want a gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        # Named one by one in the signature, with two sets they would be as many as the compiler takes for "no ctx".
        features, targets, scale, bias, divisor, normalize, *keys = args
        need_x, _, *need_others = ctx.needs_input_grad
        loss, saved, dx = _fwd(features, keys, targets, scale, bias, normalize, need_x)
        ctx.normalize, ctx.dtype = normalize, features.dtype
        for_keys = (saved, features, targets, scale, bias, *keys)
        # The rows, for the way back that refuses to be differentiated again.
        ctx.save_for_backward(dx, divisor, features if need_x else None, *(for_keys if any(need_others) else ()))
        return loss if divisor is None else loss.sum(1) / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, divisor, _, *for_keys = kept
        need_x, _, need_a, need_b, _, _, *need_keys = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        grad = grad if divisor is None else (grad / divisor)[:, None]
        if need_x:
            gradients[0] = (grad[..., None] * dx).sum(0).to(ctx.dtype)
        if for_keys:
            saved, features, targets, scale, bias, *keys = for_keys
            sets = zip(keys, targets, *_by_set(keys, scale, bias), saved, grad.expand(targets.shape), strict=True)
            of_vectors: list[tuple[Tensor, Tensor]] = []
            for i, (y, t, a, b, *of_rows) in enumerate(sets):
                if need_a or need_b or need_keys[i]:
                    args = (features, y, t, a, 1.0, b, None, None, ctx.normalize, None, False, *of_rows)
                    dy, *of_set = OPS["contrast_bwd_keys"](*args)
                    of_vectors.append(tuple(of_set))
                    gradients[6 + i] = dy.to(y.dtype) if need_keys[i] else None
            for i, needed, value in ((2, need_a, scale), (3, need_b, bias)):
                if needed:
                    gradients[i] = torch.cat([of_set[i - 2] for of_set in of_vectors]).to(value.dtype)
        return tuple(gradients)


def contrast_sets(
    features: Tensor,  # (N, D) float
    keys: Sequence[Tensor],  # G of (K, D) float
    targets: Tensor,  # (G, N) int64, -1 for an ignored row
    scale: Tensor,  # (ΣK,) float
    bias: Tensor | None = None,  # (ΣK,) float
    *,
    normalize: bool = False,
    divisor: Tensor | None = None,  # (G,) float
) -> Tensor:
    """The losses of ops.contrast.contrast for G sets of keys, (G, N), or (G,) with a divisor.

    For callers that have checked the arguments themselves.
    """
    dtype = functools.reduce(torch.promote_types, (y.dtype for y in keys))
    # The compiler cannot trace an autograd.Function that is given one tensor twice.
    once = [y.to(dtype) for y in keys]
    for i, y in enumerate(once):
        if y is features or any(y is other for other in once[:i]):
            once[i] = y.view_as(y)
    return _ContrastSets.apply(features, targets, scale, bias, divisor, normalize, *once)
