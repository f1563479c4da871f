"""Parameters of photometric for each view, in plain PyTorch.

    chosen with probability p: low + (high - low) u, else the value that changes nothing

Every draw has its place, so that switching one change on leaves the others as they were: 0 jittered or not, 1 to 4
factors, 5 to 8 order, 9 gray, 10 blurred or not, 11 sigma, 12 solarised or not.

Letters: N samples, V views, R = V·N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastproto._random import Stream, random_bits, uniform


def sample_photometric(
    sample_ids: Tensor,  # (N,) integer
    jitter_p: float,
    low: Sequence[float],  # of brightness, contrast, saturation, hue
    high: Sequence[float],
    gray_p: float,
    blur_p: float,
    sigma: Sequence[float],
    solarize_p: float,
    threshold: float,
    views: int,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Jitter (R, 4) float32, order (R, 4) int64, gray (R,) bool, sigma (R,) and threshold (R,) float32."""
    bits_rd = random_bits(sample_ids, Stream.PHOTOMETRIC, 13, views=views, seed=seed, epoch=epoch).flatten(0, 1)
    draws_rd = uniform(bits_rd)
    jittered_r = draws_rd[:, 0] < jitter_p
    factors = [_between(low[i], high[i], draws_rd[:, 1 + i], jittered_r, 1.0 if i < 3 else 0.0) for i in range(4)]
    order_r4 = bits_rd[:, 5:9].argsort(dim=1, stable=True)
    gray_r = draws_rd[:, 9] < gray_p
    sigma_r = _between(sigma[0], sigma[1], draws_rd[:, 11], draws_rd[:, 10] < blur_p, 0.0)
    threshold_r = _between(threshold, threshold, draws_rd[:, 12], draws_rd[:, 12] < solarize_p, math.inf)
    return torch.stack(factors, dim=1), order_r4, gray_r, sigma_r, threshold_r


def _between(low: float, high: float, draw: Tensor, chosen: Tensor, otherwise: float) -> Tensor:
    """Uniform draws for the chosen rows, a fixed value for the others, as float32."""
    return torch.where(chosen, low + (high - low) * draw, otherwise).float()
