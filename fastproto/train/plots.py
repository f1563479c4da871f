"""Inline SVG and HTML from data: curves, a map of points, a bar of shares, a picture with rectangles.

Nothing here knows about runs. Colours are classes (``c0`` … ``c9``) that the page's style sheet defines for a light and
a dark background; all text is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

COLOURS = 10
# Up to this side a picture is kept losslessly and shown with its pixels visible.
SMALL_PICTURE = 64


class Line(NamedTuple):
    """One line of a plot."""

    name: str
    values: Sequence[float]  # one per epoch
    colour: int = 0


def curve(
    lines: Sequence[Line], *, title: str, start: int = 0, joined: bool = False, note: str = "", colours: int = COLOURS
) -> str:
    """Lines over epochs.

    Args:
        lines: where a value is not finite a line has a gap. Of a single one the last finite value is set above.
        title: what is drawn, set above.
        start: epoch of the first value.
        joined: no gaps: a line goes on from one finite value to the next.
        note: a sentence beneath.
        colours: how many there are in all.
    """
    width, height, left, bottom, top = 340, 190, 46, 24, 10
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    if not finite:
        return ""
    count = max(len(line.values) for line in lines)
    low, high = min(finite), max(finite)
    # A constant gets room around it, and a line at the very edge of the frame is hard to see.
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    step, tall = (width - left - 10) / max(count - 1, 1), height - top - bottom

    def y_of(value: float) -> float:
        return top + tall * (high - value) / (high - low)

    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        f'<text x="{left - 8}" y="{y_of(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks(low, high)
    )
    epochs = "".join(
        f'<text x="{left + step * (tick - start):.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks(start, start + max(count - 1, 1))
        if tick == int(tick) and tick < start + count
    )
    drawn = ""
    # Over each epoch a strip as high as the plot, so that the pointer need not meet a line.
    circles, told = [""] * count, [""] * count
    for line in lines:
        places = [
            (left + step * i, y_of(value)) if math.isfinite(value) else None for i, value in enumerate(line.values)
        ]
        for i, place in enumerate(places):
            if place is not None:
                circles[i] += f'<circle {paint(line.colour, colours)} cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="4"/>'
                name = f"\n{escape(line.name)}: " if line.name else ": "
                told[i] += f"{name}{line.values[i]:.4g}"
        paths = _unbroken_paths([place for place in places if place is not None] if joined else places)
        lined = "".join(f'<path class="line" d="{path}"/>' for path in paths)
        drawn += f"<g {paint(line.colour, colours)}>{lined}</g>"
    hover = "".join(
        f'<g class="hit"><rect x="{left + step * (i - 0.5):.1f}" y="{top}" width="{step:.1f}" height="{tall}"/>'
        f"{circles[i]}<title>epoch {start + i}{told[i]}</title></g>"
        for i in range(count)
        if told[i]
    )
    last = f" <b>{finite[-1]:.4g}</b>" if len(lines) == 1 else ""
    beneath = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure class="curve"><figcaption>{escape(title)}{last}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} by epoch">'
        f"{grid}{epochs}{drawn}{hover}</svg>{beneath}</figure>"
    )


def ticks(low: float, high: float, intervals: int = 5) -> list[float]:
    """Round numbers, evenly apart, within low…high: at least 2, and at most ``intervals`` + 1."""
    rough = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def _unbroken_paths(places: Sequence[tuple[float, float] | None]) -> list[str]:
    """SVG path data of every run of known places; of a lone place a short dash."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(place)
    paths = []
    for run in filter(None, runs):
        (x, y), lone = run[0], len(run) == 1
        paths.append(f"M{x - 2:.1f} {y:.1f}h4" if lone else "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run))
    return paths


def point_map(
    points: Tensor,  # (N, 2) float
    labels: Tensor,  # (N,) int64
    classes: Sequence[str],
) -> str:
    """Points in the plane coloured by class, with a legend of up to 20 classes; the others show their name on hover."""
    side, margin = 520, 12
    low, high = points.amin(0), points.amax(0)
    # One scale for both axes: distances mean something, axes do not. Points that all coincide are one dot.
    scale = (side - 2 * margin) / max(float((high - low).max()), 1e-12)
    size = (high - low) * scale + 2 * margin
    placed = ((points - low) * scale + margin).tolist()
    dots = "".join(
        f'<circle {paint(label, len(classes))} cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{escape(classes[label])}</title></circle>"
        for (x, y), label in zip(placed, labels.tolist(), strict=True)
    )
    shown = legend(classes) if len(classes) <= 20 else ""
    svg = f'<svg viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" role="img" aria-label="map of points">{dots}</svg>'
    return f'<figure class="map">{svg}{shown}</figure>'


def legend(names: Sequence[str]) -> str:
    """What each colour stands for."""
    entries = "".join(f"<li><i {paint(i, len(names))}></i>{escape(name)}</li>" for i, name in enumerate(names))
    return f'<ul class="legend">{entries}</ul>'


def paint(index: int, count: int) -> str:
    """The attribute that colours one class: the style sheet's colours while they last, then a turn of hues."""
    if count <= COLOURS:
        return f'class="c{index}"'
    lightness = 45 + 20 * (index % 2)
    return f'style="--c:hsl({360 * index / count:.0f} 65% {lightness}%)"'


def share_bar(parts: Sequence[tuple[str, float]]) -> str:
    """Named seconds as one bar with a table of values beneath; parts of no length are left out."""
    parts = [(name, seconds) for name, seconds in parts if seconds > 0]
    total = sum(seconds for _, seconds in parts)
    pieces, rows = "", ""
    for i, (name, seconds) in enumerate(parts):
        share, colour, name = seconds / total, f"c{i % COLOURS}", escape(name)
        pieces += f'<i class="{colour}" style="flex-grow:{share:.6f}" title="{name}: {share:.1%}"></i>'
        rows += (
            f'<tr><th scope="row"><i class="{colour}"></i>{name}</th>'
            f"<td>{duration(seconds)}</td><td>{percent(share)}</td></tr>"
        )
    return f'<div class="shares">{pieces}</div><table class="numbers">{rows}</table>'


def picture(
    image: Tensor,  # (3, H, W) uint8
    *,
    rectangles: Sequence[tuple[str, Sequence[float]]] = (),
    title: str = "",
) -> str:
    """An image with rectangles over it, each a style class and (top, left, height, width) in pixels."""
    height, width = image.shape[1:]
    drawn = ""
    for style, (top, left, tall, wide) in rectangles:
        box = f'x="{left:g}" y="{top:g}" width="{wide:g}" height="{tall:g}"'
        # A dark line under the coloured one keeps it visible on any photograph.
        drawn += f'<rect class="halo" {box}/><rect class="{escape(style)}" {box}/>'
    pixels = " pixels" if max(height, width) <= SMALL_PICTURE else ""
    tip = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<svg class="picture{pixels}" viewBox="0 0 {width} {height}" role="img">{tip}'
        f'<image width="{width}" height="{height}" href="{data_url(image)}"/>{drawn}</svg>'
    )


def data_url(image: Tensor) -> str:
    """A uint8 image (3, H, W) as a data: URL; lossless PNG where it is small, WebP where it is not."""
    from PIL import Image

    small = max(image.shape[1:]) <= SMALL_PICTURE
    file = io.BytesIO()
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if small:
        pixels.save(file, "PNG", optimize=True)
    else:
        pixels.save(file, "WEBP", quality=85)
    return f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(file.getvalue()).decode()}"


def percent(share: float) -> str:
    """0.4213 as "42.1 %"."""
    return f"{100 * share:.1f}\u202f%"


def duration(seconds: float) -> str:
    """Seconds as a person would say them: "0.52 s", "48 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 10:
        return f"{seconds:.2f}\u202fs"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u202fs"
    if whole < 3600:
        return f"{whole // 60}\u202fmin {whole % 60}\u202fs"
    return f"{whole // 3600}\u202fh {whole % 3600 // 60}\u202fmin"
