"""crop_resize: crops at random places, normalised, against torchvision's resized_crop one image at a time, and kornia's
of a batch, which does not antialias.

Bytes that must move: the pixels of the crops read once (1 B each), the output written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Suite, Work, peer
from torchvision.transforms.v2 import functional as tv

import fastproto
from fastproto.ops.crop_resize import crop_resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_crops(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """RandomResizedCrop's areas, uniform in (0.2, 1), at uniform places; square."""
    generator = torch.Generator().manual_seed(seed)
    share, u, v = torch.rand(3, count, generator=generator)
    size = (side * (0.2 + 0.8 * share).sqrt()).int().clamp(1, side)
    return torch.stack([((side - size + 1) * u).int(), ((side - size + 1) * v).int(), size, size], 1).int()


def torchvision_per_image(images: torch.Tensor, crops: list[list[int]], size: int, dtype: torch.dtype) -> torch.Tensor:
    out = []
    for r, (top, left, height, width) in enumerate(crops):
        view = tv.resized_crop(images[r % len(images)], top, left, height, width, [size, size], antialias=True)
        out.append(tv.normalize(tv.to_dtype(view, dtype, scale=True), list(MEAN), list(STD)))
    return torch.stack(out)


def kornia_batch(
    images: torch.Tensor, crops: torch.Tensor, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Callable[[], object]]:
    """Its crop_and_resize of all crops at once, where it is there; R / N crops of every image."""
    crop_and_resize = peer("kornia.geometry.transform", "crop_and_resize")
    if crop_and_resize is None:
        return {}
    top, left, height, width = crops.to(images.device, torch.float32).unbind(1)
    low, high = (left, top), (left + width - 1, top + height - 1)
    corners = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
    boxes = torch.stack([torch.stack(corner, 1) for corner in corners], 1).to(dtype)
    mean, std = (torch.tensor(of, dtype=dtype, device=images.device).view(3, 1, 1) for of in (MEAN, STD))

    def theirs() -> torch.Tensor:
        pixels = images.to(dtype).div_(255).repeat(len(crops) // len(images), 1, 1, 1)
        return ((crop_and_resize(pixels, boxes, (size, size)) - mean) / std).contiguous(memory_format=layout)

    return {"kornia": theirs}


def work(name: str, images: torch.Tensor, crops: torch.Tensor, size: int, dtype: torch.dtype) -> Work:
    read = 3 * int((crops[:, 2] * crops[:, 3]).sum())
    written = len(crops) * 3 * size * size * dtype.itemsize
    shape = f"{len(images)} x 3 x {images.shape[2]}^2 -> {len(crops)} x 3 x {size}^2"
    return Work(name, shape, str(dtype).removeprefix("torch."), images.device.type, bytes=read + written)


@pytest.mark.parametrize(("name", "count", "side", "size"), [("imagenet", 64, 256, 224), ("cifar", 512, 32, 32)])
def test_cpu(suite: Suite, benchmark, name: str, count: int, side: int, size: int) -> None:
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    crops = random_crops(count, side)
    listed, out = crops.tolist(), torch.empty(count, 3, size, size)

    def ours_reused() -> torch.Tensor:
        return crop_resize(images, crops, size, mean=MEAN, std=STD, out=out)

    def reference() -> torch.Tensor:
        with fastproto.backend("reference"):
            return crop_resize(images, crops, size, mean=MEAN, std=STD)

    methods = {
        "fastproto": lambda: crop_resize(images, crops, size, mean=MEAN, std=STD),
        "fastproto, out= reused": ours_reused,
        "torchvision per image": lambda: torchvision_per_image(images, listed, size, torch.float32),
        "fastproto reference": reference,
        **kornia_batch(images, crops, size, torch.float32, torch.contiguous_format),
    }
    suite.compare(work(name, images, crops, size, torch.float32), methods)
    benchmark.pedantic(ours_reused, rounds=5, warmup_rounds=1)


@pytest.mark.gpu
def test_gpu(suite: Suite, benchmark) -> None:
    """Two 224² float16 channels_last views of 512 images."""
    images = torch.randint(256, (512, 3, 256, 256), dtype=torch.uint8, device="cuda")
    crops = random_crops(1024, 256)
    on_gpu, listed = crops.cuda(), crops.tolist()
    options = {"mean": MEAN, "std": STD, "dtype": torch.float16, "memory_format": torch.channels_last}

    def ours() -> torch.Tensor:
        return crop_resize(images, on_gpu, 224, **options)

    methods = {
        "fastproto": ours,
        "torchvision per image": lambda: torchvision_per_image(images, listed, 224, torch.float16),
        **kornia_batch(images, on_gpu, 224, torch.float16, torch.channels_last),
    }
    suite.compare(work("two views", images, crops, 224, torch.float16), methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    assert math.isfinite(float(ours().sum(dtype=torch.float32)))
