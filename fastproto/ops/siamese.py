"""The siamese metric loss of SPCL: on given pairs, and over all pairs of a batch.

Both forwards return dM/ds beside M. It is the gradient of β, and on given pairs all that the backward pass needs; over
all pairs that pass computes the logits again, so that nothing of size (N, N) waits for it. docs/math/siamese.md
derives the gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import FLOATS, INTEGERS, expect_index, expect_tensor, without_ignored
from fastproto.ops._dispatch import DTYPE_CODES, Op, contiguous_rows, once_differentiable
from fastproto.reference import siamese as reference


class _PairsResults(NamedTuple):
    """What a C++ kernel writes, or the backward takes from above, in the order of csrc/siamese/bind.h."""

    loss: Tensor | None = None
    slope: Tensor | None = None
    coefficient: Tensor | None = None
    da: Tensor | None = None
    dw: Tensor | None = None


class _AllPairsResults(NamedTuple):
    """The same over all pairs."""

    mean: Tensor | None = None
    slope: Tensor | None = None
    share: Tensor | None = None
    coefficient: Tensor | None = None
    dx: Tensor | None = None
    dw: Tensor | None = None


def _cpp_pairs_fwd(a: Tensor, b: Tensor, same: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    loss, slope = _floats(len(a), like=a), _floats(len(a), like=a)
    _launch_pairs("siamese_pairs_fwd", _PairsResults(loss=loss, slope=slope), a, b, same, weight, bias)
    return loss, slope


def _cpp_pairs_bwd(
    a: Tensor, b: Tensor, same: Tensor, weight: Tensor, coefficient: Tensor, need_rows: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    da = _floats(*a.shape, like=a) if need_rows else _floats(0, like=a)
    dw = _floats(a.shape[1], like=a) if need_weight else _floats(0, like=a)
    results = _PairsResults(coefficient=coefficient.contiguous(), da=da, dw=dw)
    _launch_pairs("siamese_pairs_bwd", results, a, b, same, weight)
    return da, dw


def _cpp_all_pairs_fwd(features: Tensor, second: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _floats(3, like=features), _floats(3, like=features), _floats(3, like=features)
    _launch_all_pairs("siamese_all_pairs_fwd", _AllPairsResults(*out), features, second, *rest)
    return out


def _cpp_all_pairs_bwd(features: Tensor, second: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor]:
    *rows, coefficient = rest
    dx, dw = _floats(*_joined_shape(features, second), like=features), _floats(features.shape[1], like=features)
    results = _AllPairsResults(coefficient=coefficient.contiguous(), dx=dx, dw=dw)
    _launch_all_pairs("siamese_all_pairs_bwd", results, features, second, *rows)
    return dx, dw


def _joined_shape(features: Tensor, second: Tensor | None) -> tuple[int, int]:
    return features.shape[0] + (0 if second is None else second.shape[0]), features.shape[1]


def _launch_pairs(
    name: str,
    results: _PairsResults,
    a: Tensor,
    b: Tensor,
    same: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> None:
    a, b = contiguous_rows(a), contiguous_rows(b)
    sizes = (*a.shape, a.stride(0), b.stride(0), DTYPE_CODES[a.dtype], DTYPE_CODES[b.dtype])
    _launch(name, sizes, a, b, same, weight.float().contiguous(), None if bias is None else bias.float(), *results)


def _launch_all_pairs(
    name: str,
    results: _AllPairsResults,
    x: Tensor,
    second: Tensor | None,
    images: Tensor,
    prototypes: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> None:
    x, second = contiguous_rows(x), None if second is None else contiguous_rows(second)
    stride = 0 if second is None else second.stride(0)
    sizes = (*_joined_shape(x, second), len(x), x.stride(0), stride, DTYPE_CODES[x.dtype])
    _launch(name, sizes, x, second, images, prototypes, weight.float().contiguous(), bias.float(), *results)


def _launch(name: str, sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    """Calls the C++ kernel of that name with addresses in the order of csrc/siamese/bind.h."""
    addresses = [0 if t is None or not t.numel() else t.data_ptr() for t in tensors]
    getattr(_native.cpp, name)(sizes, addresses, torch.get_num_threads())


def _floats(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _op(name: str, module: str, schema: str, cpp: Callable[..., Any], adapt: Callable[..., Any] | None = None) -> Op:
    """The op with its three backends, Triton's in that module; float64 is for the reference.

    ``adapt`` makes the arguments of reference and Triton from those of the schema.
    """

    def plain(*args: Any) -> Any:
        return getattr(reference, name)(*(adapt(*args) if adapt else args))

    def triton(*args: Any) -> Any:
        kernel = getattr(importlib.import_module(f"fastproto.kernels.{module}"), name)
        return kernel(*(adapt(*args) if adapt else args))

    def below_double(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
            return (plain if double else kernel)(*args)

        return run

    return Op(name, schema, reference=plain, cpp=below_double(cpp), triton=below_double(triton))


def _join(features: Tensor, second: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return (features if second is None else torch.cat([features, second]), *rest)


_pairs_fwd = _op(
    "siamese_pairs_fwd",
    "siamese_pairs",
    "(Tensor a, Tensor b, Tensor same, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    _cpp_pairs_fwd,
)
_pairs_bwd = _op(
    "siamese_pairs_bwd",
    "siamese_pairs",
    "(Tensor a, Tensor b, Tensor same, Tensor weight, Tensor coefficient, bool need_rows, bool need_weight) "
    "-> (Tensor, Tensor)",
    _cpp_pairs_bwd,
)
_all_pairs_fwd = _op(
    "siamese_all_pairs_fwd",
    "siamese_all_pairs",
    "(Tensor features, Tensor? second, Tensor images, Tensor prototypes, Tensor weight, Tensor bias) "
    "-> (Tensor, Tensor, Tensor)",
    _cpp_all_pairs_fwd,
    _join,
)
_all_pairs_bwd = _op(
    "siamese_all_pairs_bwd",
    "siamese_all_pairs",
    "(Tensor features, Tensor? second, Tensor images, Tensor prototypes, Tensor weight, Tensor bias, "
    "Tensor coefficient) -> (Tensor, Tensor)",
    _cpp_all_pairs_bwd,
    _join,
)


@_pairs_fwd.fake
def _fake_pairs_fwd(a: Tensor, b: Tensor, same: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(a, b, weight)
    return a.new_empty(a.shape[0], dtype=dtype), a.new_empty(a.shape[0], dtype=dtype)


@_pairs_bwd.fake
def _fake_pairs_bwd(
    a: Tensor, b: Tensor, same: Tensor, weight: Tensor, coefficient: Tensor, need_rows: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(a, b, weight)
    da = a.new_empty(a.shape if need_rows else (0,), dtype=dtype)
    return da, a.new_empty(a.shape[1] if need_weight else 0, dtype=dtype)


@_all_pairs_fwd.fake
def _fake_all_pairs_fwd(features: Tensor, second: Tensor | None, *rest: Tensor) -> Any:
    return tuple(features.new_empty(3, dtype=result_dtype(features, rest[2])) for _ in range(3))


@_all_pairs_bwd.fake
def _fake_all_pairs_bwd(features: Tensor, second: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(features, rest[2])
    dx = features.new_empty(_joined_shape(features, second), dtype=dtype)
    return dx, features.new_empty(features.shape[1], dtype=dtype)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of their dtypes, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _Pairs(torch.autograd.Function):
    """dM/ds waits from forward to backward, and the rows only where something but β has a gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, same: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss, slope = _pairs_fwd(a, b, same, weight, bias)
        need_pass = any(ctx.needs_input_grad[i] for i in (0, 1, 3))
        # β for the way back that refuses to be differentiated again.
        ctx.save_for_backward(slope, bias, *((a, b, same, weight) if need_pass else ()))
        ctx.dtypes = [tensor.dtype for tensor in (a, b, same, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, _, *args = kept
        need_a, need_b, _, need_w, need_beta = ctx.needs_input_grad
        coefficient = grad * slope
        gradients: list[Tensor | None] = [None] * 5
        if args:
            da, dw = _pairs_bwd(*args, coefficient, need_a or need_b, need_w)
            gradients = [da if need_a else None, -da if need_b else None, None, dw if need_w else None, None]
        gradients[4] = coefficient.sum() if need_beta else None
        return tuple(g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))


class _AllPairs(torch.autograd.Function):
    """The rows wait from forward to backward, and only where something but β has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        second: Tensor | None,
        images: Tensor,
        prototypes: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        args = (features, second, images, prototypes, weight, bias)
        mean, slope, share = _all_pairs_fwd(*args)
        need_x, need_second, _, _, need_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(slope, share, bias, *(args if need_x or need_second or need_w else ()))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in args]
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, share, _, *args = kept
        gradients: list[Tensor | None] = [None] * 6
        if args:
            dx, gradients[4] = _all_pairs_bwd(*args, grad * share)
            gradients[0], gradients[1] = dx[: len(args[0])], dx[len(args[0]) :]
        gradients[5] = (grad * slope).sum()
        wanted = zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=True)
        return tuple(g.to(dtype) if need and g is not None else None for g, dtype, need in wanted)


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
        TypeError: an argument is not a tensor, or its dtype is not one of the above.
        ValueError: shapes or devices do not fit, or a label is not 0, 1 or ``ignore_index`` (read on the CPU, on CUDA
            with ``fastproto.set_debug(True)``).

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
        >>> siamese_pairs(a, b, torch.tensor([1, 0]), torch.tensor([-1.0, -1.0]), torch.tensor(2.0))
        tensor([0.1269, 0.1269])

    Source: SPCL, arXiv 2208.08819.
    """
    return checked_pairs("siamese_pairs", a, b, same, weight, bias, ignore_index)


def checked_pairs(
    op: str, a: Tensor, b: Tensor, same: Tensor, weight: Tensor, bias: Tensor, ignore_index: int
) -> Tensor:
    """:func:`siamese_pairs` for a caller ``op``, which errors name."""
    expect_tensor(a, op, "a", ("N", "C"))
    expect_tensor(b, op, "b", tuple(a.shape), FLOATS, a.device)
    expect_tensor(same, op, "same", (a.shape[0],), (torch.bool, *INTEGERS), a.device)
    _expect_metric(weight, bias, a, op)
    same = same.long()
    expect_index(same, op, "same", 2, ignore_index)
    same = without_ignored(same, ignore_index)
    # The compiler cannot trace an autograd.Function that is given one tensor twice.
    return _Pairs.apply(a, b.view_as(b) if b is a else b, same, weight, bias)


def siamese_all_pairs(
    features: Tensor,  # (N, C) float
    images: Tensor,  # (N,) int
    prototypes: Tensor,  # (N,) int
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    *,
    second: Tensor | None = None,  # (M, C) float
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
        second: more rows (M, C) of the features' dtype, as if they stood below them; N then counts both. Two views of a
            batch need not be copied into one tensor.
        ignore_index: the prototype of rows that have none.

    Returns:
        AllPairs(same_image, same_prototype, different_prototype): three means, at least float32, 0 where there is no
        such pair.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of the above.
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
    if second is not None:
        expect_tensor(second, "siamese_all_pairs", "second", ("M", features.shape[1]), (features.dtype,), device)
        n += second.shape[0]
    expect_tensor(images, "siamese_all_pairs", "images", (n,), INTEGERS, device)
    expect_tensor(prototypes, "siamese_all_pairs", "prototypes", (n,), INTEGERS, device)
    _expect_metric(weight, bias, features, "siamese_all_pairs")
    expect_index(prototypes, "siamese_all_pairs", "prototypes", None, ignore_index)
    images, prototypes = images.long().contiguous(), without_ignored(prototypes, ignore_index)
    # The compiler cannot trace an autograd.Function that is given one tensor twice.
    second = second.view_as(second) if second is features else second
    means = _AllPairs.apply(features, second, images, prototypes, weight, bias)
    return AllPairs(*torch.unbind_copy(means))  # type: ignore[misc, func-returns-value]  # PyTorch's own is wrong


def _expect_metric(weight: Tensor, bias: Tensor, features: Tensor, op: str) -> None:
    expect_tensor(weight, op, "weight", (features.shape[1],), FLOATS, features.device)
    expect_tensor(bias, op, "bias", (), FLOATS, features.device)
