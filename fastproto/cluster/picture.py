"""A clustering in one picture: how large the clusters are, how the objective went, how the centres lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# More discs than this cover each other; the largest clusters are drawn.
MAPPED_CLUSTERS = 1000
BARS = 40


def draw(
    file: BinaryIO,
    centers: np.ndarray,  # (K, D) float
    counts: np.ndarray,  # (K,) int64
    concentration: np.ndarray,  # (K,) float
    history: Sequence[float],
) -> None:
    """Writes a PNG of 1320 × 420 pixels."""
    figure = Figure(figsize=(13.2, 4.2), dpi=100, layout="constrained")
    sizes, objective, plane = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    _sizes(sizes, counts)
    objective.plot(range(1, len(history) + 1), history, marker="o", markersize=3)
    objective.set(title="Objective", xlabel="iteration")
    objective.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _map(plane, centers, counts, concentration)
    for axes in (sizes, objective):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png")


def _sizes(axes: Axes, counts: np.ndarray) -> None:
    """Histogram of the sizes of the clusters that have rows, on a logarithmic axis where they differ widely."""
    filled = counts[counts > 0]
    low, high = int(filled.min()), int(filled.max())
    if high > 20 * np.median(filled):
        edges = np.geomspace(low, high + 1, BARS + 1)
        axes.set_xscale("log")
    else:
        edges = np.linspace(low, high + 1, BARS + 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    # Sizes are whole: of several edges between two of them one is enough, half way.
    axes.hist(filled, (np.unique(np.ceil(edges)) - 0.5).tolist())
    empty = len(counts) - len(filled)
    axes.set(title="Sizes" + (f" ({empty} empty)" if empty else ""), xlabel="rows in a cluster", ylabel="clusters")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _map(axes: Axes, centers: np.ndarray, counts: np.ndarray, concentration: np.ndarray) -> None:
    """The centres at their two principal components, area by size, colour by concentration."""
    shown = np.argsort(-counts, kind="stable")[:MAPPED_CLUSTERS]
    place, size = plane(centers[shown]), counts[shown]
    # Discs of one another's sum cover a fixed share of the frame, whatever the number of clusters.
    area = np.clip(12000 * size / size.sum(), 3, 800)
    x, y, phi = place[:, 0], place[:, 1], concentration[shown]
    discs = axes.scatter(x, y, area, phi, cmap="viridis", alpha=0.7, linewidths=0)
    title = f"The {len(shown)} largest clusters" if len(counts) > len(shown) else "Centres"
    axes.set(title=f"{title}, principal components", xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.1)
    axes.figure.colorbar(discs, ax=axes, label="concentration φ (small: tight)")


def plane(centers: np.ndarray) -> np.ndarray:
    """(K, D) to (K, 2): the two principal components, by the K x K products, whatever D."""
    x = centers.astype(np.float64)
    x -= x.mean(0)
    values, vectors = np.linalg.eigh(x @ x.T)
    place = np.zeros((len(x), 2))
    found = (vectors * np.sqrt(values.clip(min=0)))[:, :-3:-1]
    place[:, : found.shape[1]] = found
    # An axis may point either way: let its farthest centre lie at the positive end.
    ends = place[np.abs(place).argmax(0), [0, 1]]
    return place * np.where(ends < 0, -1, 1)
