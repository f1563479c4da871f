"""What ``fastproto views`` does: one picture of the crops and views of some images, there whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproto._check import expect
from fastproto.ops.crop_resize import crop_resize
from fastproto.ops.localize import localize
from fastproto.ops.sample_crops import FULL_BOX, sample_crops
from fastproto.views import picture
from fastproto.views.contrastive_crop import ContrastiveCrop
from fastproto.views.files import read_image

SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
# More would be a picture of more than 20 000 pixels, or views too small to see.
MAX_IMAGES, MAX_VIEWS = 64, 8
EPOCHS = 3
# Of all views together, which are in memory until they are drawn: 1.5 GiB.
MAX_PIXELS = 2**27
ALPHAS = (1.0, 0.6, 0.1)
# Crops of a map, which shows shares of them: enough for a smooth one.
MAPPED_CROPS = 40_000

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Locator:
    """Finds the box of an image as the trainer finds those of its data."""

    feature_map: Callable[[Tensor], Tensor]  # (N, 3, h, w) float to (N, C, h', w'): of a trained encoder in eval mode
    size: tuple[int, int]  # of the images it was trained on, to which others are resized
    mean: Sequence[float]
    std: Sequence[float]
    threshold: float

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Box:
        """The box of an image (3, H, W) uint8."""
        whole = torch.tensor([[0, 0, *image.shape[1:]]], dtype=torch.int32)
        resized = crop_resize(image[None], whole, self.size, mean=self.mean, std=self.std)
        h0, w0, h1, w1 = localize(self.feature_map(resized), self.threshold, self.size)[0].tolist()
        return h0, w0, h1, w1


def read_images(paths: Sequence[Path]) -> list[Tensor]:  # N × (3, H, W) uint8
    """All images; ValueError for one that cannot be read, as ``read_image``, and for too many."""
    expect(len(paths) <= MAX_IMAGES, "views", "images", f"at most {MAX_IMAGES}", str(len(paths)))
    return [read_image(path) for path in paths]


def check_out(out: Path, paths: Sequence[Path], overwrite: bool) -> None:
    """Refuses a file that the picture must not go to. Writes nothing itself.

    Raises:
        ValueError: a suffix that says no format; a folder that cannot be written; one of the images; a file that is
            there, where ``overwrite`` is not set.
    """
    expect(out.suffix.lower() in SUFFIXES, "views", "--out", f"a name in {', '.join(SUFFIXES)}", str(out))
    folder = out.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    expect(writable, "views", "--out", "a file in a folder that can be written", str(out))
    expect(not out.is_dir(), "views", "--out", "a file", f"{out}, which is a folder")
    expect(
        out.resolve() not in [path.resolve() for path in paths],
        "views",
        "--out",
        "another file than the images",
        str(out),
    )
    expect(overwrite or not os.path.lexists(out), "views", "--out", "a new file", f"{out}: replace it with --overwrite")


def preview(
    paths: Sequence[Path],
    images: Sequence[Tensor],  # N × (3, H, W) uint8
    out: Path,
    *,
    box: Box = FULL_BOX,
    locate: Locator | None = None,
    epoch: int = 0,
    **options: Any,
) -> list[Box]:
    """Draws of every image the box, crops of some epochs, the views that come of them, and where crops land at large.

    Args:
        paths: names of the images, of which the n-th is sample n.
        out: the picture, in the format of its suffix; see ``check_out``.
        box: the box of all images.
        locate: what finds each one's instead.
        epoch: the first of ``EPOCHS``.
        options: of ``ContrastiveCrop``.

    Returns:
        The boxes.

    Raises:
        ValueError: options that ``ContrastiveCrop`` refuses, more than ``MAX_VIEWS`` views, or more than ``MAX_PIXELS``
            in all of them. Nothing is written.
        OSError: the picture cannot be written. Nothing is left behind.
    """
    crop = ContrastiveCrop(**options)
    expect(crop.views <= MAX_VIEWS, "views", "--views", f"at most {MAX_VIEWS}", str(crop.views))
    last = 2**32 - EPOCHS
    expect(epoch <= last, "views", "--epoch", f"at most {last}: {EPOCHS} epochs are drawn", str(epoch))
    side, most = max(crop.size), math.isqrt(MAX_PIXELS // max(1, EPOCHS * crop.views * len(images)))
    expect(side <= most, "views", "--size", f"at most {most} for so many images and views", str(side))
    rows = []
    for number, (path, image) in enumerate(zip(paths, images, strict=True)):
        box = locate(image) if locate else box
        rows.append(
            _row(os.path.join(*path.parts[-2:]), image, torch.tensor([number]), box, crop, range(epoch, epoch + EPOCHS))
        )
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            picture.draw(file, out.suffix.lower().removeprefix("."), rows, crop.alpha)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return [row.box for row in rows]


def _row(name: str, image: Tensor, ids: Tensor, box: Box, crop: ContrastiveCrop, epochs: range) -> picture.Row:
    """What the picture shows of one image."""
    size = (image.shape[1], image.shape[2])
    shape: dict[str, Any] = {"scale": crop.scale, "ratio": crop.ratio, "seed": crop.seed}
    crops, views = {}, {}
    for epoch in epochs:
        crops[epoch] = sample_crops(ids, size, boxes=box, alpha=crop.alpha, views=crop.views, epoch=epoch, **shape)
        views[epoch] = torch.stack(crop(image[None], ids, box, epoch))[:, 0]
    centres = {}
    for alpha in ALPHAS:
        drawn = sample_crops(torch.arange(MAPPED_CROPS), size, boxes=box, alpha=alpha, views=1, **shape).double()
        centres[alpha] = drawn[:, :2] + drawn[:, 2:] / 2
    return picture.Row(name, image, box, crops, views, centres)


def describe(paths: Sequence[Path], images: Sequence[Tensor], boxes: Sequence[Box], out: Path) -> str:
    """What was drawn, in a line for each image."""
    lines = [
        f"{path}: {image.shape[2]} x {image.shape[1]}, box {' '.join(f'{side:.3f}' for side in box)}"
        for path, image, box in zip(paths, images, boxes, strict=True)
    ]
    return "\n".join([*lines, f"written {out}"])
