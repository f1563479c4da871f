"""sample_photometric: what happens to the colours of each view, keyed by sample: parameters for ``apply_photometric``.

See fastproto/reference/sample_photometric.py for the formula. Compiled for the CPU (C++) and the GPU (CUDA): the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import INTEGERS, NUMBERS, expect, expect_numbers, expect_tensor, expect_type, is_number
from fastproto._random import expect_key
from fastproto.ops._dispatch import Op
from fastproto.reference import sample_photometric as reference

# Of a blur: float32 holds its square.
LARGEST_SIGMA = 1e18
SIGMAS = f"(low, high) with 0 <= low <= high < {LARGEST_SIGMA:g}"


def _cpp(*args: Any) -> tuple[Tensor, ...]:
    return _launch(_native.cpp, torch.get_num_threads(), *args)


def _cuda(sample_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device(sample_ids.device):
        return _launch(_native.cuda, torch.cuda.current_stream().cuda_stream, sample_ids, *rest)


def _launch(
    module: Any,
    threads_or_stream: int,
    sample_ids: Tensor,
    jitter_p: float,
    low: list[float],
    high: list[float],
    gray_p: float,
    blur_p: float,
    sigma: list[float],
    solarize_p: float,
    threshold: float,
    *key: int,
) -> tuple[Tensor, ...]:
    """Calls a compiled kernel with the op's arguments as csrc/sample_photometric/bind.h takes them."""
    out = _outputs(sample_ids, key[0])
    ids = sample_ids.long()
    module.sample_photometric(
        (ids.data_ptr(), ids.stride(0), len(ids), *key),
        (jitter_p, gray_p, blur_p, solarize_p),
        low,
        high,
        sigma,
        threshold,
        [tensor.data_ptr() for tensor in out],
        threads_or_stream,
    )
    return out


_op = Op(
    "sample_photometric",
    "(Tensor sample_ids, float jitter_p, float[] low, float[] high, float gray_p, float blur_p, float[] sigma, "
    "float solarize_p, float threshold, int views, SymInt seed, SymInt epoch) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.sample_photometric,
    cpp=_cpp,
    cuda=_cuda,
)


