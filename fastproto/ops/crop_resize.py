"""crop_resize: many crops of many images, resized, flipped, normalised and cast in one pass.

    out[r, c] = (resize(image[index_r][c] cut to crop_r) / 255 − mean_c) / std_c

Nothing between the uint8 pixels and the final tensor is kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import FLOATS, expect, expect_numbers, expect_size, expect_tensor, expect_type, reads_data
from fastproto.ops._dispatch import DTYPE_CODES, Op, integers
from fastproto.reference import crop_resize as reference

LEAST_STD = 1e-36  # a quotient by less may be no float32
FORMATS = (torch.contiguous_format, torch.channels_last)
MAX_CHANNELS = 4  # as in csrc/crop_resize/crop_resize.h


def _cpp(images: list[Tensor], *rest: Any) -> None:
    if rest[-1].dtype == torch.float64:
        reference.crop_resize(images, *rest)
        return
    assert _native.cpp is not None
    table = _table(images)
    _native.cpp.crop_resize(*_pointers(table, images, *rest), torch.get_num_threads())


def _cuda(images: list[Tensor], *rest: Any) -> None:
    assert _native.cuda is not None
    # The kernel goes from row to row by an int32.
    images = [image if image.stride(2) < 2**31 else image.contiguous() for image in images]
    table = _table(images)
    with torch.cuda.device(images[0].device):
        _native.cuda.crop_resize(*_pointers(table, images, *rest), torch.cuda.current_stream().cuda_stream)


def _table(images: list[Tensor]) -> Tensor | None:
    """Address, height, width and strides of each image (N, 6). A batch needs none: its images stand at one distance."""
    if len(images) == 1:
        return None
    rows = [[image.data_ptr(), *image.shape[2:], *image.stride()[1:]] for image in images]
    return integers(rows, images[0].device)


def _pointers(
    table: Tensor | None,
    images: list[Tensor],
    crops: Tensor,
    index: Tensor | None,
    flip: Tensor | None,
    scale: list[float],
    offset: list[float],
    antialias: bool,
    out: Tensor,
) -> tuple[object, ...]:
    """The op's arguments as csrc/crop_resize/bind.h takes them."""
    first = images[0]
    return (
        (first.data_ptr(), *first.shape[2:], *first.stride()[1:]),
        first.stride(0),
        0 if table is None else table.data_ptr(),
        len(first) if table is None else len(images),
        crops.data_ptr(),
        0 if index is None else index.data_ptr(),
        0 if flip is None else flip.data_ptr(),
        tuple(out.shape),
        scale,
        offset,
        antialias,
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        out.stride(),
    )


_op = Op(
    "crop_resize",
    "(Tensor[] images, Tensor crops, Tensor? index, Tensor? flip, float[] scale, float[] offset, bool antialias, "
    "Tensor(a!) out) -> ()",
    reference=reference.crop_resize,
    cpp=_cpp,
    cuda=_cuda,
)


@_op.fake
def _fake(*args: Any) -> None:
    """Writes to out, returns nothing."""


