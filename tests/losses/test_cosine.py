"""Negative cosine similarity against lightly's."""

from __future__ import annotations

import pytest
import torch

from fastproto.losses import NegativeCosineSimilarity


@pytest.mark.parametrize(("shape", "dim"), [((1, 24), 1), ((33, 130), 1), ((33, 130), 0), ((3, 4, 5), -1)])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_replacing_lightly_changes_nothing(shape: tuple[int, ...], dim: int, eps: float) -> None:
    lightlys = pytest.importorskip("lightly.loss").NegativeCosineSimilarity
    x0, x1 = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    x0.data[0] = 0
    ours, theirs = (loss_fn(dim, eps)(x0, x1) for loss_fn in (NegativeCosineSimilarity, lightlys))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for a, b in zip(torch.autograd.grad(ours, (x0, x1)), torch.autograd.grad(theirs, (x0, x1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_formula_and_gradient() -> None:
    x0, x1 = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    expected = -sum(float(a @ b / a.norm() / b.norm()) for a, b in zip(x0, x1, strict=True)) / 5
    torch.testing.assert_close(NegativeCosineSimilarity()(x0, x1), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(NegativeCosineSimilarity(), (x0.requires_grad_(), x1.requires_grad_()))


def test_empty_batch_is_zero_with_zero_gradient() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    loss = NegativeCosineSimilarity()(x, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_autocast(dtype: torch.dtype) -> None:
    x0, x1 = torch.randn(2, 33, 130).to(dtype).unbind()
    expected = NegativeCosineSimilarity()(x0.double(), x1.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NegativeCosineSimilarity()(x0, x1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_compiles_as_one_graph() -> None:
    x0, x1 = torch.randn(2, 5, 3).unbind()
    compiled = torch.compile(NegativeCosineSimilarity(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x0, x1), NegativeCosineSimilarity()(x0, x1))


def test_bad_input_is_refused_by_name() -> None:
    loss_fn, x = NegativeCosineSimilarity(), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"NegativeCosineSimilarity: x1 expected \(2, 3\) on cpu, got float32 \(3,\)"):
        loss_fn(x, x[0])
    with pytest.raises(TypeError, match=r"NegativeCosineSimilarity: x0 expected .* tensor \(N, D\), got NoneType None"):
        loss_fn(None, x)
    with pytest.raises(TypeError, match=r"NegativeCosineSimilarity: x0 expected .*, got int64"):
        loss_fn(x.long(), x)
    with pytest.raises(ValueError, match=r"x0 expected a tensor with a dimension 1, got float32 \(3,\)"):
        loss_fn(x[0], x[0])
