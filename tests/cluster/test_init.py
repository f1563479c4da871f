"""Starts: without replacement, in proportion to the squared distance, never outside the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.cluster._rows import Rows
from fastproto.cluster.init import plus_plus_centers, random_centers


def picked(x: Tensor, centers: Tensor) -> list[int]:
    """Which row each centre is."""
    nearest = torch.cdist(centers.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.eq(0).all()
    return nearest.indices.tolist()


@pytest.mark.parametrize("count", [1, 7, 33])
def test_random_rows_are_different_and_equally_likely(count: int) -> None:
    x = torch.randn(33, 3)
    times = np.zeros(33)
    for seed in range(400):
        rows = picked(x, random_centers(Rows(x), count, np.random.default_rng(seed)))
        assert len(set(rows)) == count
        times[rows] += 1
    expected = 400 * count / 33
    assert (np.abs(times - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_plus_plus_draws_in_proportion_to_the_squared_distance(weighted: bool, spherical: bool) -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 2.0], [-4.0, 1.0]])
    weights = torch.tensor([1.0, 2.0, 0.0, 1.5] if weighted else [1.0] * 4, dtype=torch.float64)
    place = torch.nn.functional.normalize(x.double()) if spherical else x.double()
    squared = torch.cdist(place, place).square()
    pairs = squared * weights / (squared * weights).sum(1, keepdim=True)
    expected = (weights / weights.sum())[:, None] * pairs
    times = np.zeros((4, 4))
    for seed in range(600):
        rows = Rows(x, weights if weighted else None, chunk_rows=3)
        first, second = picked(x, plus_plus_centers(rows, 2, np.random.default_rng(seed), spherical))
        times[first, second] += 1
    deviation = 5 * np.sqrt(600 * expected.numpy()) + 1e-9
    assert (np.abs(times - 600 * expected.numpy()) <= deviation).all()


def test_plus_plus_over_many_blocks() -> None:
    x = torch.zeros(5000, 2)
    x[4321] = 1.0
    for seed in range(20):
        rows = picked(x.unique(dim=0), plus_plus_centers(Rows(x), 2, np.random.default_rng(seed)))
        assert sorted(rows) == [0, 1]


def test_plus_plus_of_equal_rows_draws_any() -> None:
    centers = plus_plus_centers(Rows(torch.ones(10, 3)), 5, np.random.default_rng(0))
    assert centers.eq(1).all()


def test_half_rows_start_as_float32() -> None:
    x = torch.randn(10, 3).half()
    centers = random_centers(Rows(x), 4, np.random.default_rng(0))
    assert centers.dtype == torch.float32
    picked(x, centers)
