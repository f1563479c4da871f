"""PAUC: its terms against loops over prototypes, their weights, and degenerate batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.losses import InfoNCELoss, PAUCLoss, ProtoNCELoss


def problem(n: int = 33, k: int = 7, d: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "query": torch.randn(n, d, dtype=dtype, requires_grad=True),
        "key": torch.randn(n, d, dtype=dtype, requires_grad=True),
        "prototypes": torch.randn(k, d, dtype=dtype),
        "assignments": torch.randint(-1, k, (n,)),
        "concentration": torch.rand(k, dtype=dtype) + 0.2,
        "queue": torch.randn(16, d, dtype=dtype),
    }


def spanned_prototypes(x: Tensor, labels: Tensor) -> np.ndarray:
    rows = x.detach().numpy() / np.linalg.norm(x.detach().numpy(), axis=1, keepdims=True)
    means = [rows[labels.numpy() == y].mean(0) for y in sorted(set(labels.tolist()) - {-1})]
    return np.array([mean / np.linalg.norm(mean) for mean in means])


def oracle(arguments: dict[str, Any], t: float, correlation: str) -> list[float]:
    """align, uniform and correlation by their formulas."""
    p, q = (spanned_prototypes(arguments[name], arguments["assignments"]) for name in ("query", "key"))
    count, d = p.shape

    def potential(p: np.ndarray) -> float:
        pairs = [math.exp(-t * ((p[i] - p[j]) ** 2).sum()) for i in range(count) for j in range(count) if i != j]
        return math.log(sum(pairs) / len(pairs))

    if correlation == "cross":
        zp, zq = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-8) for x in (p, q))
        r = zp.T @ zq / count
        off_diagonal = (r**2).sum() - (np.diag(r) ** 2).sum()
        spread = ((1 - np.diag(r)) ** 2).sum() + 0.0051 * off_diagonal
    else:
        covariances = [np.cov(each.T) for each in (p, q)]
        spread = sum(((c**2).sum() - (np.diag(c) ** 2).sum()) / d for c in covariances) / 2
    return [((p - q) ** 2).sum(1).mean(), (potential(p) + potential(q)) / 2, float(spread)]


@pytest.mark.parametrize("correlation", ["cross", "covariance"])
@pytest.mark.parametrize("with_queue", [True, False])
def test_terms_are_their_formulas(correlation: str, with_queue: bool) -> None:
    arguments = problem()
    if not with_queue:
        del arguments["queue"]
    terms = PAUCLoss(0.3, uniform_t=1.5, correlation=correlation).forward_components(**arguments)
    query, key, *sets = (arguments[name] for name in ("query", "key", "prototypes", "assignments", "concentration"))
    torch.testing.assert_close(terms.info_nce, InfoNCELoss(0.3)(query, key, arguments.get("queue")))
    torch.testing.assert_close(terms.proto_nce, ProtoNCELoss()(query, *sets))
    expected = torch.tensor(oracle(arguments, 1.5, correlation), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(terms[2:]), expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 2.0, 0.5)])
def test_weights(weights: tuple[float, float, float]) -> None:
    loss_fn, arguments = PAUCLoss(0.2, *weights), problem()
    terms = loss_fn.forward_components(**arguments)
    expected = sum(w * term for w, term in zip((1.0, 1.0, *weights), terms, strict=True))
    torch.testing.assert_close(loss_fn(**arguments), expected)


def test_several_sets_are_their_mean() -> None:
    arguments, other = problem(), problem(k=3)
    names = ("prototypes", "assignments", "concentration")
    loss_fn = PAUCLoss()
    both = loss_fn.forward_components(**{**arguments, **{name: [arguments[name], other[name]] for name in names}})
    first = loss_fn.forward_components(**arguments)
    second = loss_fn.forward_components(**{**arguments, **{name: other[name] for name in names}})
    for actual, *singles in zip(both, first, second, strict=True):
        torch.testing.assert_close(actual, sum(singles) / 2)


def test_gradient() -> None:
    arguments = problem(6, 3, 4)
    arguments["assignments"] = torch.tensor([0, 1, 0, -1, 2, 1])
    rest = {name: value for name, value in arguments.items() if name not in ("query", "key")}
    loss_fn = PAUCLoss()

    def terms(query: Tensor, key: Tensor) -> Tensor:
        # Without InfoNCE, which is constant in the keys on purpose and so is no function that a difference can check.
        return torch.stack(loss_fn.forward_components(query=query, key=key, **rest)[1:])

    assert torch.autograd.gradcheck(terms, (arguments["query"], arguments["key"]))


@pytest.mark.parametrize("labels", [[-1, -1, -1, -1], [2, 2, 2, 2], [-1, 2, 2, -1]])
def test_fewer_than_two_prototypes_are_zero_with_zero_gradient(labels: list[int]) -> None:
    arguments = problem(4) | {"assignments": torch.tensor(labels)}
    terms = PAUCLoss().forward_components(**arguments)
    assert [term.item() for term in terms[2:]] == [0, 0, 0]
    sum(terms[2:]).backward()
    for name in ("query", "key"):
        assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name]))


def test_empty_batch_is_zero_with_zero_gradient() -> None:
    arguments = problem(0)
    loss = PAUCLoss()(**arguments)
    loss.backward()
    assert loss.item() == 0
    assert arguments["query"].grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_autocast(dtype: torch.dtype) -> None:
    arguments = problem(dtype=torch.float32)
    for name in ("query", "key", "queue"):
        arguments[name] = arguments[name].to(dtype)
    doubles = {name: v.double() if v.is_floating_point() else v for name, v in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = PAUCLoss()(**arguments)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), PAUCLoss()(**doubles), rtol=1e-4, atol=1e-5)


def test_compiles_as_one_graph() -> None:
    arguments = problem(9, dtype=torch.float32)
    compiled = torch.compile(PAUCLoss(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments), PAUCLoss()(**arguments))


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="PAUCLoss: temperature expected at least 1e-8"):
        PAUCLoss(temperature=0.0)
    with pytest.raises(ValueError, match="PAUCLoss: uniform_t expected a positive number"):
        PAUCLoss(uniform_t=0.0)
    with pytest.raises(ValueError, match='PAUCLoss: correlation expected "cross" or "covariance"'):
        PAUCLoss(correlation="none")
    arguments = problem()
    with pytest.raises(ValueError, match=r"PAUCLoss: key expected \(33, 5\) on cpu, got float64 \(2, 5\)"):
        PAUCLoss()(**{**arguments, "key": arguments["key"][:2]})
    with pytest.raises(ValueError, match="proto_nce: assignments expected -1 or 0 to 6"):
        PAUCLoss()(**{**arguments, "assignments": torch.full((33,), 7)})
