"""Two views of each image with SimCLR's augmentation: ContrastiveCrop on a batch against torchvision's transforms v2,
which take one image at a time in two workers of a DataLoader. Then its parts: the draws, the boxes, localisation.

Bytes that must move: the uint8 images read once, both views written once.
"""

from __future__ import annotations

import math

import pytest
import torch
from harness import Suite, Work
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import fastproto
from fastproto.ops.sample_crops import sample_crops_and_flips
from fastproto.views import ContrastiveCrop, crop_resize, localize, sample_photometric

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TwoViews(Dataset):
    """What torchvision's users write: the transform twice for every image."""

    def __init__(self, images: torch.Tensor, size: int, blurs: bool) -> None:
        self.images = images
        blur = [v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5)] if blurs else []
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                *blur,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[i]), self.transform(self.images[i])


def work(name: str, images: torch.Tensor, size: int) -> Work:
    count, channels, side, _ = images.shape
    shape = f"{count} x {channels} x {side}^2 -> 2 x {count} x {channels} x {size}^2"
    written = 2 * count * channels * size * size * 4
    return Work(name, shape, "float32", images.device.type, bytes=images.nbytes + written)


@pytest.mark.parametrize(
    ("name", "count", "side", "size"), [("simclr cifar", 512, 32, 32), ("simclr imagenet", 64, 256, 224)]
)
def test_cpu(suite: Suite, benchmark, name: str, count: int, side: int, size: int) -> None:
    images, ids = torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.arange(count)
    crop = ContrastiveCrop(size, mean=MEAN, std=STD)
    # One batch for each worker, which stays from epoch to epoch.
    dataset = TwoViews(images, size, blurs=size > 64)
    loader = DataLoader(dataset, batch_size=count // 2, num_workers=2, persistent_workers=True)

    def ours() -> tuple[torch.Tensor, ...]:
        return crop(images, ids)

    def reference() -> tuple[torch.Tensor, ...]:
        with fastproto.backend("reference"):
            return crop(images, ids)

    methods = {
        "fastproto": ours,
        "torchvision, 2 workers": lambda: list(loader),
        "fastproto reference": reference,
    }
    suite.compare(work(name, images, size), methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


def draws(ids: torch.Tensor, side: int, blurs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All random numbers of two views."""
    crops, flip = sample_crops_and_flips(
        ids, (side, side), boxes=None, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), alpha=0.6, views=2, seed=0, epoch=0
    )
    sample_photometric(ids, blur_p=0.5 if blurs else 0.0)
    return crops, flip


@pytest.mark.parametrize(
    ("name", "count", "side", "size"),
    [("draws cifar", 512, 32, 32), ("draws cifar", 4096, 32, 32), ("draws imagenet", 64, 256, 224)],
)
def test_draws_beside_crop_resize(suite: Suite, benchmark, name: str, count: int, side: int, size: int) -> None:
    images, ids = torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.arange(count)
    crops, flip = draws(ids, side, blurs=False)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return draws(ids, side, blurs=size > 64)

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        with fastproto.backend("reference"):
            return ours()

    methods = {
        "fastproto": ours,
        "PyTorch": reference,
        "fastproto, crop_resize of the two views": lambda: crop_resize(images, crops, size, flip=flip),
    }
    # An id read, a view's crop, flip and five parameters written.
    drawing = Work(name, f"{count} samples, 2 views", "int32", "cpu", bytes=count * 8 + 2 * count * 74)
    suite.compare(drawing, methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(
    ("name", "count", "side", "size"), [("boxes cifar", 512, 32, 32), ("boxes imagenet", 64, 256, 224)]
)
def test_boxes_beside_whole_images(suite: Suite, benchmark, name: str, count: int, side: int, size: int) -> None:
    images, ids = torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.arange(count)
    boxes = torch.rand(count, 2, 2).sort(dim=1).values.flatten(1)
    avoids, uniform = (ContrastiveCrop(size, mean=MEAN, std=STD, alpha=alpha) for alpha in (0.6, 1))

    def ours() -> tuple[torch.Tensor, ...]:
        return avoids(images, ids, boxes)

    methods = {"fastproto": ours, "fastproto, alpha 1, no boxes": lambda: uniform(images, ids)}
    suite.compare(work(name, images, size), methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("shape", "side"), [((256, 512, 7, 7), 224), ((512, 512, 4, 4), 32)])
def test_localize(suite: Suite, benchmark, shape: tuple[int, ...], side: int) -> None:
    feature_map = torch.randn(shape).relu()

    def ours() -> torch.Tensor:
        return localize(feature_map, 0.1, (side, side))

    def reference() -> torch.Tensor:
        with fastproto.backend("reference"):
            return ours()

    sizes = " x ".join(map(str, shape))
    localizing = Work("localize", f"{sizes} -> {side}^2", "float32", "cpu", bytes=feature_map.nbytes)
    suite.compare(localizing, {"fastproto": ours, "PyTorch": reference})
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "count", "side", "size"),
    [("simclr cifar", 512, 32, 32), ("simclr cifar", 4096, 32, 32), ("simclr imagenet", 512, 256, 224)],
)
def test_gpu(suite: Suite, benchmark, name: str, count: int, side: int, size: int) -> None:
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device="cuda")
    ids = torch.arange(count, device="cuda")
    crop = ContrastiveCrop(size, mean=MEAN, std=STD)

    def ours() -> tuple[torch.Tensor, ...]:
        return crop(images, ids)

    def reference() -> tuple[torch.Tensor, ...]:
        with fastproto.backend("reference"):
            return crop(images, ids)

    suite.compare(work(name, images, size), {"fastproto": ours, "fastproto reference": reference})
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    assert math.isfinite(float(ours()[1].sum()))
