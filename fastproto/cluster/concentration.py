"""Concentration: how tightly a cluster's members lie around its centre, as the temperature of its prototype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastproto._check import INTEGERS, expect, expect_index, expect_tensor, is_number, reads_data
from fastproto.cluster._rows import Rows
from fastproto.ops.update import update

TEMPERATURE = 0.2
ALPHA = 10.0
# Of torch.cdist: differences and not a matrix product, which loses the digits of distances small beside the rows.
EXACT = "donot_use_mm_for_euclid_dist"
# What stays in a CPU's cache, what fills a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


@torch.no_grad()
def concentration(
    x: Tensor,  # (N, D) float
    labels: Tensor,  # (N,) int64 or int32, -1 = belongs nowhere
    centers: Tensor,  # (K, D) float
    temperature: float = TEMPERATURE,
    alpha: float = ALPHA,
) -> Tensor:
    """Concentration φ (K,) of every cluster: small where many members lie close to their centre.

    With Z_k members v around centre c_k, as k-means left it:
        φ_k = Σ_v ||v - c_k|| / (Z_k · log(Z_k + alpha)),   Z_k ≤ 1 → the largest φ,
    clipped to the 10th ... 90th percentile and scaled so that the mean is ``temperature``. A cluster whose members all
    coincide would get 0, which no loss can divide by: nothing falls below a thousandth of the temperature, and where
    every φ is 0 all are the temperature.

    Returns:
        (K,) float32, or float64 for float64 rows. Not differentiable.

    Raises:
        TypeError: an argument is not a tensor of the right dtype.
        ValueError: shapes, devices or options do not fit, or (where data is read) a label is outside -1 ... K - 1 or a
            labelled row or a centre holds NaN or infinity.

    Example:
        >>> import torch
        >>> from fastproto.cluster import concentration
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [9.0]])
        >>> concentration(x, torch.tensor([0, 0, 1, 1]), torch.tensor([[0.1], [7.0]]))
        tensor([0.0552, 0.3448])

    Source: Li et al., "Prototypical Contrastive Learning of Unsupervised Representations" (arXiv 2005.04966),
    section 3.3; percentiles and mean as in the authors' code.
    """
    op = "concentration"
    expect_tensor(x, op, "x", ("N", "D"))
    expect_tensor(centers, op, "centers", ("K", x.shape[1]), device=x.device)
    expect(centers.numel() > 0, op, "centers", "at least one centre of at least one dimension", centers)
    expect_tensor(labels, op, "labels", (x.shape[0],), INTEGERS, x.device)
    expect_temperature(temperature, op)
    known = is_number(alpha) and 0 <= alpha < math.inf
    expect(known, op, "alpha", "a finite number of at least 0", alpha)
    expect_index(labels, op, "labels", centers.shape[0], -1)
    radius = radii(x, labels, centers)
    if reads_data(x) and not radius[labels >= 0].isfinite().all():
        expect(bool(centers.isfinite().all()), op, "centers", "finite centres", "NaN or infinity")
        Rows(x).refuse(op)
    sums, counts = update(radius[:, None], labels, centers.shape[0])
    phi = from_radii(sums[:, 0], counts, temperature, alpha)
    return phi if x.dtype == torch.float64 else phi.float()


def expect_temperature(temperature: float, op: str) -> None:
    """ValueError for what is no mean of a concentration."""
    known = is_number(temperature) and 0 < temperature < math.inf
    expect(known, op, "temperature", "a finite number above 0", temperature)


def radii(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """||x_n - c_label|| (N,) float64. The same bits whatever rows stand beside a row."""
    chunk = max(1, CHUNK_ELEMENTS[x.device.type] // x.shape[1])
    out = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for x_nd, label_n, out_n in zip(x.split(chunk), labels.split(chunk), out.split(chunk), strict=True):
        # N matrices of one row each: cdist takes their differences, without an N x D matrix of them.
        center_nd = centers[label_n.clamp(min=0)].double()
        out_n.copy_(torch.cdist(x_nd.double()[:, None], center_nd[:, None], compute_mode=EXACT)[:, 0, 0])
    return out


def from_radii(radii: Tensor, counts: Tensor, temperature: float = TEMPERATURE, alpha: float = ALPHA) -> Tensor:
    """Concentration (K,) float64 from Σ_v ||v - c_k|| and the number of members Z_k of every cluster."""
    several = counts > 1
    phi = torch.where(several, radii / (counts * (counts + alpha).log()), 0.0)
    phi = torch.where(several, phi, phi.max())
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    # Dividing by the smallest normal number instead of 0 leaves 0, which the next line then sees.
    phi = temperature * phi / phi.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(phi.max() > 0, phi.clamp(min=1e-3 * temperature), temperature)
