"""Data sets, resident as uint8 tensors: what is trained on, what is tested on, and their pixel statistics.

Everything fits in memory and is decoded once, so an epoch reads no file and views are made from the whole tensor.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto._check import expect

CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
FOLDER = "imagefolder:"
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DIGITS_SIDE = 40
DIGITS_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """Images of one size with their labels, in two parts.

    ``mean`` and ``std`` are those of the training images divided by 255, one value per channel.
    """

    name: str
    train_images: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, 3, H, W) uint8
    test_labels: Tensor  # (M,) int64
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load(name: str, root: Path | None = None, *, image_size: int = 96) -> Dataset:
    """Loads a data set by name.

    Args:
        name: one of

            - ``"digits"``: scikit-learn's 1797 handwritten digits, each at a random place and size on a crop of a
              photograph, 40 x 40 in colour. Needs no download; the same pictures on every machine.
            - ``"cifar10"``, ``"cifar100"``: read by torchvision from ``root``, downloaded into it where missing.
            - ``"imagefolder:PATH"``: ``PATH/train/CLASS/*`` with ``PATH/test/CLASS/*`` or ``PATH/val/CLASS/*``; or
              ``PATH/CLASS/*``, of which every fifth image of a class, in order of names, is for testing.
        root: folder of the CIFAR data; ``./data`` by default.
        image_size: side of an ``imagefolder`` image: the shorter side is resized to it, the centre is kept. The other
            data sets have a size of their own.

    Raises:
        ValueError: an unknown name; a folder that is missing, holds no image or holds a class for testing that is not
            in training; an image that does not decode, with its file name; CIFAR data neither there nor to be had.

    Example:
        >>> data = load("digits")
        >>> data.train_images.shape, data.test_images.shape, data.classes[:3]
        (torch.Size([1437, 3, 40, 40]), torch.Size([360, 3, 40, 40]), ('0', '1', '2'))
    """
    if name == "digits":
        return _digits()
    if name in CIFAR:
        return _cifar(name, Path("data") if root is None else Path(root))
    known = isinstance(name, str) and len(name) > len(FOLDER) and name.startswith(FOLDER)
    expect(known, "load", "name", f"digits, {', '.join(CIFAR)} or {FOLDER}PATH", repr(name))
    expect(image_size >= 1, "load", "image_size", "at least 1", image_size)
    return _image_folder(name, Path(name.removeprefix(FOLDER)), image_size)


def _dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
) -> Dataset:
    """Two pairs of images (N, 3, H, W) and labels (N,) as tensors, with the statistics of the first."""
    mean, std = _pixel_statistics(train[0])
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, (*train, *test))
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes, mean, std)


def _pixel_statistics(images: np.ndarray) -> tuple[Any, Any]:
    """Mean and standard deviation per channel of uint8 images over 255, from exact integer histograms."""
    values = np.arange(256)
    mean, std = [], []
    for channel in range(3):
        # Image by image: bincount widens its input to int64, eight times the size of the images.
        counts = np.zeros(256, dtype=np.int64)
        for image in images:
            counts += np.bincount(image[channel].ravel(), minlength=256)
        first, second = counts @ values / counts.sum(), counts @ values**2 / counts.sum()
        mean.append(float(first) / 255)
        # A constant channel would make the normalised images infinite.
        std.append(max(float(np.sqrt(max(second - first**2, 0.0))), 1.0) / 255)
    return tuple(mean), tuple(std)


# Digits on photographs. Integer arithmetic throughout, and the raw stream of PCG64, which NumPy promises never to
# change: a float's last bit, or a new way to draw an integer from a range, could turn one byte into another.


def _digits() -> Dataset:
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    # Summed from the top left corner on: four corners give the sum of any rectangle.
    photographs = [
        np.pad(photograph.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0), (0, 0)))
        for photograph in load_sample_images().images
    ]
    glyphs = digits.images.astype(np.int64)
    draws = np.random.PCG64(DIGITS_SEED).random_raw(13 * len(glyphs)).reshape(len(glyphs), 13)
    images = np.stack([_digit_on_photograph(glyph, photographs, row) for glyph, row in zip(glyphs, draws, strict=True)])
    labels = digits.target.astype(np.int64)
    # The digits come writer by writer: every fifth is for testing, so that both parts hold every hand.
    tested = np.arange(len(labels)) % 5 == 0
    classes = tuple(str(digit) for digit in digits.target_names)
    return _dataset("digits", (images[~tested], labels[~tested]), (images[tested], labels[tested]), classes)


def _digit_on_photograph(glyph: np.ndarray, photographs: list[np.ndarray], draws: np.ndarray) -> np.ndarray:
    """One 8 x 8 glyph of 0…16 in a random ink on a random crop of a photograph, a quarter as bright, tinted: (3, H, W).

    ``photographs`` are summed (H + 1, W + 1, 3); ``draws`` are 13 random 64-bit integers.
    """
    stream = iter(draws.tolist())

    def draw(low: int, high: int) -> int:
        """The next integer of low…high, both included."""
        return low + ((next(stream) >> 32) * (high - low + 1) >> 32)

    side = DIGITS_SIDE
    photograph = photographs[draw(0, len(photographs) - 1)]
    step = draw(2, 8)  # photograph pixels per pixel
    top = draw(0, photograph.shape[0] - 1 - side * step)
    left = draw(0, photograph.shape[1] - 1 - side * step)
    corners = photograph[top : top + side * step + 1 : step, left : left + side * step + 1 : step]
    # Tint and ink vary little: with vivid colours an encoder can tell the images apart by colour and learns no shape.
    tint = np.array([draw(224, 288) for _ in range(3)])  # in 256ths
    ground = np.diff(np.diff(corners, axis=0), axis=1) * tint // (4 * 256 * step * step)

    size = draw(side // 2, side * 4 // 5)
    top, left = draw(0, side - size), draw(0, side - size)
    ink = np.array([draw(208, 255) for _ in range(3)])
    cover = _enlarge(glyph, size)[:, :, None]  # in units of `full`
    full = 16 * (2 * size) ** 2
    place = ground[top : top + size, left : left + size]
    place[:] = (place * (full - cover) + ink * cover + full // 2) // full
    return ground.transpose(2, 0, 1).astype(np.uint8)


def _enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of a small square integer image to (size, size), times (2·size)², with nothing rounded."""
    source = len(image)
    weights = np.zeros((size, source), dtype=np.int64)
    for row in range(size):
        # Centre of the row in source pixels, (row + 0.5)·source/size - 0.5, in units of 1/(2·size).
        centre = min(max((2 * row + 1) * source - size, 0), 2 * size * (source - 1))
        index, part = divmod(centre, 2 * size)
        weights[row, index] += 2 * size - part
        weights[row, min(index + 1, source - 1)] += part
    return weights @ image @ weights.T


def _cifar(name: str, root: Path) -> Dataset:
    from torchvision import datasets

    class_name, folder = CIFAR[name]
    make: Any = getattr(datasets, class_name)
    missing = not (root / folder).is_dir()
    try:
        parts = [make(root, train=train, download=missing) for train in (True, False)]
    # No network, no permission, a file cut short: torchvision and the network below it raise many kinds.
    except Exception as error:
        raise ValueError(
            f"load: {name} expected the folder {root / folder} of {make.url}, unpacked, "
            f"and it could not be {'downloaded' if missing else 'read'}: {error}"
        ) from error
    train, test = (
        (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.array(part.targets, dtype=np.int64))
        for part in parts
    )
    return _dataset(name, train, test, tuple(parts[0].classes))


def _image_folder(name: str, folder: Path, image_size: int) -> Dataset:
    expect(folder.is_dir(), "load", "imagefolder", "a folder", f"{folder}, which is none")
    if (folder / "train").is_dir():
        tests = [folder / part for part in ("test", "val") if (folder / part).is_dir()]
        expect(bool(tests), "load", "imagefolder", f"{folder / 'test'} or {folder / 'val'}", "neither")
        train, test = _files_by_class(folder / "train"), _files_by_class(tests[0])
        unknown = sorted(test.keys() - train.keys())
        expect(not unknown, "load", "imagefolder", f"the classes of {folder / 'train'}", f"{tests[0]} with {unknown}")
    else:
        files = _files_by_class(folder)
        train = {label: [file for i, file in enumerate(files[label]) if i % 5 != 4] for label in files}
        test = {label: files[label][4::5] for label in files}
        expect(any(test.values()), "load", "imagefolder", "at least 5 images in a class", f"fewer in all of {folder}")
    classes = tuple(train)
    return _dataset(name, _decode_all(train, classes, image_size), _decode_all(test, classes, image_size), classes)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """The image files under each subfolder, all in order of names."""
    files = {
        part.name: sorted(
            (file for file in part.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()),
            key=lambda file: file.as_posix(),
        )
        for part in sorted(folder.iterdir(), key=lambda part: part.name)
        if part.is_dir() and not part.name.startswith(".")
    }
    expect(bool(files), "load", "imagefolder", "a folder per class", f"none in {folder}")
    for label in files:
        expect(bool(files[label]), "load", "imagefolder", "images in every class", f"none in {folder / label}")
    return files


def _decode_all(
    files: dict[str, list[Path]], classes: tuple[str, ...], image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, S, S) and labels (N,), class by class."""
    paths = [file for label in files for file in files[label]]
    images = np.empty((len(paths), 3, image_size, image_size), dtype=np.uint8)

    def decode(index: int) -> None:
        images[index] = _decode(paths[index], image_size)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    labels = np.repeat([classes.index(label) for label in files], [len(files[label]) for label in files])
    return images, labels.astype(np.int64)


def _decode(file: Path, image_size: int) -> np.ndarray:
    """One image as RGB (3, S, S): shorter side resized to S, centre kept."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            square = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BILINEAR)
    # A broken file makes Pillow raise OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise ValueError(f"load: imagefolder expected images that decode, got {file}: {error}") from error
    return np.asarray(square).transpose(2, 0, 1)
