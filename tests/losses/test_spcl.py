"""SPCL: its terms, their weights, and its classifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastproto.losses import NTXentLoss, SPCLLoss


def problem(n: int = 9, k: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """out0, out1 (N, 4), features0, features1 (N, 6), assignments."""
    embeddings = [torch.randn(n, d, dtype=dtype, requires_grad=True) for d in (4, 4, 6, 6)]
    return [*embeddings, torch.randint(-1, k, (n,))]


def test_terms_are_those_of_the_parts() -> None:
    loss_fn = SPCLLoss(6, 5, temperature=0.3).double()
    out0, out1, features0, features1, labels = inputs = problem()
    terms = loss_fn.forward_components(*inputs)
    torch.testing.assert_close(terms.contrast, NTXentLoss(0.3)(out0, out1))
    torch.testing.assert_close(terms.metric, loss_fn.metric(features0, features1, labels))
    logits = [loss_fn.classifier(features) for features in (features0, features1)]
    expected = sum(torch.nn.functional.cross_entropy(each, labels, ignore_index=-1) for each in logits)
    torch.testing.assert_close(terms.prototype, expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.0, 0.5)])
def test_weights(weights: tuple[float, float, float]) -> None:
    loss_fn = SPCLLoss(6, 5, 0.5, *weights).double()
    inputs = problem()
    terms = loss_fn.forward_components(*inputs)
    torch.testing.assert_close(loss_fn(*inputs), sum(w * term for w, term in zip(weights, terms, strict=True)))


def test_gradient_to_inputs_and_parameters() -> None:
    loss_fn = SPCLLoss(6, 5).double()
    *leaves, labels = problem(4)
    assert torch.autograd.gradcheck(lambda *leaves: loss_fn(*leaves, labels), leaves)
    loss_fn(*leaves, labels).backward()
    assert all((parameter.grad != 0).any() for parameter in loss_fn.parameters())


def test_reset_prototypes_draws_a_new_classifier_in_place() -> None:
    loss_fn = SPCLLoss(6, 5)
    weight, before = loss_fn.classifier.weight, loss_fn.classifier.weight.detach().clone()
    metric = loss_fn.metric.metric.weight.detach().clone()
    loss_fn.reset_prototypes()
    assert loss_fn.classifier.weight is weight
    assert (weight != before).all()
    assert 0.005 < float(weight.detach().std()) < 0.02
    assert not loss_fn.classifier.bias.any()
    assert torch.equal(loss_fn.metric.metric.weight, metric)


def test_empty_and_unassigned_batches() -> None:
    loss_fn = SPCLLoss(6, 5).double()
    loss = loss_fn(*problem(0))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in loss_fn.parameters())
    *leaves, labels = problem(3)
    terms = loss_fn.forward_components(*leaves, torch.full_like(labels, -1))
    assert terms.prototype.item() == 0
    assert terms.contrast.item() > 0
    assert terms.metric.item() > 0  # the two views of an image are a pair all the same


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_autocast(dtype: torch.dtype) -> None:
    loss_fn = SPCLLoss(6, 5)
    *leaves, labels = problem(9, dtype=torch.float32)
    halves = [leaf.detach().to(dtype) for leaf in leaves]
    expected = loss_fn(*(half.float() for half in halves), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(*halves, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_compiles_as_one_graph() -> None:
    loss_fn, inputs = SPCLLoss(6, 5), problem(dtype=torch.float32)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), loss_fn(*inputs))


def test_bad_input_is_refused_by_name() -> None:
    loss_fn = SPCLLoss(6, 5).double()
    *leaves, labels = problem()
    with pytest.raises(ValueError, match="SPCLLoss: assignments expected -1 or 0 to 4"):
        loss_fn(*leaves, labels.clamp(min=0) + 5)
    with pytest.raises(ValueError, match=r"SPCLLoss: features0 expected \(N, 6\) on cpu"):
        loss_fn(leaves[0], leaves[1], leaves[0], leaves[1], labels)
    with pytest.raises(ValueError, match="SPCLLoss: temperature expected a magnitude"):
        SPCLLoss(6, 5, temperature=0)
