"""What happens to the colours of each view: parameters drawn by key, for the functions of fastproto.ops.photometric."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from fastproto._check import INTEGERS, expect, expect_tensor, expect_type
from fastproto._random import Stream, expect_key, random_bits, uniform


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
    blur_p: float = 0.0,
    sigma: tuple[float, float] = (0.1, 2.0),
    solarize_p: float = 0.0,
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
        blur_p: probability of Gaussian blur.
        sigma: least and greatest standard deviation of the blur in pixels, uniform.
        solarize_p: probability of solarisation.
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
        SimCLR, arXiv 2002.05709, appendix A; MoCo v2, arXiv 2003.04297; solarisation in BYOL, arXiv 2006.07733.

    Example:
        >>> import torch
        >>> from fastproto.views import sample_photometric
        >>> parameters = sample_photometric(torch.arange(4), views=2)
        >>> {name: tuple(value.shape) for name, value in parameters.items()}
        {'jitter': (8, 4), 'order': (8, 4), 'gray': (8,)}
    """
    op = "sample_photometric"
    expect_tensor(sample_ids, op, "sample_ids", ("N",), INTEGERS)
    expect_key(op, views, seed, epoch)
    expect_jitter(op, jitter)
    for argument, probability in (
        ("jitter_p", jitter_p),
        ("gray_p", gray_p),
        ("blur_p", blur_p),
        ("solarize_p", solarize_p),
        ("threshold", threshold),
    ):
        expect_type(probability, (int, float), op, argument, "a number")
        expect(0 <= probability <= 1, op, argument, "a number in [0, 1]", probability)
    expect_type(sigma, (tuple, list), op, "sigma", "a pair of numbers")
    good = len(sigma) == 2 and 0 <= sigma[0] <= sigma[1] < math.inf
    expect(good, op, "sigma", "(low, high) with 0 <= low <= high", sigma)

    # Every draw has its place, so that switching one change on leaves the others as they were.
    bits = random_bits(sample_ids, Stream.PHOTOMETRIC, 13, views=views, seed=seed, epoch=epoch).flatten(0, 1)
    draws = uniform(bits)
    parameters: PhotometricParameters = {}
    if jitter_p > 0 and any(jitter):
        jittered = draws[:, 0] < jitter_p
        parameters["jitter"] = torch.stack(
            [
                _between(max(0.0, 1 - strength), 1 + strength, draws[:, 1 + place], jittered, 1.0)
                if place < 3
                else _between(-strength, strength, draws[:, 1 + place], jittered, 0.0)
                for place, strength in enumerate(jitter)
            ],
            dim=1,
        )
        parameters["order"] = bits[:, 5:9].argsort(dim=1, stable=True)
    if gray_p > 0:
        parameters["gray"] = draws[:, 9] < gray_p
    if blur_p > 0:
        parameters["sigma"] = _between(*sigma, draws[:, 11], draws[:, 10] < blur_p, 0.0)
    if solarize_p > 0:
        parameters["threshold"] = _between(threshold, threshold, draws[:, 12], draws[:, 12] < solarize_p, math.inf)
    return parameters


def expect_jitter(op: str, jitter: tuple[float, float, float, float]) -> None:
    """Refuses strengths of colour jitter from which nothing can be drawn."""
    expect_type(jitter, (tuple, list), op, "jitter", "four strengths")
    good = len(jitter) == 4 and all(0 <= strength < math.inf for strength in jitter) and jitter[3] <= 0.5
    expect(good, op, "jitter", "four strengths of at least 0, that of the hue at most 0.5", jitter)


def _between(low: float, high: float, draw: Tensor, chosen: Tensor, otherwise: float) -> Tensor:
    """Uniform draws for the chosen rows, a fixed value for the others, as float32."""
    return torch.where(chosen, low + (high - low) * draw, otherwise).float()
