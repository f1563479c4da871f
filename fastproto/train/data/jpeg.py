"""JPEG on the device: which files a GPU can be left to decode, and the decoding.

nvJPEG says little of a file that is cut short, and reads no EXIF. So it is given only what leaves no doubt: a whole
file, RGB in JFIF (which is always YCbCr inside), upright. Workers decode the others, by ``read_image``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastproto.views.files import is_upright

START, END = b"\xff\xd8", b"\xff\xd9"


def is_plain(content: bytes) -> bool:
    """Whether this is the content of a JPEG file that every decoder reads as the same image, but for rounding."""
    from PIL import Image

    if not (content.startswith(START) and content.endswith(END)):
        return False
    try:
        # Reads the header alone.
        with Image.open(io.BytesIO(content)) as image:
            return image.format == "JPEG" and image.mode == "RGB" and "jfif" in image.info and is_upright(image)
    # Who decodes it finds out what is wrong with it.
    except Exception:
        return False


def decode(contents: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decodes on the device.

    Args:
        contents: of files that are plain, (n bytes,) uint8 each, on the CPU.
        device: a GPU decodes all in one call of nvJPEG, its JPEG engines where it has them.

    Returns:
        (3, H, W) uint8 each. Where colour is stored at half the resolution, nvJPEG brings it up otherwise than Pillow.

    Raises:
        RuntimeError: one of them does not decode; it says not which.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    if not contents:
        return []
    if device.type == "cuda":
        # nvJPEG waits for no stream, and torchvision may hand it memory that work of this one still uses.
        torch.cuda.current_stream(device).synchronize()
    with warnings.catch_warnings():
        # torchvision 0.29 points to torchcodec for what is to come.
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
        decoded: list[Tensor] = decode_jpeg(list(contents), ImageReadMode.RGB, device=device)
    return decoded
