"""The siamese ops against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto.ops.siamese import AllPairs, siamese_all_pairs, siamese_pairs
from fastproto.reference import siamese as reference

LEAVES = ("features", "weight", "bias")


def metric(a: list[float], b: list[float], same: bool, weight: list[float], bias: float) -> float:
    logit = sum(w * abs(x - y) for w, x, y in zip(weight, a, b, strict=True)) + bias
    return math.log1p(math.exp(-logit if same else logit))


def problem(n: int, c: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows of which some share an image, some a prototype, some have none, and two are equal."""
    features = torch.randn(n, c, dtype=torch.float64)
    features[n // 2] = features[0]
    return {
        "features": features.to(dtype).requires_grad_(),
        "images": torch.randint(0, max(1, n // 2), (n,)),
        "prototypes": torch.randint(-1, 4, (n,)),
        "weight": torch.randn(c, dtype=torch.float64).div(c).to(dtype).requires_grad_(),
        "bias": torch.randn((), dtype=torch.float64).to(dtype).requires_grad_(),
    }


def oracle(arguments: dict[str, Tensor], ignore_index: int = -1) -> list[float]:
    x, images, prototypes, weight, bias = (arguments[name].detach().tolist() for name in arguments)
    kinds: list[list[float]] = [[], [], []]
    for i in range(len(x)):
        for j in range(i):
            if images[i] == images[j]:
                kinds[0].append(metric(x[i], x[j], True, weight, bias))
            elif ignore_index not in (prototypes[i], prototypes[j]):
                same = prototypes[i] == prototypes[j]
                kinds[1 if same else 2].append(metric(x[i], x[j], same, weight, bias))
    return [sum(kind) / max(len(kind), 1) for kind in kinds]


@pytest.mark.parametrize(("n", "c"), [(1, 24), (2, 1), (33, 96), (16, 130)])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_all_pairs_is_its_formula(n: int, c: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", block)
    arguments = problem(n, c)
    terms = siamese_all_pairs(**arguments)
    for name, value, expected in zip(AllPairs._fields, terms, oracle(arguments), strict=True):
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), msg=name)


@pytest.mark.parametrize("block", [40, 2**22])
def test_all_pairs_gradient(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", block)
    arguments = problem(6, 3)
    arguments["features"].data[3] += 0.5  # |a - b| has no derivative where two rows are equal
    fixed = {name: arguments[name] for name in ("images", "prototypes")}
    leaves = tuple(arguments[name] for name in LEAVES)
    assert torch.autograd.gradcheck(
        lambda *values: siamese_all_pairs(**dict(zip(LEAVES, values, strict=True)), **fixed), leaves
    )


def test_all_pairs_gradient_has_the_digits_of_float64() -> None:
    """Of one term, whose mean is over a number of pairs that is no power of two."""
    arguments = problem(6, 3) | {"images": torch.arange(6), "prototypes": torch.tensor([0, 0, 0, 1, 1, 1])}
    x, weight, bias = (arguments[name] for name in LEAVES)
    siamese_all_pairs(**arguments).same_prototype.backward()
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]).T
    rows = x.detach().requires_grad_()
    logits = (rows[pairs[0]] - rows[pairs[1]]).abs() @ weight.detach() + bias.detach()
    torch.nn.functional.softplus(-logits).mean().backward()
    torch.testing.assert_close(x.grad, rows.grad, rtol=1e-12, atol=1e-14)


def test_a_row_without_prototype_meets_only_its_own_image() -> None:
    arguments = problem(8, 5)
    arguments["images"] = torch.arange(4).repeat(2)
    arguments["prototypes"] = torch.tensor([0, 0, 1, -1]).repeat(2)
    terms = siamese_all_pairs(**arguments)
    terms.same_prototype.backward(retain_graph=True)
    terms.different_prototype.backward(retain_graph=True)
    gradient = arguments["features"].grad
    assert torch.equal(gradient[[3, 7]], torch.zeros(2, 5, dtype=torch.float64))
    assert (gradient[:3] != 0).any()
    terms.same_image.backward()
    assert (arguments["features"].grad[3] != 0).any()
    shifted = {**arguments, "prototypes": arguments["prototypes"] + 1}
    for a, b in zip(siamese_all_pairs(**shifted, ignore_index=0), terms, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [0, 1])
def test_no_pair_is_zero_with_zero_gradient(n: int) -> None:
    arguments = problem(1, 3)
    arguments["features"] = torch.randn(n, 3, requires_grad=True)
    arguments["images"], arguments["prototypes"] = torch.arange(n), torch.arange(n)
    terms = siamese_all_pairs(**arguments)
    assert [term.item() for term in terms] == [0, 0, 0]
    sum(terms).backward()
    for name in LEAVES:
        assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name]))


