"""Batch prototypes, alignment, uniformity and correlation against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto.losses import AlignmentLoss, CorrelationLoss, UniformityLoss
from fastproto.losses.functional import alignment, batch_prototypes, covariance, cross_correlation, uniformity

SHAPES = [(2, 24), (33, 130), (507, 5)]


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def unit(x: Tensor) -> np.ndarray:
    return x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)


def close(actual: Tensor, expected: float | np.ndarray) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def correlation_of(a: np.ndarray, b: np.ndarray) -> float:
    za, zb = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-8) for x in (a, b))
    r = za.T @ zb / len(a)
    return float(((1 - np.diag(r)) ** 2).sum() + 0.0051 * ((r**2).sum() - (np.diag(r) ** 2).sum()))


@pytest.mark.parametrize(("n", "d"), [(1, 24), *SHAPES])
def test_batch_prototypes_are_the_unit_means_of_each_assignment(n: int, d: int) -> None:
    x, labels = rows(n, d), torch.randint(-1, max(n // 3, 1), (n,))
    prototypes, mask = batch_prototypes(x, labels)
    assert sorted(labels[mask].tolist()) == sorted(set(labels.tolist()) - {-1})
    for i, y in enumerate(labels.tolist()):
        mean = unit(x)[labels.numpy() == y].mean(0)
        close(prototypes[i], mean / np.linalg.norm(mean) if y != -1 else np.zeros(d))
    first = [i for i, y in enumerate(labels.tolist()) if y != -1 and y not in labels[:i].tolist()]
    assert mask.nonzero()[:, 0].tolist() == first
    others = batch_prototypes(x, labels.where(labels >= 0, 1000).int(), ignore_index=1000)
    assert all(torch.equal(a, b) for a, b in zip(others, (prototypes, mask), strict=True))


def test_batch_prototypes_gradient_reaches_all_members() -> None:
    x, labels = rows(6, 3).requires_grad_(), torch.tensor([4, 0, 4, -1, 4, 0])
    assert torch.autograd.gradcheck(lambda x: batch_prototypes(x, labels).prototypes, (x,))
    prototypes, mask = batch_prototypes(x, labels)
    prototypes[mask][0].square().mul(torch.arange(3)).sum().backward()
    assert (x.grad != 0).any(1).tolist() == [True, False, True, False, True, False]


def test_batch_prototypes_of_an_ignored_nan_row() -> None:
    x, labels = rows(3, 2), torch.tensor([0, -1, 0])
    x[1] = float("nan")
    assert batch_prototypes(x, labels).prototypes.isfinite().all()


@pytest.mark.parametrize(("n", "d"), [(1, 24), *SHAPES])
@pytest.mark.parametrize("alpha", [1, 2, 2.5])
def test_alignment_is_its_formula(n: int, d: int, alpha: float) -> None:
    a, b, mask = rows(n, d), rows(n, d), torch.rand(n) < 0.7
    expected = np.linalg.norm(unit(a) - unit(b), axis=1) ** alpha
    close(alignment(a, b, alpha=alpha, reduction="none"), expected)
    close(alignment(a, b, alpha=alpha, reduction="sum"), expected.sum())
    close(alignment(a, b, alpha=alpha), expected.mean())
    close(AlignmentLoss(alpha)(a, b), expected.mean())
    close(alignment(a, b, alpha=alpha, mask=mask, reduction="none"), expected * mask.numpy())
    close(AlignmentLoss(alpha)(a, b, mask), (expected * mask.numpy()).sum() / max(int(mask.sum()), 1))


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("t", [2, 0.5, 500.0])
def test_uniformity_is_its_formula(n: int, d: int, t: float) -> None:
    x, mask = rows(n, d), torch.rand(n) < 0.7
    mask[:2] = True

    def formula(x: np.ndarray) -> float:
        exponents = [-t * float(((x[i] - x[j]) ** 2).sum()) for i in range(len(x)) for j in range(i)]
        top = max(exponents)
        return top + math.log(sum(math.exp(e - top) for e in exponents) / len(exponents))

    x, mask = x[:60], mask[:60]
    close(uniformity(x, t=t), formula(unit(x)))
    close(UniformityLoss(t)(x), formula(unit(x)))
    close(UniformityLoss(t)(x, mask), formula(unit(x)[mask.numpy()]))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_correlation_is_its_formula(n: int, d: int) -> None:
    a, b, mask = rows(n, d), rows(n, d) * 3 + 1, torch.rand(n) < 0.7
    mask[:2] = True
    kept = mask.numpy()

    def covariance_of(x: np.ndarray) -> float:
        c = np.cov(x.T).reshape(d, d)
        return float(((c**2).sum() - (np.diag(c) ** 2).sum()) / d)

    close(cross_correlation(a, b), correlation_of(a.numpy(), b.numpy()))
    close(CorrelationLoss("cross")(a, b, mask), correlation_of(a.numpy()[kept], b.numpy()[kept]))
    close(covariance(a), covariance_of(a.numpy()))
    close(covariance(a, mask=mask), covariance_of(a.numpy()[kept]))
    close(CorrelationLoss("covariance")(a, b), (covariance_of(a.numpy()) + covariance_of(b.numpy())) / 2)
    close(
        CorrelationLoss("covariance")(a, b, mask), (covariance_of(a.numpy()[kept]) + covariance_of(b.numpy()[kept])) / 2
    )


@pytest.mark.parametrize("d", [1, 2, 5])
def test_correlation_of_dimensions_that_hardly_vary_together(d: int) -> None:
    """The sum of all squares less those of the diagonal would be what rounding leaves, or negative."""
    for _ in range(20):
        x = torch.randn(400, d).double()
        x = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0]
        x = (x * torch.linspace(6, 600, d).double()).float()
        assert 0 <= covariance(x) <= 1e-12 * x.var(0).square().sum()
        assert 0 <= cross_correlation(x, x) < 1e-9


TERMS: dict[str, Callable[..., Tensor]] = {
    "alignment": alignment,
    "alignment of 1": lambda a, b, mask=None: alignment(a, b, alpha=1, mask=mask),
    "uniformity": lambda a, b, mask=None: uniformity(a, mask=mask) + uniformity(b, mask=mask),
    "cross": cross_correlation,
    "covariance": lambda a, b, mask=None: covariance(a, mask=mask) + covariance(b, mask=mask),
}
every_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


@every_term
def test_gradient(term: Callable[..., Tensor]) -> None:
    a, b = rows(5, 3).requires_grad_(), rows(5, 3).requires_grad_()
    mask = torch.tensor([True, False, True, True, True])
    assert torch.autograd.gradcheck(term, (a, b))
    assert torch.autograd.gradcheck(lambda a, b: term(a, b, mask=mask), (a, b))


@every_term
def test_masked_rows_give_nothing_even_if_nan(term: Callable[..., Tensor]) -> None:
    a, b = rows(5, 3), rows(5, 3)
    mask = torch.tensor([True, False, True, True, False])
    expected = term(a[mask], b[mask])
    a[~mask], b[~mask] = float("nan"), float("nan")
    a.requires_grad_()
    actual = term(a, b, mask=mask)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert a.grad.isfinite().all()
    assert torch.equal(a.grad[~mask], torch.zeros_like(a.grad[~mask]))


@every_term
@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_rows_are_zero_with_zero_gradient(term: Callable[..., Tensor], n: int) -> None:
    a, b = rows(n, 3).requires_grad_(), rows(n, 3)
    if n == 1 and term in (TERMS["alignment"], TERMS["alignment of 1"]):
        assert term(a, b) > 0  # one row does align
        return
    loss = term(a, b, mask=torch.zeros(n, dtype=torch.bool)) if n == 4 else term(a, b)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(a.grad, torch.zeros_like(a))


@every_term
def test_equal_rows_and_constant_dimensions_have_finite_gradients(term: Callable[..., Tensor]) -> None:
    a = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    loss = term(a, torch.ones(4, 3, dtype=torch.float64))
    loss.backward()
    assert loss.isfinite()
    assert a.grad.isfinite().all()


@every_term
def test_nan_shows(term: Callable[..., Tensor]) -> None:
    a = rows(4, 3)
    a[1, 2] = float("nan")
    assert term(a, rows(4, 3)).isnan()


@every_term
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_autocast_and_strides(term: Callable[..., Tensor], dtype: torch.dtype) -> None:
    a, b = rows(33, 24).to(dtype), rows(33, 24).to(dtype)
    expected = term(a.double(), b.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(term(a.T.contiguous().T, b), loss)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_uniformity_of_points_close_together_keeps_its_digits(spread: float) -> None:
    """Near collapse, which it is there to show, distances are differences of nearly equal numbers."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * spread + 1

    def run(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype, copy=True).requires_grad_()
        loss = function(leaf)
        return [loss.detach().double(), *torch.autograd.grad(loss, leaf)]

    ours, plains, right = run(uniformity, x.dtype), run(plain_pairs, x.dtype), run(plain_pairs, torch.float64)
    assert abs(ours[0] - right[0]) < 1e-6  # log-sum-exps of some 63 · 64 numbers near 1
    allowed = 2 * (plains[1] - right[1]).abs().max() + 4e-6 * right[1].abs().max()
    assert (ours[1] - right[1]).abs().max() <= allowed


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    leaf = x.to(dtype, copy=True).requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0].double()


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_s_gradient_is_as_exact_as_plain_pytorch_s(t: float) -> None:
    """Of rows all around, whose gradient is a tenth of the rows that it is a difference of."""
    x = torch.randn(300, 64)

    def plain(x: Tensor) -> Tensor:
        z = F.normalize(x, dim=1)
        scores = (2 * t * (z @ z.T - 1)).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        return scores.flatten().logsumexp(0)

    right = gradient(plain, x, torch.float64)
    ours = gradient(lambda x: uniformity(x, t=t), x, torch.float32) - right
    assert ours.norm() <= 1.5 * (gradient(plain, x, torch.float32) - right).norm()


