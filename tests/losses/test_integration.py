"""Losses amid what surrounds them: compilers, checkpoints, second derivatives, tensors without data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastproto.losses import (
    AlignmentLoss,
    InfoNCELoss,
    NTXentLoss,
    PAUCLoss,
    ProtoNCELoss,
    SiameseMetricLoss,
    SPCLLoss,
    UniformityLoss,
    functional,
)
from fastproto.ops.siamese import siamese_all_pairs


def rows(n: int) -> Tensor:
    return torch.randn(n, 8, requires_grad=True)


PROTOTYPES, QUEUE = torch.randn(5, 8), torch.randn(20, 8)
STEPS: dict[str, tuple[nn.Module, Callable[[int], tuple]]] = {
    "nt_xent": (NTXentLoss(), lambda n: (rows(n), rows(n))),
    "bank": (NTXentLoss(0.5, (16, 8)), lambda n: (rows(n), rows(n))),
    "info_nce": (InfoNCELoss(), lambda n: (rows(n), rows(n))),
    "queue": (InfoNCELoss(), lambda n: (rows(n), rows(n), QUEUE)),
    "proto_nce": (ProtoNCELoss(), lambda n: (rows(n), PROTOTYPES, torch.arange(n) % 5, 0.2)),
    "spcl": (SPCLLoss(8, 4), lambda n: (rows(n), rows(n), rows(n), rows(n), torch.arange(n) % 4)),
    "pauc": (PAUCLoss(), lambda n: (rows(n), rows(n), PROTOTYPES, torch.arange(n) % 5, 0.2, QUEUE)),
    "uniformity": (UniformityLoss(), lambda n: (rows(n),)),
    "alignment": (AlignmentLoss(), lambda n: (rows(n), rows(n))),
}


@pytest.mark.parametrize("name", STEPS)
def test_compiled_once_for_all_sizes_of_a_batch(name: str) -> None:
    """Once for the first, and once for all that come after it."""
    torch.compiler.reset()
    loss, make = STEPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (6, 8, 10, 14):
        step(*make(n)).backward()
    assert counter.frame_count == 2


def test_a_compiled_mean_is_the_mean() -> None:
    x0, x1 = rows(6), rows(6)
    for loss, args in ((NTXentLoss(), (x0, x1)), (InfoNCELoss(), (x0, x1, QUEUE)), (InfoNCELoss(), (x0, x1))):
        expected = loss(*args)
        found = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)(*args)
        torch.testing.assert_close(found, expected)
        assert found.dtype == torch.float32
        torch.testing.assert_close(torch.autograd.grad(found, x0), torch.autograd.grad(expected, x0))


def bank_gradient(reentrant: bool | None) -> Tensor:
    torch.manual_seed(0)
    encoder, loss = nn.Linear(8, 8), NTXentLoss(0.3, memory_bank_size=(16, 8))
    for _ in range(2):  # a bank that holds what an earlier step put there
        x0, x1 = encoder(torch.randn(6, 8)), encoder(torch.randn(6, 8))
        found = loss(x0, x1) if reentrant is None else checkpoint(loss, x0, x1, use_reentrant=reentrant)
        encoder.weight.grad = None
        found.backward()
    assert encoder.weight.grad is not None
    return encoder.weight.grad


def test_a_bank_is_not_recomputed_once_it_has_gone_on() -> None:
    torch.testing.assert_close(bank_gradient(reentrant=True), bank_gradient(reentrant=None))
    with pytest.raises(RuntimeError, match=r"NTXentLoss: recomputed with a memory bank that has gone on"):
        bank_gradient(reentrant=False)


def test_second_derivatives_are_refused_where_few_arguments_have_first_ones() -> None:
    bank, metric = NTXentLoss(0.3, (16, 8)), SiameseMetricLoss(8)
    metric.metric.weight.requires_grad_(False)
    key, same = rows(6), torch.arange(6) % 3
    images, weight, bias = torch.arange(6) // 2, torch.ones(8), torch.zeros((), requires_grad=True)
    for loss, leaf in (
        (bank(rows(6), key), key),
        (metric(torch.randn(6, 8), torch.randn(6, 8), same), metric.metric.bias),
        (sum(siamese_all_pairs(torch.randn(6, 8), images, same, weight, bias)), bias),
    ):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()


def test_keys_of_a_bank_have_the_gradient_of_the_formula() -> None:
    loss, x0, x1 = NTXentLoss(0.3, (16, 8)).double(), rows(6).double().detach(), rows(6).double().detach()
    assert loss.bank is not None
    bank, x0, x1 = loss.bank.clone(), x0.requires_grad_(), x1.requires_grad_()
    unit0, unit1 = F.normalize(x0, dim=1), F.normalize(x1, dim=1)
    scores = torch.cat([(unit0 * unit1).sum(1, keepdim=True), unit0 @ bank.T], dim=1) / 0.3
    expected = torch.autograd.grad(F.cross_entropy(scores, torch.zeros(6, dtype=torch.int64)), (x0, x1))
    torch.testing.assert_close(torch.autograd.grad(loss(x0, x1), (x0, x1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_data_give_shapes(dtype: torch.dtype) -> None:
    x0, x1 = torch.empty(2, 4, 8, device="meta", dtype=dtype)
    queue, labels = torch.empty(9, 8, device="meta"), torch.empty(4, device="meta", dtype=torch.int64)
    found = [
        functional.nt_xent(x0, x1),
        functional.info_nce(x0, x1, queue),
        functional.proto_nce(x0, queue, labels, 0.2),
        functional.covariance(x0),
        functional.cross_correlation(x0, x1),
        functional.uniformity(x0),
        PAUCLoss()(x0, x1, queue, labels, 0.2, queue),
    ]
    assert all(loss.shape == () and loss.is_meta for loss in found)


def test_terms_may_be_changed_in_place() -> None:
    torch.manual_seed(0)
    terms = PAUCLoss().forward_components(rows(8), rows(8), PROTOTYPES, torch.arange(8) % 3, 0.2)
    for first, second in ((terms.align, terms.uniform), (terms.uniform, terms.correlation)):
        first += second
        first.backward(retain_graph=True)


def test_a_learnt_temperature_may_have_one_dimension() -> None:
    """FSDP2 shards no parameter without."""
    x0, x1 = rows(6), rows(6)
    for make in (NTXentLoss, InfoNCELoss, lambda temperature: NTXentLoss(temperature, (16, 8))):
        gradients = []
        for shape in ((), (1,)):
            torch.manual_seed(0)
            temperature = nn.Parameter(torch.full(shape, 0.3))
            gradients += torch.autograd.grad(make(temperature)(x0, x1), temperature)
        torch.testing.assert_close(gradients[0], gradients[1][0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"out0 expected .*, got a nested float32 tensor on cpu"):
        NTXentLoss()(nested, torch.randn(3, 4))