def crop_resize(
    images: Tensor | Sequence[Tensor],
    crops: Tensor,
    size: int | tuple[int, int],
    *,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    antialias: bool = True,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """Cuts crops out of images, resizes them bilinearly as torchvision's ``resized_crop`` does, and normalises them.

    ``out[r, c] = (resize(image[index_r][c] cut to crop_r) / 255 − mean_c) / std_c``, mirrored where ``flip[r]``. Places
    are float32's, which moves a value by up to 0.01 level where a side is 500 pixels and 0.25 where it is 10 000;
    torchvision rounds to 8 bits, so up to there the two lie within one level of each other. There is no gradient: the
    pixels are integers.

    Args:
        images: uint8, (N, C, H, W) or (N, H, W, C) with C ≤ 4, or a list of (C, H, W) of any sizes. A 4-D shape that
            can be read both ways is (N, C, H, W).
        crops: (R, 4) int32, each (top, left, height, width) in pixels, inside its image.
        size: output (h, w), or one number for both.
        index: (R,) int64, the image of each crop. Without it crop r is of image r mod N, so the views of
            :func:`fastproto.views.sample_crops` are ``out.chunk(views)``.
        flip: (R,) bool, which crops to mirror left to right.
        mean, std: C numbers each, in units of [0, 1]. Without them the output is in [0, 1].
        dtype: of the output: float32, float16, bfloat16 or float64. The last on a CPU is for comparisons: the reference
            computes it, which holds all images of a list at the size of the largest.
        antialias: filter over all pixels an output covers when making smaller, as torchvision does by default.
        memory_format: of the output: ``torch.contiguous_format`` or ``torch.channels_last``.
        out: (R, C, h, w) to write into, of ``dtype``, any strides, no two numbers in one place.

    Returns:
        (R, C, h, w) of ``dtype`` on the device of ``images``; ``out`` where it was given.

    Raises:
        TypeError: images that are not uint8 or crops that are not int32.
        ValueError: wrong rank, channels, size, device or out, std with a zero, a crop that is empty or leaves its
            image, an index outside the images (the last three read data: see :func:`fastproto.set_debug`).

    Source: ContrastiveCrop, arXiv 2202.03278, and torchvision.transforms.v2.functional.resized_crop.

    Example:
        >>> images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> crops = torch.tensor([[0, 0, 32, 32], [4, 8, 16, 20]], dtype=torch.int32)
        >>> crop_resize(images, crops, 24).shape
        torch.Size([2, 3, 24, 24])
    """
    batches = _image_batches(images)
    device, channels = batches[0].device, batches[0].shape[1]
    count = batches[0].shape[0] if len(batches) == 1 else len(batches)
    height, width = expect_size(size, "crop_resize", "size")
    expect_tensor(crops, "crop_resize", "crops", ("R", 4), (torch.int32,), device)
    expect(dtype in FLOATS, "crop_resize", "dtype", "a floating point dtype", str(dtype))
    expect_layout("crop_resize", memory_format)
    expect_type(antialias, bool, "crop_resize", "antialias", "a bool")
    expect(count > 0 or crops.shape[0] == 0, "crop_resize", "images", "at least one where there are crops", "none")
    if index is not None:
        expect_tensor(index, "crop_resize", "index", (crops.shape[0],), (torch.int64,), device)
        index = index.contiguous()
    if flip is not None:
        expect_tensor(flip, "crop_resize", "flip", (crops.shape[0],), (torch.bool,), device)
        flip = flip.contiguous()
    scale, offset = normalisation("crop_resize", mean, std, channels, white=255.0)
    shape = (crops.shape[0], channels, height, width)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    else:
        expect_tensor(out, "crop_resize", "out", shape, (dtype,), device)
        expect_writable("crop_resize", out)
    if reads_data(crops):
        _check_crops(batches, crops, index)
    if crops.shape[0]:
        _op(batches, crops.contiguous(), index, flip, scale, offset, antialias, out)
    return out


def _image_batches(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The images as channels-first views: one batch (N, C, H, W), or one (1, C, H_n, W_n) for each of a list."""
    if isinstance(images, Tensor):
        expect_tensor(images, "crop_resize", "images", ("N", "C", "H", "W"), (torch.uint8,))
        if images.shape[1] > MAX_CHANNELS and images.shape[3] <= MAX_CHANNELS:
            images = images.permute(0, 3, 1, 2)
        batches = [images]
    else:
        expect_type(images, (list, tuple), "crop_resize", "images", "a uint8 tensor or a list of them")
        expect(len(images) > 0, "crop_resize", "images", "at least one image", "an empty list")
        first = images[0]
        expect_tensor(first, "crop_resize", "images[0]", ("C", "H", "W"), (torch.uint8,))
        for n, image in enumerate(images):
            expect_tensor(image, "crop_resize", f"images[{n}]", (len(first), "H", "W"), (torch.uint8,), first.device)
        batches = [image[None] for image in images]
    channels = batches[0].shape[1]
    wanted = f"1 to {MAX_CHANNELS} channels" + ("" if isinstance(images, Tensor) else " in front of H and W")
    got = images if isinstance(images, Tensor) else images[0]
    expect(0 < channels <= MAX_CHANNELS, "crop_resize", "images", wanted, got)
    return batches


def expect_writable(op: str, out: Tensor) -> None:
    """Refuses a tensor to write into of which several numbers stand in one place, or that has a gradient."""
    expect(not out.requires_grad, op, "out", "a tensor without a gradient", "one that requires it")
    spread = all(stride > 0 or size < 2 for size, stride in zip(out.shape, out.stride(), strict=True))
    expect(spread, op, "out", "a place for every number", f"strides {tuple(out.stride())} of shape {tuple(out.shape)}")


def normalisation(
    op: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, white: float
) -> tuple[list[float], list[float]]:
    """Scale and offset that turn values from 0 to ``white`` into (value / white − mean) / std."""
    wanted = f"{channels} numbers, one per channel"
    means = (0.0,) * channels if mean is None else expect_mean(mean, op, wanted)
    stds = (1.0,) * channels if std is None else expect_std(std, op, wanted)
    expect(len(means) == channels, op, "mean", wanted, mean)
    expect(len(stds) == channels, op, "std", wanted, std)
    expect(min(stds) >= LEAST_STD, op, "std", "numbers of at least 1e-36", std)
    return [1.0 / (white * value) for value in stds], [-m / s for m, s in zip(means, stds, strict=True)]


def expect_mean(mean: Sequence[float], op: str, expected: str) -> tuple[float, ...]:
    """The numbers of a mean."""
    numbers = expect_numbers(mean, op, "mean", expected)
    expect(all(math.isfinite(number) for number in numbers), op, "mean", "finite numbers", mean)
    return numbers


def expect_std(std: Sequence[float], op: str, expected: str) -> tuple[float, ...]:
    """The numbers of a standard deviation."""
    numbers = expect_numbers(std, op, "std", expected)
    expect(all(0 < number < math.inf for number in numbers), op, "std", "positive finite numbers", std)
    return numbers


def expect_layout(op: str, memory_format: torch.memory_format) -> None:
    """Refuses a layout that images do not come in."""
    formats = " or ".join(map(str, FORMATS))
    known = isinstance(memory_format, torch.memory_format) and memory_format in FORMATS
    expect(known, op, "memory_format", formats, str(memory_format))


def _check_crops(batches: list[Tensor], crops: Tensor, index: Tensor | None) -> None:
    """Refuses crops that are empty or leave their image: reads data."""
    if not len(crops):
        return
    count = len(batches[0]) if len(batches) == 1 else len(batches)
    if index is None:
        index = torch.arange(len(crops), device=crops.device) % count
    low, high = int(index.min()), int(index.max())
    expect(low >= 0 and high < count, "crop_resize", "index", f"numbers in [0, {count})", f"{low} … {high}")
    sizes = torch.tensor([batch.shape[2:] for batch in batches], device=crops.device)
    sizes = sizes.expand(count, 2)[index]
    start, side = crops[:, :2].long(), crops[:, 2:].long()
    good = ((start >= 0) & (side > 0) & (start + side <= sizes)).all(1)
    if not bool(good.all()):
        row = int((~good).int().argmax())
        image = f"its image of {tuple(sizes[row].tolist())}"
        expect(False, "crop_resize", f"crops[{row}]", f"not empty and inside {image}", str(tuple(crops[row].tolist())))
