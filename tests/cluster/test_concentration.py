"""concentration against the formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.cluster import KMeans, concentration


def oracle(x: Tensor, labels: Tensor, centers: Tensor, temperature: float, alpha: float) -> np.ndarray:
    x, labels, centers = x.double().numpy(), labels.numpy(), centers.double().numpy()
    phi = np.zeros(len(centers))
    for k, center in enumerate(centers):
        members = x[labels == k]
        if len(members) > 1:
            phi[k] = np.linalg.norm(members - center, axis=1).sum() / (len(members) * np.log(len(members) + alpha))
    for k in range(len(centers)):
        if (labels == k).sum() <= 1:
            phi[k] = phi.max()
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(33, 1, 24), (507, 33, 96), (200, 130, 7)])
def test_matches_the_formula(n: int, k: int, d: int, dtype: torch.dtype) -> None:
    x, centers = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    labels = torch.randint(-1, k, (n,))
    for temperature, alpha in ((0.2, 10.0), (0.07, 0.0)):
        phi = concentration(x, labels, centers, temperature, alpha)
        assert phi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(phi.numpy(), oracle(x, labels, centers, temperature, alpha), rtol=1e-6)
        np.testing.assert_allclose(phi.double().mean(), temperature, rtol=1e-6)


def test_of_a_fit() -> None:
    x = torch.randn(300, 8)
    kmeans = KMeans(10, n_iter=3, chunk_rows=70).fit(x)
    expected = oracle(x, kmeans.labels_, kmeans.cluster_centers_, 0.2, 10.0)
    np.testing.assert_allclose(kmeans.concentration_.numpy(), expected, rtol=1e-6)


def test_small_clusters_get_the_largest() -> None:
    x = torch.cat([torch.zeros(20, 2), torch.ones(20, 2), torch.full((1, 2), 9.0)]) + 0.1 * torch.randn(41, 2)
    labels = torch.cat([torch.zeros(20), torch.ones(20), torch.full((1,), 2)]).long()
    phi = concentration(x, labels, torch.tensor([[0.0, 0.0], [1.2, 1.2], [9.0, 9.0], [5.0, 5.0]]))
    assert phi[1] == phi[2] == phi[3] == phi.max()
    assert phi[0] < phi[1]


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0], [-1, -1, -1]])
def test_without_any_spread_all_are_the_temperature(labels: list[int]) -> None:
    x = torch.ones(3, 4)
    phi = concentration(x, torch.tensor(labels), torch.ones(3, 4), temperature=0.3)
    torch.testing.assert_close(phi, torch.full((3,), 0.3))


def test_clusters_without_spread_stay_above_zero() -> None:
    x = torch.cat([torch.zeros(10, 2), torch.randn(10, 2)])
    labels = torch.arange(10).repeat_interleave(2)
    phi = concentration(x, labels, torch.zeros(10, 2))
    np.testing.assert_allclose(phi.min(), 0.2e-3, rtol=1e-6)


def test_no_rows() -> None:
    assert torch.equal(concentration(torch.empty(0, 3), torch.empty(0).long(), torch.ones(2, 3)), torch.full((2,), 0.2))


def test_any_strides_and_no_gradient() -> None:
    x, labels, centers = torch.randn(24, 66), torch.randint(5, (66,)), torch.randn(24, 5)
    expected = concentration(x.T[::2].contiguous(), labels[::2].contiguous(), centers.T.contiguous())
    strided = concentration(x.requires_grad_().T[::2], labels.int()[::2], centers.T)
    assert torch.equal(expected, strided)
    assert not strided.requires_grad


def test_bad_input() -> None:
    x, labels, centers = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, -1]), torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"concentration: x expected a float32 .* got int64 \(5, 3\) on cpu"):
        concentration(x.long(), labels, centers)
    with pytest.raises(ValueError, match=r"concentration: centers expected \(K, 3\) on cpu, got float32 \(2, 2\)"):
        concentration(x, labels, centers[:, :2])
    with pytest.raises(ValueError, match=r"concentration: centers expected at least one centre"):
        concentration(x, labels, centers[:0])
    with pytest.raises(ValueError, match=r"concentration: labels expected \(5,\) on cpu, got int64 \(4,\) on cpu"):
        concentration(x, labels[:4], centers)
    with pytest.raises(ValueError, match=r"concentration: labels expected -1 or 0 to 1, got values from 1 to 3"):
        concentration(x, labels + 2, centers)
    for value in (0.0, np.inf, np.nan, "a", True, None):
        with pytest.raises(ValueError, match=r"concentration: temperature expected a finite number above 0, got"):
            concentration(x, labels, centers, value)
    for value in (-1, np.inf, np.nan, "a", True, None):
        with pytest.raises(ValueError, match=r"concentration: alpha expected a finite number of at least 0, got"):
            concentration(x, labels, centers, alpha=value)
    with pytest.raises(ValueError, match=r"concentration: x expected finite rows, got 1 .* the first at index 2"):
        concentration(x.index_fill(0, torch.tensor([2]), torch.inf), labels, centers)
    with pytest.raises(ValueError, match=r"concentration: centers expected finite centres"):
        concentration(x, labels, centers.index_fill(0, torch.tensor([1]), torch.nan))


def test_rows_that_belong_nowhere_may_hold_nan() -> None:
    x, labels, centers = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, -1]), torch.randn(2, 3)
    expected = concentration(x, labels, centers)
    assert torch.equal(concentration(x.index_fill(0, torch.tensor([4]), torch.nan), labels, centers), expected)
