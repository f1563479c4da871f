"""Colour jitter, grayscale, Gaussian blur and solarisation with one set of parameters per image, in plain PyTorch.

    brightness  clamp(f x)                       gray x = 0.2989 r + 0.587 g + 0.114 b
    contrast    clamp(f x + (1 - f) mean(gray x))
    saturation  clamp(f x + (1 - f) gray x)
    hue         the hue of x turned by f of the circle, its HSV saturation and value kept
    grayscale   gray x in all channels, where asked
    blur        x convolved with exp(-i² / 2σ²) / sum over |i| <= k // 2 along both axes, mirrored at the edges
    solarise    1 - x where x >= t
    normalise   scale_c x + offset_c

The order of the four jitters differs from image to image. All but hue, the dearest, are one blend with other
coefficients, so an image's blends before its hue run first for the whole batch, then hue once, then those after it.

Letters: N images, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@torch.no_grad()
def photometric(
    images: Tensor,  # (N, C, H, W) float, C 1 or 3
    jitter: Tensor | None,  # (N, 4): brightness, contrast, saturation, hue
    order: Tensor | None,  # (N, 4) int64: which of the four comes first, second, ...
    gray: Tensor | None,  # (N,) bool
    sigma: Tensor | None,  # (N,)
    kernel_size: int,
    threshold: Tensor | None,  # (N,)
    scale: Sequence[float],  # (C,)
    offset: Sequence[float],  # (C,)
    out: Tensor,  # (N, C, H, W), written; may be images
) -> None:
    # One copy, in place from here on: at these sizes a new tensor costs more in page faults than in arithmetic.
    changed = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
    if jitter is not None and order is not None:
        _color_jitter(changed, jitter.to(changed.dtype), order)
    if gray is not None:
        # As arithmetic: a selection by mask is several times slower on a CPU.
        changed.lerp_(_luma(changed), _per_image(gray.to(changed.dtype)))
    if sigma is not None:
        changed = _blur(changed, sigma.to(changed.dtype), kernel_size)
    if threshold is not None:
        changed = torch.where(changed >= _per_image(threshold.to(changed.dtype)), 1 - changed, changed)
    # Number by number: nothing is copied from the host.
    for channel in range(images.shape[1]):
        out[:, channel] = changed[:, channel] * scale[channel] + offset[channel]


def _color_jitter(images: Tensor, jitter_n4: Tensor, order_n4: Tensor) -> None:
    hue_place_n = (order_n4 == HUE).to(torch.uint8).argmax(dim=1)
    for place in range(3):
        _blend(images, jitter_n4, order_n4[:, place], hue_place_n > place)
    if images.shape[1] == 3:
        _turn_hue(images, jitter_n4[:, HUE])
    for place in range(1, 4):
        _blend(images, jitter_n4, order_n4[:, place], hue_place_n < place)


def _blend(images: Tensor, jitter_n4: Tensor, which_n: Tensor, applies_n: Tensor) -> None:
    """clamp(f x + (1 - f) target) with each image's own of the three targets: black, its mean gray, its gray."""
    if images.shape[1] == 1:
        applies_n = applies_n & (which_n != SATURATION)
    factor_n = jitter_n4.gather(1, which_n[:, None])[:, 0]
    gray_n1hw = _luma(images)
    mean_n = (which_n == CONTRAST) * gray_n1hw.mean(dim=(1, 2, 3))
    target_n1hw = gray_n1hw.mul_(_per_image(which_n == SATURATION)).add_(_per_image(mean_n))
    images.lerp_(target_n1hw, _per_image((1 - factor_n) * applies_n)).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """A new tensor (N, 1, H, W) of RGB images' gray, with the weights of ITU-R 601 as torchvision rounds them."""
    if images.shape[1] == 1:
        return images.clone()
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _turn_hue(images: Tensor, turn_n: Tensor) -> None:
    """Moves the hue of RGB images by a part of the circle, without a comparison or a selection."""
    low_nhw = images.amin(dim=1)
    chroma_nhw = images.amax(dim=1).sub_(low_nhw)
    spare_nhw = chroma_nhw.clamp(min=torch.finfo(images.dtype).tiny)
    # Each channel's height in [0, 1] above the lowest; a gray pixel's are all 0, and it stays as it is.
    images.sub_(low_nhw[:, None]).div_(spare_nhw[:, None])
    red, green, blue = images.unbind(dim=1)
    # The highest channel's height is exactly 1, every other's floor is 0. Of two highest the first counts.
    hue_nhw = (red - green).add_(4)
    hue_nhw.lerp_((blue - red).add_(2), torch.floor(green, out=spare_nhw))
    hue_nhw.lerp_(green - blue, torch.floor(red, out=spare_nhw))
    # In sixths of the circle, turned, and back in [0, 6).
    hue_nhw.add_(6 * turn_n[:, None, None])
    hue_nhw.sub_(torch.div(hue_nhw, 6, out=spare_nhw).floor_().mul_(6))
    red.copy_(hue_nhw).sub_(3).abs_().sub_(1)
    green.copy_(hue_nhw).sub_(2).abs_().neg_().add_(2)
    blue.copy_(hue_nhw).sub_(4).abs_().neg_().add_(2)
    images.clamp_(0, 1).mul_(chroma_nhw[:, None]).add_(low_nhw[:, None])


def _blur(images: Tensor, sigma_n: Tensor, kernel_size: int) -> Tensor:
    n, channels, height, width = images.shape
    if n == 0:
        return images
    radius = kernel_size // 2
    place = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # Far below every sigma that blurs, so that 0 leaves the image as it is.
    weight_nk = torch.softmax((place / sigma_n.clamp(min=1e-3)[:, None]).square() / -2, dim=1)
    # Each channel of each image is a group with a kernel of its own.
    weight_ck = weight_nk.repeat_interleave(channels, dim=0)
    padded = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    rows = F.conv2d(padded, weight_ck[:, None, :, None], groups=n * channels)
    return F.conv2d(rows, weight_ck[:, None, None, :], groups=n * channels).view(n, channels, height, width)


def _per_image(values_n: Tensor) -> Tensor:
    return values_n[:, None, None, None]
