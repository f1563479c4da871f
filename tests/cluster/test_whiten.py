"""whiten against numpy's eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastproto.cluster import whiten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "c", "dim"), [(507, 24, 24), (300, 96, 7), (130, 5, 1)])
def test_matches_the_formula(n: int, c: int, dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(n, c) @ torch.randn(c, c) + 5).to(dtype)
    y = whiten(x, dim)
    rows = x.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True).reshape(c, c))
    expected = (rows - rows.mean(0)) @ vectors[:, ::-1][:, :dim] / np.sqrt(values[::-1][:dim])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    signs = np.sign((expected * y.double().numpy()).sum(0))
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(y.numpy(), expected * signs, atol=1e-5)


def test_directions_without_variance_are_zero() -> None:
    x = torch.randn(100, 3) @ torch.randn(3, 10)
    y = whiten(x.double(), 8)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(100, dtype=torch.float64))
    assert y[:, 3:].abs().max() == 0


@pytest.mark.parametrize("x", [torch.ones(10, 4), torch.randn(1, 4), torch.empty(0, 4)])
def test_rows_without_variance_give_zeros(x: torch.Tensor) -> None:
    assert torch.equal(whiten(x, 2), torch.zeros(len(x), 2))


def test_signs_do_not_follow_the_order_of_the_rows() -> None:
    x = torch.randn(200, 6) * torch.arange(1, 7)
    torch.testing.assert_close(whiten(x, 6).flip(0), whiten(x.flip(0), 6))


def test_strides_and_gradient() -> None:
    x = torch.randn(12, 200)
    assert torch.equal(whiten(x.requires_grad_().T[:, ::2], 3), whiten(x.detach().T[:, ::2].contiguous(), 3))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"whiten: dim expected an integer in 1 \.\.\. 4, got int 5"):
        whiten(torch.randn(10, 4), 5)
    with pytest.raises(ValueError, match=r"whiten: dim expected an integer in 1 \.\.\. 4, got int 0"):
        whiten(torch.randn(10, 4), 0)
    for dim, got in ((2.0, "float 2.0"), ("2", "2"), (True, "bool True"), (None, "NoneType None")):
        with pytest.raises(ValueError, match=rf"whiten: dim expected an integer in 1 \.\.\. 4, got {got}"):
            whiten(torch.randn(10, 4), dim)
    with pytest.raises(ValueError, match=r"whiten: x expected \(N, C\), got float32 \(4,\) on cpu"):
        whiten(torch.randn(4), 1)
    with pytest.raises(TypeError, match=r"whiten: x expected a float32 .* got int64 \(10, 4\)"):
        whiten(torch.ones(10, 4).long(), 1)
    with pytest.raises(ValueError, match=r"whiten: x expected finite rows, got 2 .* the first at index 3"):
        whiten(torch.randn(10, 4).index_fill_(0, torch.tensor([3, 7]), torch.nan), 1)
