"""What a data set is once it is loaded, and how one is made of arrays or of files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto.train.data.streamed import Files, Images, Streamed, squares

# What of images in files is kept in memory unless asked otherwise: 4 GiB.
RESIDENT_BYTES = 2**32
# Images that stand for all of a streamed set in its pixel statistics.
SAMPLED = 2048
# Images brought to squares at a time.
CHUNK = 256

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, 3, H, W) uint8, labels (N,) int64
Encoded = tuple[Files, np.ndarray]  # N images, labels (N,) int64


@dataclass(frozen=True)
class Dataset:
    """Images with their labels, in two parts. Images with the label -1 are trained on, and take no part in evaluation.

    ``mean`` and ``std`` are those of the training images divided by 255, one value per channel.
    """

    name: str
    train_images: Images  # (N, 3, H, W) uint8, or Streamed
    train_labels: Tensor  # (N,) int64
    test_images: Images  # (M, 3, H, W) uint8, or Streamed
    test_labels: Tensor  # (M,) int64
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    left_out: int = 0  # files that did not decode when all were read, and shards without their end
    digest: str = ""  # of the labels of all training images in files, and their names or places in shards

    @property
    def skipped(self) -> int:
        """Files that do not decode, as far as is known: those of a streamed set once they have been asked for."""
        parts = (self.train_images, self.test_images)
        return self.left_out + sum(len(images.broken) for images in parts if isinstance(images, Streamed))

    def limited(self, count: int) -> Dataset:
        """So many of the training images, spread evenly: image folders are sorted by class."""
        images, kept = self.train_images, _spread(count, len(self.train_images))
        chosen = images.take(kept) if isinstance(images, Streamed) else images[kept]
        return replace(self, train_images=chosen, train_labels=self.train_labels[kept])


def from_arrays(name: str, train: Arrays, test: Arrays, classes: tuple[str, ...]) -> Dataset:
    """A resident data set."""
    (train_images, train_labels), (test_images, test_labels) = (map(torch.from_numpy, part) for part in (train, test))
    mean, std = pixel_statistics(train_images)
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes, mean, std)


def from_files(
    name: str,
    train: Encoded,
    test: Encoded,
    classes: tuple[str, ...],
    *,
    side: int,
    resident: bool | None = None,
    workers: int = 0,
    strict: bool = False,
    gpu_decode: bool = False,
) -> Dataset:
    """A data set whose images are in files, read at once as squares or streamed.

    Args:
        name: of the data set.
        train: the training images and their labels.
        test: likewise.
        classes: names of the labels.
        side: S of the squares.
        resident: whether all are read now; None: where their squares take no more than 4 GiB.
        workers: processes that decode.
        strict: refuse a file that does not decode.
        gpu_decode: a GPU decodes the JPEG files that are streamed to it.

    Raises:
        BrokenImage: such a file, where ``strict``; 100 of them in a row, or all there are, anyway.
    """
    parts = [
        (Streamed(files, side, workers=workers, strict=strict, gpu_decode=gpu_decode), labels)
        for files, labels in (train, test)
    ]
    if resident is None:
        resident = sum(len(labels) for _, labels in parts) * 3 * side**2 <= RESIDENT_BYTES
    (train_images, train_labels), (test_images, test_labels) = (
        _read(images, labels) if resident else (images, torch.from_numpy(labels)) for images, labels in parts
    )
    mean, std = pixel_statistics(train_images)
    left_out = sum(len(images.broken) for images, _ in parts) if resident else 0
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes, mean, std, left_out)


def _read(images: Streamed, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """All squares (N, 3, S, S) and labels (N,), without the images that do not decode."""
    pixels = torch.empty(images.shape, dtype=torch.uint8)
    shares = torch.arange(len(images)).split(CHUNK)
    for ids, batch in zip(shares, squares(images, shares, pixels.device), strict=True):
        pixels[ids] = batch
    whole = torch.ones(len(images), dtype=torch.bool)
    whole[sorted(images.broken)] = False
    return (pixels if whole.all() else pixels[whole]), torch.from_numpy(labels)[whole]


def pixel_statistics(images: Images) -> tuple[Any, Any]:
    """Mean and standard deviation per channel of the pixels over 255, from exact integer histograms.

    Of a streamed set those of at most 2048 images, spread evenly over it.
    """
    count = len(images) if isinstance(images, Tensor) else min(len(images), SAMPLED)
    counts = np.zeros((3, 256), dtype=np.int64)
    for batch in squares(images, _spread(count, len(images)).split(CHUNK), torch.device("cpu")):
        for image in batch.numpy():
            # Image by image: bincount widens its input to int64, eight times the size of the images.
            counts += [np.bincount(channel.ravel(), minlength=256) for channel in image]
    values = np.arange(256)
    mean, std = [], []
    for histogram in counts:
        first, second = histogram @ values / histogram.sum(), histogram @ values**2 / histogram.sum()
        mean.append(float(first) / 255)
        # A constant channel would make the normalised images infinite.
        std.append(max(float(np.sqrt(max(second - first**2, 0.0))), 1.0) / 255)
    return tuple(mean), tuple(std)


def _spread(count: int, total: int) -> Tensor:
    """So many numbers, evenly over 0…total - 1."""
    return torch.arange(count) * total // count
