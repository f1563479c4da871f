"""Image files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(file: Path, height: int, width: int, seed: int = 0, mode: str = "RGB") -> np.ndarray:
    """Noise (H, W, 3) that is written and returned."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)
    return pixels
