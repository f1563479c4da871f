"""crop_resize in plain PyTorch: the resize as two matrix products with dense tap matrices.

    out[r, c] = scale_c · Wy[r] · image[index_r][c] · Wx[r]ᵀ + offset_c

Wy (R, h, H) and Wx (R, w, W) hold the triangle filter of Pillow and torchvision, zero outside the crop.
R crops, N images, C channels, H × W the image, h × w the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CROPS_AT_ONCE = 128  # bounds the float copy of the images: 128 · 3 · 256² · 4 B = 100 MB


def crop_resize(
    images: list[Tensor],  # one (N, C, H, W) uint8, or N of (1, C, H_n, W_n)
    crops: Tensor,  # (R, 4) int32: top, left, height, width
    index: Tensor | None,  # (R,) int64 image of each crop; None: r mod N
    flip: Tensor | None,  # (R,) bool
    scale: list[float],  # (C,)
    offset: list[float],  # (C,)
    antialias: bool,
    out: Tensor,  # (R, C, h, w), written
) -> None:
    batch_nchw = _padded(images)
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    scale_c11 = torch.tensor(scale, dtype=dtype, device=out.device).view(-1, 1, 1)
    offset_c11 = torch.tensor(offset, dtype=dtype, device=out.device).view(-1, 1, 1)
    if index is None:
        index = torch.arange(len(crops), device=crops.device) % max(len(batch_nchw), 1)

    for rows in torch.arange(len(crops), device=crops.device).split(CROPS_AT_ONCE):
        top, left, height, width = crops[rows].to(dtype).unbind(1)
        taps_rhH = taps(top, height, out.shape[2], batch_nchw.shape[2], antialias)
        taps_rwW = taps(left, width, out.shape[3], batch_nchw.shape[3], antialias)
        if flip is not None:
            taps_rwW = torch.where(flip[rows, None, None], taps_rwW.flip(1), taps_rwW)
        pixels_rcHW = batch_nchw[index[rows]].to(dtype)
        resized_rchw = taps_rhH[:, None] @ pixels_rcHW @ taps_rwW[:, None].mT
        out[rows] = (resized_rchw * scale_c11 + offset_c11).to(out.dtype)


def taps(start: Tensor, side: Tensor, out_side: int, image_side: int, antialias: bool) -> Tensor:
    """Weights (R, out_side, image_side) of the pixels of crops [start, start + side) in each output position."""
    positions_o = torch.arange(out_side, dtype=side.dtype, device=side.device) + 0.5
    pixels_p = torch.arange(image_side, dtype=side.dtype, device=side.device) + 0.5
    ratio_r = side / out_side
    support_r = ratio_r.clamp(min=1.0) if antialias else torch.ones_like(ratio_r)
    centres_ro = positions_o * ratio_r[:, None]
    pixels_rp = pixels_p - start[:, None]
    distance_rop = (pixels_rp[:, None, :] - centres_ro[:, :, None]).abs() / support_r[:, None, None]
    inside_rp = (pixels_rp > 0) & (pixels_rp < side[:, None])
    weights_rop = (1.0 - distance_rop).clamp(min=0.0) * inside_rp[:, None, :]
    return weights_rop / weights_rop.sum(2, keepdim=True)


def _padded(images: list[Tensor]) -> Tensor:
    """One batch of all images; smaller ones get zeros below and to the right, where no crop reaches."""
    if len(images) == 1:
        return images[0]
    height, width = max(image.shape[2] for image in images), max(image.shape[3] for image in images)
    return torch.cat([F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2])) for image in images])
