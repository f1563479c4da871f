"""sample_crops: where to crop, keyed by sample: RandomResizedCrop with its centre in a box, pushed to the box's edge.

See fastproto/reference/sample_crops.py for the formula. Compiled for the CPU (C++) and the GPU (CUDA): the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import (
    INTEGERS,
    MAX_SIDE,
    NUMBERS,
    expect,
    expect_numbers,
    expect_size,
    expect_tensor,
    expect_type,
    reads_data,
)
from fastproto._random import expect_key, quantile_table
from fastproto.ops._dispatch import Op
from fastproto.reference import sample_crops as reference

FULL_BOX = (0.0, 0.0, 1.0, 1.0)
MAX_ALPHA = torch.finfo(torch.float64).max
ORDERED = "0 <= h0 <= h1 <= 1 and 0 <= w0 <= w1 <= 1"


def _cpp(*args: Any) -> tuple[Tensor, Tensor]:
    return _launch(_native.cpp, torch.get_num_threads(), *args)


def _cuda(sample_ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(sample_ids.device):
        return _launch(_native.cuda, torch.cuda.current_stream().cuda_stream, sample_ids, *rest)


def _launch(
    module: Any,
    threads_or_stream: int,
    sample_ids: Tensor,
    sizes: Tensor | None,
    size: list[int],
    boxes: Tensor | None,
    box: list[float],
    scale: list[float],
    ratio: list[float],
    alpha: float,
    *key: int,
) -> tuple[Tensor, Tensor]:
    """Calls a compiled kernel with the op's arguments as csrc/sample_crops/bind.h takes them."""
    crops, flip = _outputs(sample_ids, key[0])
    ids, device = sample_ids.long(), sample_ids.device
    if boxes is not None:
        boxes = (boxes if boxes.dtype == torch.float64 else boxes.float()).contiguous()
    tables = (
        quantile_table("uniform", tuple(scale), device),
        quantile_table("log_uniform", tuple(ratio), device),
        quantile_table("beta", (alpha,), device),
    )
    tensors = (None if sizes is None else sizes.contiguous(), boxes, *tables, crops, flip)
    module.sample_crops(
        (ids.data_ptr(), ids.stride(0), len(ids), *key),
        size,
        box,
        boxes is not None and boxes.dtype == torch.float64,
        ratio,
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        threads_or_stream,
    )
    return crops, flip


# With a schema, so that a compiler takes it as it is: fused otherwise, its bits could change.
_op = Op(
    "sample_crops",
    "(Tensor sample_ids, Tensor? sizes, SymInt[] size, Tensor? boxes, float[] box, float[] scale, float[] ratio, "
    "float alpha, int views, SymInt seed, SymInt epoch) -> (Tensor, Tensor)",
    reference=reference.sample_crops,
    cpp=_cpp,
    cuda=_cuda,
)


