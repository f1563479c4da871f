"""The siamese metric loss of SPCL, in plain PyTorch.

    s(a, b)    = <w, |a - b|> + β
    M(a, b, t) = -t · log sigmoid(s) - (1 - t) · log(1 - sigmoid(s))

N rows, C backbone features. The all-pairs form works on blocks of rows that the backward pass computes again, so that
nothing of size (N, N, C) is in memory at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Elements of |a - b| at a time: 16 MiB in float32, four times as fast on a CPU as 64 MiB.
BLOCK = 2**22


def siamese_pairs(
    a: Tensor,  # (N, C) float
    b: Tensor,  # (N, C) float
    same: Tensor,  # (N,) int or bool
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    ignore_index: int,
) -> Tensor:
    """M of each row pair (N,); 0 where ``same`` is ``ignore_index``."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.promote_types(weight.dtype, torch.float32))
    counted_n = same != ignore_index
    difference_nc = torch.where(counted_n[:, None], a.to(dtype) - b.to(dtype), 0)
    loss_n = _metric(difference_nc, same == 1, weight.to(dtype), bias.to(dtype))
    return torch.where(counted_n, loss_n, 0)


def siamese_all_pairs(
    features: Tensor,  # (N, C) float
    images: Tensor,  # (N,) int
    prototypes: Tensor,  # (N,) int
    weight: Tensor,  # (C,) float
    bias: Tensor,  # () float
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean M over the pairs of one image, of one prototype, of two prototypes; each () and 0 where there is no pair."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    x_nc, w_c, beta = features.to(dtype), weight.to(dtype), bias.to(dtype)
    rows = torch.arange(len(x_nc), device=x_nc.device)

    def block_sums(start: int, stop: int, x_nc: Tensor, w_c: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        block = slice(start, stop)
        image_bn = images[block, None] == images
        assigned_bn = (prototypes[block, None] != ignore_index) & (prototypes != ignore_index)
        prototype_bn = prototypes[block, None] == prototypes
        loss_bn = _metric(x_nc[block, None] - x_nc, image_bn | (assigned_bn & prototype_bn), w_c, beta)
        sides = (
            image_bn & (rows[block, None] != rows),
            ~image_bn & assigned_bn & prototype_bn,
            ~image_bn & assigned_bn & ~prototype_bn,
        )
        sums = torch.stack([torch.where(side_bn, loss_bn, 0).sum() for side_bn in sides])
        return sums, torch.stack([side_bn.sum() for side_bn in sides])

    # Every pair is met twice, as (a, b) and (b, a), with one loss: the means are those over unordered pairs.
    block_rows = max(1, BLOCK // max(1, x_nc.numel()))
    sums, counts = block_sums(0, 0, x_nc, w_c, beta)
    for start in range(0, len(x_nc), block_rows):
        stop = min(start + block_rows, len(x_nc))
        block = checkpoint(block_sums, start, stop, x_nc, w_c, beta, use_reentrant=False, preserve_rng_state=False)
        sums, counts = sums + block[0], counts + block[1]
    same_image, same_prototype, different_prototype = (sums / counts.clamp(min=1)).unbind()
    return same_image, same_prototype, different_prototype


def _metric(difference: Tensor, same: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """M by the difference a - b (…, C) and the label (…)."""
    with torch.autocast(difference.device.type, enabled=False):
        logits = difference.abs() @ weight + bias
    return -F.logsigmoid(torch.where(same, logits, -logits))
