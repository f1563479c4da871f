"""Crops and views of images in one picture: a row for each image.

Left the image with its box and the crops of some epochs, then the views that come of them, each framed in the colour
of its crop, then maps of the centres of many crops for several alpha.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from fastproto.ops.crop_resize import crop_resize

# Okabe and Ito's colours, which the colour-blind can tell apart, one for each epoch.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7")
DASHES = ("-", "--", ":", "-.")
# In inches of 100 dots. Everything is placed by hand, so that nothing moves with the shapes of the images.
DPI = 100
MARGIN, GAP, NARROW, HEADING, CAPTION = 0.2, 0.3, 0.08, 0.55, 0.3
IMAGE, MAP, TILE = (3.2, 2.6), (2.6, 2.6), 1.26
# Of an image that is drawn: a longer side is made shorter, a thinner strip is drawn wider.
LONGEST, STRIP = 500, 8
BINS = 40
NAME = 30


@dataclass(frozen=True)
class Row:
    """One image and what is drawn of it."""

    name: str
    image: Tensor  # (3, H, W) uint8
    box: tuple[float, float, float, float]  # fractions (h0, w0, h1, w1)
    crops: dict[int, Tensor]  # of each epoch (V, 4) pixels: top, left, height, width
    views: dict[int, Tensor]  # of each epoch (V, 3, h, w) float in [0, 1]
    centres: dict[float, Tensor]  # for each alpha (M, 2) pixels: row, column


def draw(file: BinaryIO, kind: str, rows: Sequence[Row], alpha: float) -> None:
    """Writes the picture in one of matplotlib's formats; ``alpha`` is that of the crops that are drawn."""
    epochs, alphas = list(rows[0].views), list(rows[0].centres)
    count = len(rows[0].crops[epochs[0]])
    tiles_at = MARGIN + IMAGE[0] + GAP
    maps_at = tiles_at + len(epochs) * (TILE + NARROW) - NARROW + GAP
    row_height = max(IMAGE[1], count * (TILE + NARROW) - NARROW)
    width = maps_at + len(alphas) * (MAP[0] + GAP) - GAP + MARGIN
    height = HEADING + len(rows) * (row_height + CAPTION) - CAPTION + MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI)

    def axes_at(x: float, y: float, size: tuple[float, float]) -> Axes:
        """Axes without ticks, by the place of their upper left corner from the figure's."""
        axes = figure.add_axes((x / width, 1 - (y + size[1]) / height, size[0] / width, size[1] / height))
        axes.set(xticks=[], yticks=[], anchor="NW")
        return axes

    def text_at(x: float, y: float, text: str, **options: Any) -> None:
        # A name may hold dollar signs, which would start a formula.
        figure.text(x / width, 1 - y / height, text, fontsize=9, va="bottom", parse_math=False, **options)

    text_at(MARGIN, HEADING - CAPTION, f"box (white) and crops, α = {alpha:g}", fontweight="bold")
    text_at(tiles_at, HEADING - CAPTION, "views of these crops", fontweight="bold")
    text_at(
        maps_at,
        HEADING - CAPTION,
        f"where the centres of {len(rows[0].centres[alphas[0]])} crops lie (brighter: more)",
        fontweight="bold",
    )
    for number, row in enumerate(rows):
        top = HEADING + number * (row_height + CAPTION)
        sides = f"{row.image.shape[2]} × {row.image.shape[1]}"
        text_at(MARGIN, top - 0.05, f"{_shortened(row.name)}  {sides}")
        _draw_crops(axes_at(MARGIN, top, IMAGE), row)
        for column, epoch in enumerate(epochs):
            x = tiles_at + column * (TILE + NARROW)
            text_at(x, top - 0.05, f"epoch {epoch}")
            for v in range(count):
                tile = axes_at(x, top + v * (TILE + NARROW), (TILE, TILE))
                tile.imshow(row.views[epoch][v].permute(1, 2, 0).clamp(0, 1).numpy())
                tile.spines[:].set(edgecolor=COLOURS[column], linewidth=2.5, linestyle=DASHES[v % len(DASHES)])
        for column, (other, centres) in enumerate(row.centres.items()):
            x = maps_at + column * (MAP[0] + GAP)
            text_at(x, top - 0.05, f"α = {other:g}")
            _draw_map(axes_at(x, top, MAP), row, centres)
    with warnings.catch_warnings():
        # Of names in other scripts than the font has: boxes stand for their letters.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format=kind)


def _draw_crops(axes: Axes, row: Row) -> None:
    """The image, and on it the crops of all epochs and the box."""
    _show(axes, row.image, row.image)
    for colour, crops in zip(COLOURS, row.crops.values(), strict=True):
        for dash, (top, left, height, width) in zip(DASHES * 2, crops.tolist(), strict=False):
            _outline(axes, (top, left, top + height, left + width), "black", colour, dash)
    _draw_box(axes, row)


def _draw_map(axes: Axes, row: Row, centres: Tensor) -> None:
    """The density of the centres, from dark to bright, over the shape of the image."""
    height, width = row.image.shape[1:]
    bins = (min(BINS, height), min(BINS, width))
    rows, columns = centres.T.numpy()
    heat = np.histogram2d(rows, columns, bins=bins, range=((0, height), (0, width)))[0]
    _show(axes, row.image, heat, cmap="viridis", norm=PowerNorm(0.5, vmin=0))
    _draw_box(axes, row)


def _draw_box(axes: Axes, row: Row) -> None:
    height, width = row.image.shape[1:]
    h0, w0, h1, w1 = row.box
    _outline(axes, (h0 * height, w0 * width, h1 * height, w1 * width), "black", "white", "-")


def _outline(axes: Axes, corners: tuple[float, ...], halo: str, colour: str, dash: str) -> None:
    top, left, bottom, right = corners
    rectangle = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.6, ls=dash)
    rectangle.set_path_effects([Stroke(linewidth=3, foreground=halo), Normal()])
    axes.add_patch(rectangle)


def _show(axes: Axes, image: Tensor, shown: Tensor | np.ndarray, **options: Any) -> None:
    """An image, or a map of it, in the image's pixels as coordinates."""
    height, width = image.shape[1:]
    if isinstance(shown, Tensor):
        shown = _shrunk(shown).permute(1, 2, 0).numpy()
    axes.imshow(shown, extent=(0, width, height, 0), **options)
    ratio = width / height
    axes.set_aspect(ratio / min(max(ratio, 1 / STRIP), STRIP))


def _shrunk(image: Tensor) -> Tensor:
    """An image (3, H, W) uint8 with no side longer than is drawn, as float in [0, 1]."""
    height, width = image.shape[1:]
    share = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(share * height)), max(1, round(share * width)))
    small = crop_resize(image[None], torch.tensor([[0, 0, height, width]], dtype=torch.int32), size)[0]
    return small.clamp(max=1)  # rounding leaves 1.0000004


def _shortened(name: str) -> str:
    """A name without its middle where it is long, and without what is no UTF-8."""
    name = name.encode("utf-8", "replace").decode()
    half = (NAME - 1) // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}"
