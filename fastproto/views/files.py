"""Image files and PIL images of any kind as uint8 tensors in RGB: the one conversion that everything here reads by."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastproto._check import expect

if TYPE_CHECKING:
    from PIL.Image import Image

# Names of Pillow's, by the EXIF orientation of an image that they bring upright.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_image(path: str | os.PathLike[str]) -> Tensor:  # (3, H, W) uint8
    """Reads an image of any format and mode that Pillow opens, upright and in RGB; of several frames the first.

    Args:
        path: the file. Its name need not say what it is.

    Returns:
        (3, H, W) uint8, as :func:`to_rgb` converts it.

    Raises:
        ValueError: no such file, a file that is no image or is cut short, pixels that :func:`to_rgb` refuses; all with
            the file's name.
        ModuleNotFoundError: Pillow is not installed.

    Example:
        >>> import tempfile, PIL.Image
        >>> from fastproto.views.files import read_image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PIL.Image.new("LA", (5, 4)).save(f"{folder}/x.png")
        ...     read_image(f"{folder}/x.png").shape
        torch.Size([3, 4, 5])
    """
    return decode_image(read_content(path), str(Path(path)))


def read_content(path: str | os.PathLike[str]) -> bytes:
    """What is in the file; raises ValueError, with its name, where that cannot be read."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"{file}: expected an image file, got {'a folder' if file.is_dir() else 'nothing of that name'}"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def decode_image(content: bytes, name: str) -> Tensor:  # (3, H, W) uint8
    """What ``read_image`` makes of a file of this content, which a message calls ``name``."""
    from PIL import Image, UnidentifiedImageError

    try:
        # From memory: Pillow maps an uncompressed TIFF that it opens itself, and garbles it if it is turned (13.0).
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: expected an image, got a file of no kind that Pillow knows") from error
    except MemoryError:
        raise
    # A broken file makes Pillow raise OSError, SyntaxError, struct.error, EOFError and others.
    except Exception as error:
        raise ValueError(f"{name}: cannot be read: {error or type(error).__name__}") from error


def to_rgb(image: Image) -> Tensor:  # (3, H, W) uint8
    """A PIL image of any mode as a tensor.

    It is turned as its EXIF orientation says. Gray is repeated in all three channels, CMYK, YCbCr, HSV, LAB and
    palettes become RGB. 16 bits a channel keep their upper eight, as Pillow itself reads 16-bit colour; integers of
    mode "I" have to be 16-bit values, numbers of mode "F" to lie in [0, 1]. What is transparent is laid over white.

    Raises:
        ValueError: "I" or "F" with values outside that range, which nothing says how to scale.
    """
    from PIL import Image

    # Some formats have EXIF behind the pixels. ImageOps.exif_transpose copies an image that is upright, and writes the
    # EXIF of others anew, which fails on tags of a kind that it does not expect.
    image.load()
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(Image.Transpose[turn])
    if image.mode.startswith("I") or image.mode == "F":
        values, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_to_bytes(values, image.mode))
        if isinstance(transparent, int):
            image.putalpha(Image.fromarray(np.uint8(255) * (values != transparent)))
    if image.mode == "La":
        # Which Pillow converts to nothing else.
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Copied, as Pillow's own pixels are not to be written to.
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_upright(image: Image) -> bool:
    """Whether its EXIF asks for no turn."""
    return _orientation(image) not in TURNS


def _orientation(image: Image) -> Any:
    """What its EXIF says of it, 1 where it says nothing."""
    from PIL import ExifTags

    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Gray values of more than 8 bits in eight."""
    highest = 1 if mode == "F" else 0xFFFF
    low, high = values.min(), values.max()
    # NaN is in no range.
    good = bool(low >= 0 and high <= highest)
    expect(good, "to_rgb", f'values of an image of mode "{mode}"', f"numbers in 0 to {highest}", f"{low} to {high}")
    return (values * 255 + 0.5).astype(np.uint8) if mode == "F" else (values >> 8).astype(np.uint8)
