"""Random numbers by key instead of by order: a sample's draws are the same in any batch, worker, rank and device.

A draw is a function of (seed, epoch, sample id, view, stream, draw index) alone: Philox4x32-10, here in plain int64
arithmetic and for the compiled kernels in csrc/common/philox.h. Draws that are not uniform go through a quantile table
that the host builds once, and are then exact sums and products of integers, so that no device's exp, log or pow, and no
fused multiply-add, can change a bit of them.

Letters: N samples, V views, R draws.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011; test vectors of the Random123 library.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastproto._check import INTS, expect, expect_type

MAX_VIEWS = 4096
_WORD = 0xFFFFFFFF

# A quantile table holds the quantile function at CELLS + 1 evenly spaced probabilities, in units of 2^-NODE_BITS.
# The upper CELL_BITS of a 32-bit draw choose the cell, the others the place in it.
CELL_BITS, NODE_BITS = 12, 24
CELLS = 1 << CELL_BITS
_PLACE_BITS = 32 - CELL_BITS


class Stream(IntEnum):
    """What a draw is for: draws of different streams are independent. The numbers are part of every result."""

    CROP = 0
    FLIP = 1
    PHOTOMETRIC = 2
    LABELS = 3


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words per counter, all words in int64 tensors that broadcast (Salmon et al., section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Two 32-bit factors can overflow int64, which wraps; shifted and masked, the upper word is right all the same.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def expect_key(op: str, views: int, seed: int, epoch: int) -> tuple[int, int, int]:
    """The three as ints of Python; refuses what ``random_bits`` cannot be keyed with, in the name of a function."""
    for argument, value, low, high in (
        ("views", views, 1, MAX_VIEWS),
        ("seed", seed, 0, 2**63 - 1),
        ("epoch", epoch, 0, 2**32 - 1),
    ):
        expect_type(value, INTS, op, argument, "an int")
        expect(low <= value <= high, op, argument, f"{low} to {high}", value)
    return int(views), int(seed), int(epoch)


def random_bits(
    sample_ids: Tensor,  # (N,) integer
    stream: Stream,
    draws: int,
    *,
    views: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Uniform 32-bit integers as an int64 tensor (V, N, draws)."""
    blocks = -(-draws // 4)
    assert blocks <= 4096 and views <= MAX_VIEWS
    ids = sample_ids.to(torch.int64)[None, :, None]
    view = torch.arange(views, device=ids.device)[:, None, None]
    block = torch.arange(blocks, device=ids.device)
    counter = (ids & _WORD, ids >> 32 & _WORD, torch.full_like(ids, epoch), stream << 24 | view << 12 | block)
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32)), dim=-1)
    return words.flatten(2)[..., :draws]


def uniform(bits: Tensor) -> Tensor:
    """Random bits as float64 in [0, 1)."""
    return bits.double() * 2.0**-32


def quantile(bits: Tensor, table: Tensor) -> Tensor:
    """Random bits as float64 draws of a table's distribution: linear between its nodes, exact in every operation.

    At the CELLS + 1 nodes the distribution function is the wanted one, so it is never off by more than 1 / CELLS.
    """
    cell = bits >> _PLACE_BITS
    place = bits & ((1 << _PLACE_BITS) - 1)
    low = table[cell]
    value = (low << _PLACE_BITS) + (table[cell + 1] - low) * place
    return value.double() * 2.0 ** -(NODE_BITS + _PLACE_BITS)


# One table for each set of parameters and device, so that a training step copies nothing from the host.
@functools.lru_cache(maxsize=256)
def quantile_table(
    distribution: Literal["uniform", "log_uniform", "beta"],
    parameters: tuple[float, ...],
    device: torch.device,
) -> Tensor:
    """Quantiles (CELLS + 1,) of U(low, high), exp(U(log low, log high)) or Beta(alpha, alpha) as int64."""
    probabilities = np.linspace(0.0, 1.0, CELLS + 1)
    if distribution == "beta":
        values = _beta_quantiles(*parameters)
    elif distribution == "log_uniform":
        low, high = (math.log(bound) for bound in parameters)
        values = np.exp(low + (high - low) * probabilities)
    else:
        low, high = parameters
        values = low + (high - low) * probabilities
    # Rounded far above the last bit of float64, where mathematical libraries differ.
    nodes = np.rint(values * 2.0**NODE_BITS)
    if distribution == "beta":
        # For alpha = 0.1 a tenth of all draws is nearer to 1 than that: they stay below it, as the distribution does.
        nodes = np.minimum(nodes, 2.0**NODE_BITS - 1)
    return torch.from_numpy(nodes.astype(np.int64)).to(device)


def _beta_quantiles(alpha: float) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha): its density is integrated up to 1/2 and inverted, the rest follows by symmetry.

    For alpha < 1 the density t^(alpha-1) (1-t)^(alpha-1) is infinite at 0; in s = t^alpha it is smooth there:
    (1-t)^(alpha-1) / alpha.
    """
    power = min(alpha, 1.0)
    edges = np.linspace(0.0, 0.5**power, (1 << 16) + 1)
    points, weights = np.polynomial.legendre.leggauss(4)
    t = (edges[:-1, None] + edges[1] * (points + 1) / 2) ** (1 / power)
    # Up to a constant factor; the 4 keeps a large alpha from underflowing at the centre.
    density = (1 - t) ** (alpha - 1) if alpha < 1 else (4 * t * (1 - t)) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum((density * weights).sum(axis=1))])
    lower = np.interp(np.linspace(0.0, mass[-1], CELLS // 2 + 1), mass, edges) ** (1 / power)
    lower[-1] = 0.5
    return np.concatenate([lower, 1 - lower[-2::-1]])
