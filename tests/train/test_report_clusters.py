"""What the report computes of features: clusters by their definitions, and the plane that shows an embedding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastproto.train import report


@pytest.mark.parametrize(("rows", "number", "width"), [(60, 7, 24), (33, 1, 3), (5, 9, 2), (1, 1, 1)])
def test_clusters_are_the_definitions(rows: int, number: int, width: int) -> None:
    features, labels = torch.randn(rows, width), torch.randint(0, 3, (rows,))
    assignments = torch.randint(-1, number, (rows,))
    assignments[0] = 0
    found = report.clusters(features, assignments, number, labels, ("a", "b", "c"), 0.2)
    members = {k: [i for i in range(rows) if assignments[i] == k] for k in range(number)}
    rows_of = features.double().numpy()
    centres = {k: rows_of[members[k]].mean(0) for k in members if members[k]}
    expected = {tuple(nearest(rows_of, members[k], centres[k])): k for k in centres}
    assert len(found) == len(expected)
    assert [cluster.concentration for cluster in found] == sorted(cluster.concentration for cluster in found)
    for cluster in found:
        k = expected[tuple(cluster.nearest)]
        classes = [int(labels[i]) for i in members[k]]
        assert cluster.size == len(members[k])
        assert cluster.share == pytest.approx(max(classes.count(c) for c in range(3)) / len(classes))
        assert classes.count("abc".index(cluster.majority)) / len(classes) == pytest.approx(cluster.share)


def nearest(rows: np.ndarray, members: list[int], centre: np.ndarray) -> list[int]:
    return sorted(members, key=lambda i: float(np.linalg.norm(rows[i] - centre)))[: report.NEAREST]


def test_clusters_have_the_concentration_of_the_paper() -> None:
    """Mean distance over log(Z + 10), clipped to the middle, scaled to the temperature."""
    features = torch.cat([torch.randn(30, 8) * scale for scale in (0.1, 0.5, 1.0, 2.0)]).double()
    assignments = torch.arange(120) // 30
    found = report.clusters(features, assignments, 4, torch.zeros(120, dtype=torch.int64), ("x",), 0.3)
    raw = []
    for k in range(4):
        rows = features[assignments == k].numpy()
        raw.append(np.linalg.norm(rows - rows.mean(0), axis=1).sum() / (30 * math.log(40)))
    phi = np.clip(raw, np.percentile(raw, 10), np.percentile(raw, 90))
    phi = 0.3 * phi / phi.mean()
    np.testing.assert_allclose([cluster.concentration for cluster in found], phi, rtol=1e-5)


def test_plane_keeps_distances_of_few_points_and_is_repeatable() -> None:
    angles = torch.tensor([0.0, 0.4, 1.0, 2.0])
    circle = torch.stack([angles.cos(), angles.sin()], 1) * 3
    torch.testing.assert_close(torch.pdist(report.plane(circle)), torch.pdist(circle.double() / 3), atol=1e-6, rtol=0)
    many = torch.randn(40, 16)
    first = report.plane(many)
    assert first.shape == (40, 2)
    assert first.isfinite().all()
    assert torch.equal(report.plane(many), first)


def test_plane_separates_clusters() -> None:
    labels = torch.arange(60) % 3
    points = report.plane(torch.randn(3, 24)[labels] + 0.1 * torch.randn(60, 24)).double()
    distance = torch.cdist(points, points)
    same = labels[:, None] == labels
    assert distance[same].max() < distance[~same].min()


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (9, 3), (20, 1)])
def test_plane_of_odd_shapes(shape: tuple[int, int]) -> None:
    assert report.plane(torch.randn(shape)).shape == (shape[0], 2)
    constant = report.plane(torch.ones(shape))
    torch.testing.assert_close(constant, torch.zeros_like(constant), atol=1e-9, rtol=0)
