"""Crops of RandomResizedCrop whose centre lies in a box, and which of them are mirrored, in plain PyTorch.

    A = H W U(scale),  r = exp U(log ratio),  w = round sqrt(A r),  h = round sqrt(A / r)
    the first of 10 tries with 0 < w <= W and 0 < h <= H
    top = a0 + int((a1 - a0) u),  a0, a1 = clamp(int(H box) - h//2, 0, H - h),  u ~ Beta(alpha, alpha);  left likewise
    after 10 failures RandomResizedCrop's centre crop

Every operation is correctly rounded (float64 products, quotients, square root, round), and no floating-point product is
followed by a sum, so every device gives the same bits. A quotient has two tensors: on CUDA, one by a Python number is a
product with its reciprocal.

Letters: N samples, V views, T tries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproto._random import Stream, quantile, quantile_table, random_bits

TRIES = 10


def sample_crops(
    sample_ids: Tensor,  # (N,) integer
    sizes: Tensor | None,  # (N, 2) int64: height, width; None: size for all
    size: Sequence[int],
    boxes: Tensor | None,  # (N, 4) float: h0, w0, h1, w1; None: box for all
    box: Sequence[float],
    scale: Sequence[float],
    ratio: Sequence[float],
    alpha: float,
    views: int,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:  # (V·N, 4) int32: top, left, height, width; (V·N,) bool
    bits_vnd = random_bits(sample_ids, Stream.CROP, 2 * TRIES + 2, views=views, seed=seed, epoch=epoch)
    device = sample_ids.device
    share_vnt = quantile(bits_vnd[..., :TRIES], quantile_table("uniform", tuple(scale), device))
    aspect_vnt = quantile(bits_vnd[..., TRIES : 2 * TRIES], quantile_table("log_uniform", tuple(ratio), device))
    centre_vn2 = quantile(bits_vnd[..., 2 * TRIES :], quantile_table("beta", (alpha,), device))

    height_n, width_n = _columns(sizes, size, sample_ids, torch.int64)
    area_vnt = (height_n * width_n)[:, None] * share_vnt
    tried_w_vnt = torch.round(torch.sqrt(area_vnt * aspect_vnt)).long()
    tried_h_vnt = torch.round(torch.sqrt(area_vnt / aspect_vnt)).long()
    fits_vnt = (
        (tried_w_vnt > 0) & (tried_w_vnt <= width_n[:, None]) & (tried_h_vnt > 0) & (tried_h_vnt <= height_n[:, None])
    )
    first_vn1 = fits_vnt.to(torch.uint8).argmax(dim=-1, keepdim=True)
    h_vn = tried_h_vnt.gather(-1, first_vn1).squeeze(-1)
    w_vn = tried_w_vnt.gather(-1, first_vn1).squeeze(-1)
    h0_n, w0_n, h1_n, w1_n = (side_n.double() for side_n in _columns(boxes, box, sample_ids, torch.float64))
    top_vn = _start(height_n, h_vn, h0_n, h1_n, centre_vn2[..., 0])
    left_vn = _start(width_n, w_vn, w0_n, w1_n, centre_vn2[..., 1])

    centre_h_n, centre_w_n = _centre_crop(height_n, width_n, *ratio)
    any_vn = fits_vnt.any(dim=-1)
    crops_vn4 = torch.stack(
        [
            torch.where(any_vn, top_vn, (height_n - centre_h_n) // 2),
            torch.where(any_vn, left_vn, (width_n - centre_w_n) // 2),
            torch.where(any_vn, h_vn, centre_h_n),
            torch.where(any_vn, w_vn, centre_w_n),
        ],
        dim=-1,
    )
    flip_vn1 = random_bits(sample_ids, Stream.FLIP, 1, views=views, seed=seed, epoch=epoch) < 1 << 31
    return crops_vn4.flatten(0, 1).int(), flip_vn1.flatten()


def _columns(table: Tensor | None, row: Sequence[float], sample_ids: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """The columns of a table, or of one whose rows are all alike, which copies nothing from the host."""
    if table is not None:
        return table.unbind(1)
    return [torch.full(sample_ids.shape, value, dtype=dtype, device=sample_ids.device) for value in row]


def _start(length: Tensor, crop: Tensor, box0: Tensor, box1: Tensor, draw: Tensor) -> Tensor:
    """First row (or column) of a crop whose centre is drawn between two fractions of the length."""
    # The reach is negative only for a try that fits nowhere, whose position nobody reads.
    reach = length - crop
    low = torch.minimum(((length * box0).long() - crop // 2).clamp(min=0), reach)
    high = torch.minimum(((length * box1).long() - crop // 2).clamp(min=0), reach)
    return low + ((high - low) * draw).long()


def _centre_crop(height: Tensor, width: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Height and width of the largest centred crop whose aspect ratio is inside the bounds."""
    aspect = width.double() / height.double()
    crop_h = torch.round(width.double() / torch.full_like(aspect, low)).long().clamp(min=1)
    crop_w = torch.round(height.double() * high).long().clamp(min=1)
    return torch.where(aspect < low, crop_h, height), torch.where(aspect > high, crop_w, width)
