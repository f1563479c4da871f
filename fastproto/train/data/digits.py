"""Digits on photographs: a data set that needs no download, the same bytes on every machine."""

from __future__ import annotations

import numpy as np

DIGITS_SIDE = 40
DIGITS_SEED = 0

# Digits on photographs. Integer arithmetic throughout, and the raw stream of PCG64, which NumPy promises never to
# change: a float's last bit, or a new way to draw an integer from a range, could turn one byte into another.


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    """Images (N, 3, 40, 40) and labels (N,) for training, the same for testing, and the names of the classes."""
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
    return (images[~tested], labels[~tested]), (images[tested], labels[tested]), classes


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
