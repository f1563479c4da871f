"""sample_crops: where to crop, keyed by sample: RandomResizedCrop with its centre in a box, pushed to the box's edge.

See fastproto/reference/sample_crops.py for the formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastproto._check import INTEGERS, expect, expect_tensor, expect_type, reads_data
from fastproto._random import expect_key
from fastproto.ops._dispatch import Op
from fastproto.reference import sample_crops as reference

FULL_BOX = (0.0, 0.0, 1.0, 1.0)

# With a schema, so that a compiler takes it as it is: fused otherwise, its bits could change.
_op = Op(
    "sample_crops",
    "(Tensor sample_ids, Tensor sizes, Tensor boxes, float[] scale, float[] ratio, float alpha, int views, int seed, "
    "int epoch) -> Tensor",
    reference=reference.sample_crops,
)


@_op.fake
def _fake(sample_ids: Tensor, sizes: Tensor, boxes: Tensor, *options: Any) -> Tensor:
    views = options[3]
    return torch.empty((views * sample_ids.shape[0], 4), dtype=torch.int32, device=sample_ids.device)


def sample_crops(
    sample_ids: Tensor,  # (N,) integer
    image_size: tuple[int, int] | Tensor,  # (H, W) or (N, 2)
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
        image_size: (height, width) of all images, or one row of both for each, an integer tensor (N, 2).
        boxes: (N, 4) float fractions (h0, w0, h1, w1) of the image, e.g. from ``localize``; one such tuple for all
            samples, e.g. ``SIMC_BOX``; or None, the whole image.
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
    expect_tensor(sample_ids, "sample_crops", "sample_ids", ("N",), INTEGERS)
    expect_key("sample_crops", views, seed, epoch)
    expect_crop_options("sample_crops", scale, ratio, alpha)
    return _op(
        sample_ids,
        _sizes(image_size, sample_ids),
        box_rows("sample_crops", boxes, sample_ids),
        scale,
        ratio,
        alpha,
        views,
        seed,
        epoch,
    )


def expect_crop_options(op: str, scale: tuple[float, float], ratio: tuple[float, float], alpha: float) -> None:
    """Refuses a scale, ratio or alpha from which no crop can be drawn."""
    for argument, pair, low, high in (("scale", scale, 0.0, 1.0), ("ratio", ratio, 1 / 512, 512.0)):
        expect_type(pair, (tuple, list), op, argument, "a pair of numbers")
        ordered = len(pair) == 2 and 0 < pair[0] <= pair[1] and low <= pair[0] and pair[1] <= high
        expect(ordered, op, argument, f"(low, high) with 0 < low <= high, both within {low:g} to {high:g}", pair)
    expect_type(alpha, (int, float), op, "alpha", "a number")
    expect(0 < alpha < math.inf, op, "alpha", "a positive finite number", alpha)


def expect_boxes(op: str, boxes: Tensor, rows: int, device: torch.device) -> None:
    """Refuses what is not ``rows`` boxes with 0 <= h0 <= h1 <= 1 and 0 <= w0 <= w1 <= 1 on a device."""
    expect_tensor(boxes, op, "boxes", (rows, 4), device=device)
    if rows and reads_data(boxes):
        low, high = boxes[:, :2], boxes[:, 2:]
        good = ((low >= 0) & (low <= high) & (high <= 1)).all(dim=1)
        first_bad = boxes[good.int().argmin()].tolist()
        expect(bool(good.all()), op, "boxes", "0 <= h0 <= h1 <= 1 and 0 <= w0 <= w1 <= 1", f"{first_bad}")


def box_rows(op: str, boxes: Tensor | tuple[float, float, float, float] | None, sample_ids: Tensor) -> Tensor:
    """One box (h0, w0, h1, w1) per sample, whatever way they were given."""
    if not isinstance(boxes, Tensor):
        box = FULL_BOX if boxes is None else boxes
        expect_type(box, (tuple, list), op, "boxes", "a tensor (N, 4), four numbers or None")
        expect(len(box) == 4, op, "boxes", "four numbers (h0, w0, h1, w1)", box)
        # Column by column, so that nothing is copied from the host.
        rows = sample_ids.shape[0]
        columns = [torch.full((rows,), float(side), dtype=torch.float32, device=sample_ids.device) for side in box]
        boxes = torch.stack(columns, dim=1)
    expect_boxes(op, boxes, sample_ids.shape[0], sample_ids.device)
    return boxes


def _sizes(image_size: tuple[int, int] | Tensor, sample_ids: Tensor) -> Tensor:
    """Height and width of every sample's image as an int64 tensor (N, 2)."""
    rows, device = sample_ids.shape[0], sample_ids.device
    if isinstance(image_size, Tensor):
        expect_tensor(image_size, "sample_crops", "image_size", (rows, 2), INTEGERS, device)
        if rows and reads_data(image_size):
            least = int(image_size.min())
            expect(least > 0, "sample_crops", "image_size", "sizes of at least 1", least)
        return image_size.long()
    expect_type(image_size, (tuple, list), "sample_crops", "image_size", "(H, W) or an integer tensor (N, 2)")
    good = len(image_size) == 2 and all(isinstance(size, int) and size > 0 for size in image_size)
    expect(good, "sample_crops", "image_size", "two positive ints (H, W)", image_size)
    return torch.stack([torch.full((rows,), size, dtype=torch.int64, device=device) for size in image_size], dim=1)