def _outputs(sample_ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
    rows, device = views * sample_ids.shape[0], sample_ids.device
    crops = torch.empty((rows, 4), dtype=torch.int32, device=device)
    return crops, torch.empty(rows, dtype=torch.bool, device=device)


@_op.fake
def _fake(sample_ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(sample_ids, rest[-3])


def sample_crops(
    sample_ids: Tensor,  # (N,) integer
    image_size: int | tuple[int, int] | Tensor,  # H = W, (H, W) or (N, 2)
    *,
    boxes: Tensor | tuple[float, float, float, float] | None = None,  # (N, 4)
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    alpha: float = 0.6,
    views: int = 2,
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:  # (V·N, 4)
    """Draws ``views`` crops for every sample, keyed by (seed, epoch, sample id, view).

    A crop's area is uniform in ``scale`` (share of the image), its aspect ratio log-uniform in ``ratio``; its centre
    lies in the sample's box, distributed as Beta(alpha, alpha) along both axes: uniform for ``alpha`` 1, away from the
    middle below. Without boxes and with ``alpha`` 1 this is torchvision's RandomResizedCrop, but for the last row and
    column of places, which the paper's rule leaves out. The same key gives the same bits on every device, and whatever
    batch, worker or rank the sample is in.

    Args:
        sample_ids: (N,) int64 or int32, the samples' places in the data set.
        image_size: (height, width) of all images, or one number for both; or one row of both for each, an integer
            tensor (N, 2).
        boxes: (N, 4) float fractions (h0, w0, h1, w1) of the image, e.g. from ``localize``; one such tuple for all
            samples, as float64, e.g. ``SIMC_BOX``; or None, the whole image.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height, within 1/512 to 512.
        alpha: parameter of the Beta distribution. 0.6 in the paper, 0.1 in the released settings for small images.
        views: crops for each sample.
        seed: key of the whole run.
        epoch: key of the epoch; another one gives other crops.

    Returns:
        (views · N, 4) int32 rows (top, left, height, width); row ``v * N + i`` is view v of sample i.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: an argument has another shape or device, or is out of its range; a box leaves [0, 1] or is inverted.

    Source:
        Peng et al., Crafting Better Contrastive Views for Siamese Representation Learning, arXiv 2202.03278,
        sections 3.2 and 3.3. The key and the numbers from it: Salmon et al., SC 2011 (Philox4x32-10).

    Example:
        >>> import torch
        >>> from fastproto.views import sample_crops
        >>> crops = sample_crops(torch.arange(4), (32, 32), seed=1)
        >>> view0, view1 = crops.chunk(2)
        >>> view0.shape
        torch.Size([4, 4])
        >>> bool((sample_crops(torch.tensor([2]), (32, 32), seed=1) == crops[2::4]).all())
        True
    """
    crops, _ = sample_crops_and_flips(
        sample_ids,
        image_size,
        boxes=boxes,
        scale=scale,
        ratio=ratio,
        alpha=alpha,
        views=views,
        seed=seed,
        epoch=epoch,
    )
    return crops


def sample_crops_and_flips(
    sample_ids: Tensor,  # (N,) integer
    image_size: int | tuple[int, int] | Tensor,  # H = W, (H, W) or (N, 2)
    *,
    boxes: Tensor | tuple[float, float, float, float] | None,  # (N, 4)
    scale: tuple[float, float],
    ratio: tuple[float, float],
    alpha: float,
    views: int,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:  # (V·N, 4), (V·N,) bool
    """The crops of ``sample_crops``, and which of them are mirrored, each with probability 1/2: one launch for both."""
    expect_tensor(sample_ids, "sample_crops", "sample_ids", ("N",), INTEGERS)
    views, seed, epoch = expect_key("sample_crops", views, seed, epoch)
    scale, ratio, alpha = expect_crop_options("sample_crops", scale, ratio, alpha)
    sizes, size = _sizes(image_size, sample_ids)
    box: tuple[float, ...] = FULL_BOX
    if isinstance(boxes, Tensor):
        expect_boxes("sample_crops", boxes, sample_ids.shape[0], sample_ids.device)
        # A tensor that wants a gradient would make the compiler look for one.
        boxes = boxes.detach()
    elif boxes is not None:
        box, boxes = expect_box("sample_crops", boxes), None
    return _op(sample_ids, sizes, size, boxes, box, scale, ratio, alpha, views, seed, epoch)


def expect_crop_options(
    op: str, scale: tuple[float, float], ratio: tuple[float, float], alpha: float
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Scale and ratio as pairs of floats, alpha as one; refuses those from which no crop can be drawn."""
    pairs = []
    for argument, pair, low, high in (("scale", scale, 0.0, 1.0), ("ratio", ratio, 1 / 512, 512.0)):
        bounds = expect_numbers(pair, op, argument, "a pair of numbers")
        ordered = len(bounds) == 2 and 0 < bounds[0] <= bounds[1] and low <= bounds[0] and bounds[1] <= high
        expect(ordered, op, argument, f"(low, high) with 0 < low <= high, both within {low:g} to {high:g}", pair)
        pairs.append((bounds[0], bounds[1]))
    # Shares of the area are drawn in steps of 2^-24.
    expect(pairs[0][1] >= 2.0**-24, op, "scale", "high of at least 2^-24", scale)
    expect_type(alpha, NUMBERS, op, "alpha", "a number")
    # NumPy would round the bound to its own float32; an int may be too large for a float.
    alpha = float(alpha) if isinstance(alpha, np.floating) else alpha
    expect(0 < alpha <= MAX_ALPHA, op, "alpha", "a positive finite number", alpha)
    return pairs[0], pairs[1], float(alpha)


def expect_boxes(op: str, boxes: Tensor, rows: int, device: torch.device) -> None:
    """Refuses what is not ``rows`` boxes with 0 <= h0 <= h1 <= 1 and 0 <= w0 <= w1 <= 1 on a device."""
    expect_tensor(boxes, op, "boxes", (rows, 4), device=device)
    if rows and reads_data(boxes):
        least, most = boxes.aminmax()
        inverted = boxes[:, :2] > boxes[:, 2:]
        if not (least >= 0 and most <= 1) or inverted.any():
            good = (boxes >= 0).all(dim=1) & (boxes <= 1).all(dim=1) & ~inverted.any(dim=1)
            expect(False, op, "boxes", ORDERED, f"{boxes[good.int().argmin()].tolist()}")


def expect_box(op: str, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A box that all samples share."""
    expect_type(box, (tuple, list), op, "boxes", "a tensor (N, 4), four numbers or None")
    sides = expect_numbers(box, op, "boxes", "four numbers (h0, w0, h1, w1)")
    expect(len(sides) == 4, op, "boxes", "four numbers (h0, w0, h1, w1)", box)
    h0, w0, h1, w1 = sides
    expect(0 <= h0 <= h1 <= 1 and 0 <= w0 <= w1 <= 1, op, "boxes", ORDERED, f"{list(sides)}")
    return h0, w0, h1, w1


def _sizes(image_size: int | tuple[int, int] | Tensor, sample_ids: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """Height and width of every sample's image as an int64 tensor (N, 2), or None and one pair for all."""
    rows, device = sample_ids.shape[0], sample_ids.device
    if isinstance(image_size, Tensor):
        expect_tensor(image_size, "sample_crops", "image_size", (rows, 2), INTEGERS, device)
        if rows and reads_data(image_size):
            least, most = int(image_size.min()), int(image_size.max())
            expect(least > 0, "sample_crops", "image_size", "sizes of at least 1", least)
            expect(most <= MAX_SIDE, "sample_crops", "image_size", f"sides below {MAX_SIDE + 1}", most)
        return image_size.long(), (0, 0)
    expected = "a positive int, two (H, W) or an integer tensor (N, 2)"
    return None, expect_size(image_size, "sample_crops", "image_size", expected)
