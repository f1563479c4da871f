"""Plain CPU tensors go past the dispatcher where nobody could tell; second derivatives are refused."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastproto
from fastproto import _settings
from fastproto.ops import _dispatch
from fastproto.ops.contrast import contrast
from fastproto.ops.contrast_sets import contrast_sets
from fastproto.ops.siamese import siamese_pairs


class Named(Tensor):
    pass


class Seen(TorchDispatchMode):
    """Keeps the names of fastproto's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastproto":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def goes_straight(*args: Any) -> bool:
    return _dispatch._goes_straight_to_the_cpu(args)


def test_plain_tensors_go_straight() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert goes_straight(x, None, 1.5, x.detach()[:, 1], torch.nn.Parameter(x), torch.arange(3))
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            assert goes_straight(x)


def test_what_the_dispatcher_handles_does_not() -> None:
    negated = torch.view_as_complex(torch.ones(3, 2)).conj().imag
    with FakeTensorMode():
        fake = torch.ones(3)
    others = [negated, fake, torch.ones(3, device="meta"), torch.ones(3).as_subclass(Named)]
    for other in [*others, torch._efficientzerotensor(3)]:
        assert not goes_straight(torch.ones(3), other)
    for mode in (Seen(), SeenFunctions(), FakeTensorMode(), torch.profiler.profile(acc_events=True)):
        with mode:
            assert not goes_straight(torch.ones(3))
    seen = []
    torch.func.grad(lambda x: seen.append(goes_straight(x)) or x.sum())(torch.ones(3))
    torch.vmap(lambda x: seen.append(goes_straight(x)) or x)(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit.trace is deprecated
        torch.jit.trace(lambda x: seen.append(goes_straight(x)) or x, torch.ones(3), check_trace=False)
    assert seen == [False, False, False]


def test_both_ways_give_the_same_and_a_mode_sees_the_ops() -> None:
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)

    def results() -> list[Tensor]:
        loss = contrast(x, y, torch.tensor([0, 3, -1, 6, 2]), scale=3.0, divisor=4, stats=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, [x, y])]

    with Seen() as seen:
        through = results()
    assert seen.names == ["contrast_fwd", "contrast_bwd_keys"]
    assert all(map(torch.equal, results(), through))


def test_a_lazily_negated_input_is_negated() -> None:
    x = torch.view_as_complex(torch.randn(5, 4, 2)).conj().imag
    keys, targets = torch.randn(7, 4), torch.tensor([0, 3, -1, 6, 2])
    assert x.is_neg()
    assert torch.equal(contrast(x, keys, targets).loss, contrast(x.clone(), keys, targets).loss)
    # An op that takes a list of tensors, where one hides.
    keys, scale, targets = torch.randn(5, 4), torch.ones(10), torch.zeros(2, 5).long()
    ours, expected = (contrast_sets(keys, [keys, y], targets, scale) for y in (x, x.clone()))
    assert torch.equal(ours, expected)


def test_an_index_without_memory_of_its_own_is_read_by_pytorch() -> None:
    """Subclasses, negated views and zero tensors have an address that is not their data's, or none."""
    features, keys, index = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 3, 1, 4])
    expected = contrast(features, keys, index).loss
    assert torch.equal(contrast(features, keys, torch._neg_view(-index)).loss, expected)
    assert torch.equal(contrast(features, keys, TwoTensor(index, index.clone())).loss.a, expected)
    zeros = torch._efficientzerotensor(4, dtype=torch.int64)
    assert torch.equal(contrast(features, keys, zeros).loss, contrast(features, keys, torch.zeros_like(index)).loss)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert contrast(features, keys, mode.from_tensor(index)).loss.shape == (4,)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("divisor", [5.0, None])
def test_a_penalty_on_the_gradient_of_a_loss_is_refused(backend: str | None, divisor: float | None) -> None:
    """Where nothing comes before the loss, its upstream gradient is 1 and wants none."""
    x, keys = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    with fastproto.backend(backend) if backend else nullcontext():
        loss = contrast(x, keys, torch.tensor([0, 3, -1, 6, 2]), divisor=divisor).loss.sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("ours", [True, False])
def test_what_was_saved_is_read_once(ours: bool) -> None:
    """As checkpointing without re-entrance allows, be the first derivative alone wanted with its graph."""
    x, keys, targets = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3), torch.tensor([0, 3, -1, 6, 2])
    weight = torch.randn(3, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        if ours:
            return contrast(x * weight, keys, targets, divisor=5.0).loss
        return siamese_pairs(x * weight, keys[:5], targets.clamp(-1, 1), weight, keys[0, 0])

    expected = torch.autograd.grad(loss(x).sum(), (x, weight))
    kept = checkpoint(loss, x, use_reentrant=False).sum()
    found = torch.autograd.grad(kept, (x, weight), create_graph=True)
    assert all(map(torch.equal, found, expected))


def test_triton_is_not_chosen_where_it_could_not_build_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _dispatch.unavailable("triton", "cuda") == ""
    monkeypatch.setattr(_settings, "c_compiler", "")
    assert _dispatch.unavailable("triton", "cuda").startswith("Triton finds no C compiler")
    assert _dispatch.OPS["contrast_fwd"].choose("cuda") == "reference"