def plain_pairs(x: Tensor) -> Tensor:
    return torch.pdist(F.normalize(x, dim=1)).square().mul(-2).exp().mean().log()


def test_uniformity_of_a_row_too_short_to_be_scaled_has_its_whole_gradient() -> None:
    """F.normalize divides it by 1e-12, so the part along the row stays."""
    for seed in range(20):
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x[0] *= 5e-13 / x[0].norm()
        torch.testing.assert_close(gradient(uniformity, x, x.dtype), gradient(plain_pairs, x, x.dtype))


def test_uniformity_of_a_crowd_and_an_outlier_is_as_exact_as_plain_pytorch() -> None:
    """The outlier comes first: gradients are not relative to it."""
    x = torch.randn(1, 32) + 1e-3 * torch.randn(200, 32)
    x[0] = torch.randn(32)

    right = gradient(plain_pairs, x, torch.float64)
    plains = (gradient(plain_pairs, x, torch.float32) - right).norm()
    assert (gradient(uniformity, x, torch.float32) - right).norm() <= 1.3 * plains


def test_compiles_as_one_graph() -> None:
    a, b, labels = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 0, -1, 2, 1])

    def everything(a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        (p0, mask), (p1, _) = batch_prototypes(a, labels), batch_prototypes(b, labels)
        return torch.stack([term(p0, p1, mask=mask) for term in TERMS.values()])

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b, labels), everything(a, b, labels))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: batch_prototypes(x[0], x), ValueError, r"batch_prototypes: features expected \(N, D\)"),
        (lambda x: batch_prototypes(x, x[:, 0]), TypeError, "batch_prototypes: assignments expected an int64"),
        (lambda x: batch_prototypes(x, torch.full((4,), -2)), ValueError, "assignments expected -1 or at least 0"),
        (lambda x: alignment(x, x[:2]), ValueError, r"alignment: x1 expected \(4, 3\) on cpu"),
        (lambda x: alignment(x, x, alpha=0.5), ValueError, "alignment: alpha expected at least 1, finite, got"),
        (lambda x: alignment(x, x, alpha="2"), TypeError, "alignment: alpha expected a number, got str '2'"),
        (lambda x: alignment(x, x, reduction="max"), ValueError, "alignment: reduction expected"),
        (lambda x: alignment(x, x, mask=x[:, 0]), TypeError, "alignment: mask expected a bool tensor"),
        (lambda x: uniformity(x, t=0), ValueError, "t expected a positive number that float32 can hold, got"),
        (lambda x: uniformity(x, mask=x[:2, 0] > 0), ValueError, r"uniformity: mask expected \(4,\) on cpu"),
        (lambda x: cross_correlation(x, x[:, :2]), ValueError, r"cross_correlation: x1 expected \(4, 3\) on cpu"),
        (lambda x: covariance(x[0]), ValueError, r"covariance: x expected \(N, D\)"),
        (lambda x: AlignmentLoss(0), ValueError, "AlignmentLoss: alpha expected at least 1"),
        (lambda x: UniformityLoss(-1), ValueError, "UniformityLoss: t expected a positive number"),
        (lambda x: CorrelationLoss("both"), ValueError, """kind expected "cross" or "covariance", got 'both'"""),
        (lambda x: CorrelationLoss("covariance")(x, x[:2]), ValueError, r"CorrelationLoss: x1 expected \(4, 3\)"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3))


def test_correlation_of_views_of_two_dtypes() -> None:
    x0, x1 = torch.randn(6, 4), torch.randn(6, 4)
    expected = CorrelationLoss()(x0.double(), x1.double())
    torch.testing.assert_close(CorrelationLoss()(x0.double(), x1), expected)