def _outputs(sample_ids: Tensor, views: int) -> tuple[Tensor, ...]:
    """Jitter, order, gray, sigma, threshold: all of them, so that the draws stand in one place."""
    rows, device = views * sample_ids.shape[0], sample_ids.device
    return (
        torch.empty((rows, 4), dtype=torch.float32, device=device),
        torch.empty((rows, 4), dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


@_op.fake
def _fake(sample_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(sample_ids, rest[-3])


class PhotometricParameters(TypedDict, total=False):
    """Keyword arguments of ``apply_photometric``; what never happens is left out. R = views · N rows, view-major."""

    jitter: Tensor  # (R, 4) float32
    order: Tensor  # (R, 4) int64
    gray: Tensor  # (R,) bool
    sigma: Tensor  # (R,) float32
    threshold: Tensor  # (R,) float32


def sample_photometric(
    sample_ids: Tensor,  # (N,) integer
    *,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    gray_p: float = 0.2,
    blur_p: float | Sequence[float] = 0.0,
    sigma: tuple[float, float] = (0.1, 2.0),
    solarize_p: float | Sequence[float] = 0.0,
    threshold: float = 0.5,
    views: int = 2,
    seed: int = 0,
    epoch: int = 0,
) -> PhotometricParameters:
    """Draws the parameters of ``apply_photometric`` for every view of every sample.

    They are keyed by (seed, epoch, sample id, view), as ``sample_crops``, and the same whatever the batch or device.
    A view that is not chosen for a change gets the parameter that changes nothing: factor 1, hue 0, sigma 0, threshold
    infinity. A change with probability 0 is left out of the result.

    Args:
        sample_ids: (N,) int64 or int32, the samples' places in the data set.
        jitter: strengths of brightness, contrast, saturation and hue: a factor is uniform in [max(0, 1 - s), 1 + s],
            the turn of the hue in [-s, s], s at most 1/2. Their order is drawn too.
        jitter_p: probability that a view's colours are jittered.
        gray_p: probability of grayscale.
        blur_p: probability of Gaussian blur: one number, or one for each view.
        sigma: least and greatest standard deviation of the blur in pixels, uniform.
        solarize_p: probability of solarisation, likewise.
        threshold: of the solarisation, in [0, 1].
        views: views of each sample.
        seed: key of the whole run.
        epoch: key of the epoch.

    Returns:
        Keyword arguments for ``apply_photometric``; row ``v * N + i`` of each is view v of sample i.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: an argument has another shape or is out of its range.

    Source:
        SimCLR, arXiv 2002.05709, appendix A; MoCo v2, arXiv 2003.04297; solarisation, and views
        that differ, in BYOL, arXiv 2006.07733, appendix B.

    Example:
        >>> import torch
        >>> from fastproto.views import sample_photometric
        >>> parameters = sample_photometric(torch.arange(4), views=2)
        >>> {name: tuple(value.shape) for name, value in parameters.items()}
        {'jitter': (8, 4), 'order': (8, 4), 'gray': (8,)}
    """
    op = "sample_photometric"
    expect_tensor(sample_ids, op, "sample_ids", ("N",), INTEGERS)
    views, seed, epoch = expect_key(op, views, seed, epoch)
    jitter = expect_jitter(op, jitter)
    for argument, number in (("jitter_p", jitter_p), ("gray_p", gray_p), ("threshold", threshold)):
        expect_type(number, NUMBERS, op, argument, "a number")
        expect(0 <= number <= 1, op, argument, "a number in [0, 1]", number)
    jitter_p, gray_p, threshold = float(jitter_p), float(gray_p), float(threshold)
    blur = expect_probabilities(op, "blur_p", blur_p, views)
    solarize = expect_probabilities(op, "solarize_p", solarize_p, views)
    widths = expect_numbers(sigma, op, "sigma", "a pair of numbers")
    good = len(widths) == 2 and 0 <= widths[0] <= widths[1] < LARGEST_SIGMA
    expect(good, op, "sigma", SIGMAS, sigma)

    low = [max(0.0, 1 - strength) for strength in jitter[:3]] + [-jitter[3]]
    high = [1 + strength for strength in jitter[:3]] + [jitter[3]]
    pairs = list(zip(blur, solarize, strict=True))
    draws = {
        (blur_p, solarize_p): _op(
            sample_ids, jitter_p, low, high, gray_p, blur_p, widths, solarize_p, threshold, views, seed, epoch
        )
        for blur_p, solarize_p in dict.fromkeys(pairs)
    }
    drawn = draws[pairs[0]]
    n = sample_ids.shape[0]
    if len(draws) > 1 and n:
        # Each view has its draws whatever the others are asked for: its rows are those of its own pair.
        by_view = [[rows.unflatten(0, (views, n))[v] for rows in draws[pair]] for v, pair in enumerate(pairs)]
        drawn = tuple(torch.cat(rows) for rows in zip(*by_view, strict=True))
    parameters: PhotometricParameters = {}
    if jitter_p > 0 and any(jitter):
        parameters["jitter"], parameters["order"] = drawn[:2]
    if gray_p > 0:
        parameters["gray"] = drawn[2]
    if any(blur):
        parameters["sigma"] = drawn[3]
    if any(solarize):
        parameters["threshold"] = drawn[4]
    return parameters


def expect_probabilities(op: str, argument: str, value: float | Sequence[float], views: int) -> tuple[float, ...]:
    """One probability for each view, from one number for all or from as many; refuses what is none."""
    wanted = "a number in [0, 1], or one for each view"
    numbers = expect_numbers([value] * views if is_number(value) else value, op, argument, wanted)
    expect(len(numbers) == views and all(0 <= n <= 1 for n in numbers), op, argument, wanted, value)
    return numbers


def expect_jitter(op: str, jitter: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The strengths of colour jitter as floats; refuses those from which nothing can be drawn."""
    strengths = expect_numbers(jitter, op, "jitter", "four strengths")
    good = len(strengths) == 4 and all(0 <= strength < math.inf for strength in strengths) and strengths[3] <= 0.5
    expect(good, op, "jitter", "four strengths of at least 0, that of the hue at most 0.5", jitter)
    brightness, contrast, saturation, hue = strengths
    return brightness, contrast, saturation, hue
