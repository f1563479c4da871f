"""How fast streamed images arrive, against torchvision's ImageFolder in a DataLoader that decodes the same files.

    python bench/try_streaming.py imagefolder:PATH --workers 2

prints images per second of each, in turns, and the ratios: decoding alone, and with two SimCLR views per image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastproto.train.data import Streamed, batches, load
from fastproto.views import ContrastiveCrop

CPU, BATCH = torch.device("cpu"), 256


def as_list(items: list) -> list:
    return [image for image, _ in items]


class TwoViews:
    def __init__(self, size: int) -> None:
        self.transform = v2.Compose([
            v2.PILToTensor(), v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
            *([v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))], 0.5)] if size > 64 else []),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3),
        ])  # fmt: skip

    def __call__(self, image: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(image), self.transform(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="imagefolder:PATH with PATH/train")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    images = load(options.data, image_size=options.size, resident=False, workers=options.workers).train_images
    assert isinstance(images, Streamed)
    shares = torch.randperm(len(images))[: options.steps * BATCH].split(BATCH)
    crop = ContrastiveCrop(options.size, mean=(0.5,) * 3, std=(0.25,) * 3)
    folder = Path(options.data.partition(":")[2]) / "train"

    def loader(transform: object, **rest: object) -> DataLoader:
        sampler = [ids.tolist() for ids in shares]
        found = ImageFolder(folder, transform=transform)
        return DataLoader(
            found, batch_sampler=sampler, num_workers=options.workers, persistent_workers=options.workers > 0, **rest
        )

    theirs = {"decode": loader(v2.PILToTensor(), collate_fn=as_list), "views": loader(TwoViews(options.size))}
    ways: dict[str, Callable[[], Iterator]] = {
        "decode, fastproto": lambda: batches(images, shares, CPU),
        "decode, torchvision": lambda: iter(theirs["decode"]),
        "views, fastproto": lambda: (
            crop(batch, ids) for batch, ids in zip(batches(images, shares, CPU), shares, strict=True)
        ),
        "views, torchvision": lambda: iter(theirs["views"]),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            for _ in way():
                pass
            # The first turn starts the workers.
            rates[name] += [options.steps * BATCH / (time.perf_counter() - begin)] if turn else []
    for name, found in rates.items():
        print(f"{name:<20} {statistics.median(found):8.0f} images/s   ({', '.join(f'{rate:.0f}' for rate in found)})")
    for kind in ("decode", "views"):
        ratios = [a / b for a, b in zip(rates[f"{kind}, fastproto"], rates[f"{kind}, torchvision"], strict=True)]
        print(f"{kind}: fastproto is {statistics.median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
