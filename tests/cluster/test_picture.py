"""The picture of a clustering: where its discs lie, and that there is ink whatever the sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastproto.cluster.picture import MAPPED_CLUSTERS, draw, plane


@pytest.mark.parametrize(("k", "dim"), [(1, 5), (2, 1), (3, 40), (50, 6)])
def test_the_plane_keeps_the_distances_that_two_components_can(k: int, dim: int) -> None:
    centers = np.random.default_rng(k).normal(size=(k, dim))
    centred = centers - centers.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = np.zeros((k, 2))
    expected[:, : min(2, len(s))] = (u * s)[:, :2]
    np.testing.assert_allclose(np.abs(plane(centers)), np.abs(expected), atol=1e-6)
    assert (plane(centers).max(0) >= -plane(centers).min(0)).all()


@pytest.mark.parametrize("k", [1, 2, MAPPED_CLUSTERS + 200])
def test_the_picture_is_drawn_whatever_the_sizes(tmp_path: Path, k: int) -> None:
    from PIL import Image

    draws = np.random.default_rng(0)
    counts = np.minimum(draws.pareto(0.7, k) * 10, 1e6).astype(np.int64)
    counts[0] = 7
    with open(tmp_path / "x.png", "wb") as file:
        draw(file, draws.normal(size=(k, 3)), counts, draws.random(k), [1.0] if k == 1 else [3.0, 2.0, 1.5])
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert pixels.shape == (420, 1320, 3)
    # Bars, line and discs: ink in each third.
    assert all((part != 255).any(-1).mean() > 0.01 for part in np.array_split(pixels, 3, axis=1))
