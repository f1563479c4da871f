"""The siamese metric loss of SPCL, forward and backward, in plain PyTorch.

    s(a, b)    = <w, |a - b|> + β
    M(a, b, t) = -t · log sigmoid(s) - (1 - t) · log(1 - sigmoid(s))

N rows, C backbone features. The all-pairs form works on blocks of B rows, so that nothing of size (N, N, C) is in
memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of |a - b| at a time: 16 MiB in float32, four times as fast on a CPU as 64 MiB.
BLOCK = 2**22


def siamese_pairs_fwd(
    a: Tensor,  # (N, C) float
    b: Tensor,  # (N, C) float
    same: Tensor,  # (N,) int64 t, -1 for an ignored pair
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
) -> tuple[Tensor, Tensor]:
    """M (N,) and its slope dM/ds (N,); both 0 for ignored pairs."""
    difference_nc = _difference(a, b, same, weight)
    loss_n, slope_n = _metric(difference_nc, same == 1, weight, bias)
    return torch.where(same >= 0, loss_n, 0), torch.where(same >= 0, slope_n, 0)


def siamese_pairs_bwd(
    a: Tensor,  # (N, C) float
    b: Tensor,  # (N, C) float
    same: Tensor,  # (N,) int64
    weight: Tensor,  # (C,) float
    coefficient: Tensor,  # (N,) dL/ds
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dL/da = -dL/db (N, C) and dL/dw (C,); what is not needed has size 0."""
    difference_nc = _difference(a, b, same, weight)
    c_n1 = torch.where(same >= 0, coefficient, 0)[:, None]
    da_nc = c_n1 * weight.to(difference_nc.dtype) * difference_nc.sign() if need_rows else c_n1.new_empty(0)
    dw_c = (c_n1 * difference_nc.abs()).sum(0) if need_weight else c_n1.new_empty(0)
    return da_nc, dw_c


def siamese_all_pairs_fwd(
    features: Tensor,  # (N, C) float
    images: Tensor,  # (N,) int64
    prototypes: Tensor,  # (N,) int64, -1 for none
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean M and mean slope dM/ds over the pairs of one image, of one prototype, of two prototypes, and one over the
    number of such pairs; each (3,) and 0 where there is no pair."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    loss_sums, slope_sums = torch.zeros(2, 3, dtype=dtype, device=features.device).unbind()
    counts = torch.zeros(3, dtype=torch.int64, device=features.device)
    # Every pair is met twice, as (a, b) and (b, a), with one loss: the means are those over unordered pairs.
    for block in _blocks(features, images, prototypes, weight, bias):
        for values_bn, sums in ((block.loss_bn, loss_sums), (block.slope_bn, slope_sums)):
            sums += torch.stack([torch.where(kind_bn, values_bn, 0).sum() for kind_bn in block.kinds_bn])
        counts += torch.stack([kind_bn.sum() for kind_bn in block.kinds_bn])
    share = torch.where(counts > 0, 2 / counts.to(dtype), 0)
    return loss_sums / counts.clamp(min=1), slope_sums / counts.clamp(min=1), share


def siamese_all_pairs_bwd(
    features: Tensor,  # (N, C) float
    images: Tensor,  # (N,) int64
    prototypes: Tensor,  # (N,) int64
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    coefficient: Tensor,  # (3,) dL/dM of an unordered pair of each kind
) -> tuple[Tensor, Tensor]:
    """dL/dx (N, C) and dL/dw (C,), from q_ij = dL/ds_ij: Σ_j q_ij w sign(x_i - x_j) and ½ Σ_ij q_ij |x_i - x_j|."""
    dx_blocks, dw_c = [], torch.zeros_like(weight, dtype=coefficient.dtype)
    for block in _blocks(features, images, prototypes, weight, bias):
        q_bn = torch.zeros_like(block.slope_bn)
        for kind_bn, value in zip(block.kinds_bn, coefficient, strict=True):
            q_bn = torch.where(kind_bn, value * block.slope_bn, q_bn)
        # A pair that does not count is emptied, so that not even a NaN in it reaches a sum.
        difference_bnc = torch.where(q_bn[:, :, None] != 0, block.difference_bnc, 0)
        dx_blocks.append((q_bn[:, :, None] * difference_bnc.sign()).sum(1) * weight.to(coefficient.dtype))
        dw_c += (q_bn[:, :, None] * difference_bnc.abs()).sum((0, 1)) / 2
    dx_nc = torch.cat(dx_blocks) if dx_blocks else coefficient.new_zeros(features.shape)
    return dx_nc, dw_c


class _Block(NamedTuple):
    """Some rows against all: differences, M, dM/ds, and which pairs are of one image, one prototype, two prototypes."""

    difference_bnc: Tensor
    loss_bn: Tensor
    slope_bn: Tensor
    kinds_bn: tuple[Tensor, Tensor, Tensor]


def _blocks(features: Tensor, images: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor) -> Iterator[_Block]:
    x_nc = features.to(torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32))
    rows = torch.arange(len(x_nc), device=x_nc.device)
    block_rows = max(1, BLOCK // max(1, x_nc.numel()))
    for start in range(0, len(x_nc), block_rows):
        block = slice(start, start + block_rows)
        image_bn = images[block, None] == images
        assigned_bn = (prototypes[block, None] >= 0) & (prototypes >= 0)
        prototype_bn = prototypes[block, None] == prototypes
        difference_bnc = x_nc[block, None] - x_nc
        kinds_bn = (
            image_bn & (rows[block, None] != rows),
            ~image_bn & assigned_bn & prototype_bn,
            ~image_bn & assigned_bn & ~prototype_bn,
        )
        yield _Block(difference_bnc, *_metric(difference_bnc, kinds_bn[0] | kinds_bn[1], weight, bias), kinds_bn)


def _difference(a: Tensor, b: Tensor, same: Tensor, weight: Tensor) -> Tensor:
    """a - b (N, C) in at least float32; 0 for ignored pairs, whatever is in them."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.promote_types(weight.dtype, torch.float32))
    return torch.where((same >= 0)[:, None], a.to(dtype) - b.to(dtype), 0)


def _metric(difference: Tensor, same: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """M and dM/ds by the difference a - b (…, C) and the label (…)."""
    dtype = difference.dtype
    with torch.autocast(difference.device.type, enabled=False):
        logits = difference.abs() @ weight.to(dtype) + bias.to(dtype)
    signed = torch.where(same, logits, -logits)
    slope = (-signed).sigmoid()
    return -F.logsigmoid(signed), torch.where(same, -slope, slope)