@pytest.mark.parametrize(("n", "c"), [(1, 24), (33, 1), (507, 130)])
def test_pairs_is_its_formula(n: int, c: int) -> None:
    a, b = torch.randn(2, n, c, dtype=torch.float64).unbind()
    same = torch.randint(-1, 2, (n,))
    weight, bias = torch.randn(c, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    rows = zip(a.tolist(), b.tolist(), same.tolist(), strict=True)
    expected = [0.0 if t == -1 else metric(x, y, bool(t), weight.tolist(), -0.3) for x, y, t in rows]
    actual = siamese_pairs(a, b, same, weight, bias)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    kept = same != -1
    torch.testing.assert_close(siamese_pairs(a[kept], b[kept], same[kept] == 1, weight, bias), actual[kept])
    torch.testing.assert_close(siamese_pairs(a, b, same.where(kept, 7).int(), weight, bias, ignore_index=7), actual)


def test_pairs_gradient() -> None:
    a, b = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    weight, bias = torch.randn(3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    same = torch.tensor([1, 0, -1, 1])
    leaves = tuple(value.requires_grad_() for value in (a, b, weight, bias))
    assert torch.autograd.gradcheck(lambda a, b, w, beta: siamese_pairs(a, b, same, w, beta), leaves)


def test_an_ignored_pair_gives_nothing_even_if_nan() -> None:
    a, b, weight = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.randn(3, requires_grad=True)
    a.data[1] = float("nan")
    siamese_pairs(a, b, torch.tensor([1, -1]), weight, torch.tensor(0.0)).sum().backward()
    assert weight.grad.isfinite().all()
    assert torch.equal(a.grad[1], torch.zeros(3))


def test_equal_rows_have_no_gradient_and_nan_shows() -> None:
    a, weight = torch.ones(2, 3, requires_grad=True), torch.randn(3)
    siamese_pairs(a, torch.ones(2, 3), torch.tensor([1, 0]), weight, torch.tensor(0.0)).sum().backward()
    assert torch.equal(a.grad, torch.zeros(2, 3))
    features = torch.tensor([[float("nan")], [0.0], [1.0]])
    images, prototypes = torch.arange(3), torch.tensor([0, 0, 1])
    terms = siamese_all_pairs(features, images, prototypes, torch.ones(1), torch.tensor(0.0))
    assert terms.same_prototype.isnan()


def test_large_logits_stay_exact() -> None:
    a, b = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 100.0, dtype=torch.float64)
    loss = siamese_pairs(a, b, torch.tensor([1, 0]), torch.ones(1, dtype=torch.float64), torch.tensor(0.0).double())
    torch.testing.assert_close(loss, torch.tensor([math.exp(-100), 100.0], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    arguments = problem(33, 130, dtype)
    terms = siamese_all_pairs(**arguments)
    for term, expected in zip(terms, oracle(arguments), strict=True):
        assert term.dtype == torch.float32
        assert abs(term.item() - expected) < 1e-5
    exact = {name: value.double() if name in LEAVES else value for name, value in arguments.items()}
    leaves = [arguments[name] for name in LEAVES]
    expected = torch.autograd.grad(sum(siamese_all_pairs(**exact)), leaves)
    for a, b in zip(torch.autograd.grad(sum(terms), leaves), expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_does_not_lower() -> None:
    arguments = problem(9, 24, torch.float32)
    expected = siamese_all_pairs(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(siamese_all_pairs(**arguments), expected, strict=True))


def test_strides_do_not_matter() -> None:
    arguments = problem(9, 24)
    loose = {**arguments, "features": arguments["features"].T.contiguous().T}
    for a, b in zip(siamese_all_pairs(**loose), siamese_all_pairs(**arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", 120)
    arguments = problem(6, 5)
    leaves = [arguments[name] for name in LEAVES]
    compiled = torch.compile(siamese_all_pairs, fullgraph=True, backend="eager")
    actual, expected = sum(compiled(**arguments)), sum(siamese_all_pairs(**arguments))
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.ones(4)}, ValueError, r"siamese_all_pairs: features expected \(N, C\), got float32 \(4,\)"),
        ({"images": torch.zeros(3).long()}, ValueError, r"siamese_all_pairs: images expected \(4,\) on cpu, got int64"),
        ({"prototypes": torch.zeros(4)}, TypeError, "siamese_all_pairs: prototypes expected an int64 or int32 tensor"),
        ({"prototypes": torch.full((4,), -2)}, ValueError, "prototypes expected -1 or at least 0, got values from -2"),
        (
            {"weight": torch.ones(3)},
            ValueError,
            r"siamese_all_pairs: weight expected \(2,\) on cpu, got float32 \(3,\)",
        ),
        ({"bias": torch.ones(1)}, ValueError, r"siamese_all_pairs: bias expected \(\) on cpu, got float32 \(1,\)"),
    ],
)
def test_all_pairs_refuses_bad_input_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        siamese_all_pairs(**{**problem(4, 2, torch.float32), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": None}, TypeError, r"siamese_pairs: a expected a float32 .* tensor \(N, C\), got NoneType None"),
        ({"b": torch.ones(4, 3)}, ValueError, r"siamese_pairs: b expected \(4, 2\) on cpu, got float32 \(4, 3\)"),
        ({"same": torch.ones(4)}, TypeError, "siamese_pairs: same expected a bool or int64 or int32 tensor"),
        (
            {"same": torch.full((4,), 2)},
            ValueError,
            "siamese_pairs: same expected -1 or 0 to 1, got values from 2 to 2",
        ),
    ],
)
def test_pairs_refuses_bad_input_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"a": torch.ones(4, 2), "b": torch.ones(4, 2), "same": torch.ones(4).long()} | changes
    with pytest.raises(error, match=message):
        siamese_pairs(**arguments, weight=torch.ones(2), bias=torch.tensor(0.0))
