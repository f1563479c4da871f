"""localize: the box of an image where an encoder's feature map is warm.

See fastproto/reference/localize.py for the formula. Compiled for the CPU (C++) and the GPU (CUDA); on a GPU the
reference takes maps that are too large for the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import NUMBERS, expect, expect_size, expect_tensor, expect_type
from fastproto.ops._dispatch import DTYPE_CODES, Op
from fastproto.reference import localize as reference

# Places of a map whose channel sums fill the 48 KiB of a block of the CUDA kernel, but for a few numbers.
MAX_CUDA_PLACES = 6000


def _cpp(*args: Any) -> Tensor:
    return _launch(_native.cpp, torch.get_num_threads(), *args)


def _cuda(feature_map: Tensor, *rest: Any) -> Tensor:
    if feature_map.shape[2] * feature_map.shape[3] > MAX_CUDA_PLACES:
        return reference.localize(feature_map, *rest)
    with torch.cuda.device(feature_map.device):
        return _launch(_native.cuda, torch.cuda.current_stream().cuda_stream, feature_map, *rest)


def _launch(
    module: Any, threads_or_stream: int, feature_map: Tensor, threshold: float, height: int, width: int
) -> Tensor:
    """Calls a compiled kernel with the op's arguments as csrc/localize/bind.h takes them."""
    boxes = _fake(feature_map, threshold, height, width)
    module.localize(
        feature_map.data_ptr(),
        DTYPE_CODES[feature_map.dtype],
        feature_map.shape,
        feature_map.stride(),
        threshold,
        (height, width),
        boxes.data_ptr(),
        threads_or_stream,
    )
    return boxes


_op = Op(
    "localize",
    "(Tensor feature_map, float threshold, SymInt height, SymInt width) -> Tensor",
    reference=reference.localize,
    cpp=_cpp,
    cuda=_cuda,
)


@_op.fake
def _fake(feature_map: Tensor, threshold: float, height: int, width: int) -> Tensor:
    return torch.empty((feature_map.shape[0], 4), dtype=torch.float32, device=feature_map.device)


def localize(
    feature_map: Tensor,  # (N, C, h, w) float
    threshold: float = 0.1,
    image_size: int | tuple[int, int] | None = None,
) -> Tensor:  # (N, 4)
    """Boxes around the part of each image where the channel sum of its feature map is high.

    The sum is scaled to [0, 1] per image and resized bilinearly to the image; the box is the first and last row and
    column with a value above ``threshold``, divided by the image's size. The last row counts as itself: a box that
    reaches the image's lower edge ends at (H - 1) / H. A constant map, or one with NaN, gives the whole image,
    (0, 0, 1, 1). No gradient flows into the map. The kernels compute in float64, the reference in float32 for float32
    maps: a value within a few float32 roundings of the threshold can lie on either side of it.

    Args:
        feature_map: (N, C, h, w), float32, float64, float16 or bfloat16 (summed in float32 at least): the last
            convolutional stage of an encoder in eval mode, on images without augmentation.
        threshold: in [0, 1).
        image_size: (height, width) of the images, or one number for both, at which the edges are found. None: the map's
            own size, which saves the resizing; the edges are then places of the map, coarser and without the blur of
            the resizing.

    Returns:
        (N, 4) float32 fractions (h0, w0, h1, w1), for ``sample_crops`` and ``BoxBank``.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: the map has another rank or an empty one of C, h, w; threshold or image_size out of range.

    Source:
        Peng et al., Crafting Better Contrastive Views for Siamese Representation Learning, arXiv 2202.03278,
        section 3.2; the edges as the authors' code takes them.

    Example:
        >>> import torch
        >>> from fastproto.views import localize
        >>> feature_map = torch.zeros(1, 8, 4, 4)
        >>> feature_map[:, :, 1:3, 2] = 1.0
        >>> localize(feature_map)
        tensor([[0.2500, 0.5000, 0.5000, 0.5000]])
        >>> localize(feature_map, image_size=(32, 32))
        tensor([[0.1562, 0.4062, 0.8125, 0.8125]])
    """
    expect_tensor(feature_map, "localize", "feature_map", ("N", "C", "h", "w"))
    expect(min(feature_map.shape[1:]) > 0, "localize", "feature_map", "C, h, w of at least 1", feature_map)
    expect_type(threshold, NUMBERS, "localize", "threshold", "a number")
    expect(0 <= threshold < 1, "localize", "threshold", "a number in [0, 1)", threshold)
    if image_size is None:
        image_size = (feature_map.shape[2], feature_map.shape[3])
    height, width = expect_size(image_size, "localize", "image_size", "a positive int, two (H, W) or None")
    # A map that wants a gradient would make the compiler look for one.
    return _op(feature_map.detach(), float(threshold), height, width)
