"""The contrast against several sets of keys: one op that equals the contrast of each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops.test_contrast_kernels import BACKENDS, problem
from torch import Tensor

import fastproto
from fastproto.losses.functional import proto_nce
from fastproto.ops.contrast import contrast
from fastproto.ops.contrast_sets import contrast_sets

SIZES = (5, 300, 1)


def sets_problem(
    n: int, sizes: tuple[int, ...], d: int, device: str = "cpu", normalize: bool = True
) -> dict[str, Any]:
    """Sets that differ in size and targets; ignored rows, of which one is a NaN in all sets."""
    sets = [problem(n, k, d, grouped=False, normalize=normalize, device=device) for k in sizes]
    targets = torch.stack([one["targets"] for one in sets])
    targets[:, -1] = -1
    features = sets[0]["features"]
    features[-1] = math.nan
    return {
        "features": features,
        "keys": [one["keys"] for one in sets],
        "targets": targets,
        "scale": torch.cat([one["scale"] for one in sets]),
        "bias": torch.cat([one["bias"] for one in sets]),
    }


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, loss.numel(), device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def run(
    backend: str, arguments: dict[str, Any], dtype: torch.dtype, *, looped: bool, normalize: bool, mean: bool
) -> list[Tensor]:
    """Losses and all gradients, from the op or from the contrast of one set after another."""
    x, a, b, *ys = leaves = [
        value.to(dtype, copy=True).requires_grad_()
        for value in (arguments["features"], arguments["scale"], arguments["bias"], *arguments["keys"])
    ]
    targets = arguments["targets"]
    divisor = (targets >= 0).sum(1).clamp(min=1) if mean else None
    with fastproto.backend(backend):
        if not looped:
            loss = contrast_sets(x, ys, targets, a, b, normalize=normalize, divisor=divisor)
            return gradients_of(loss, leaves)
        sizes = [len(y) for y in ys]
        rows = [
            contrast(x, y, t, scale=a_g, bias=b_g, normalize=normalize).loss
            for y, t, a_g, b_g in zip(ys, targets, a.split(sizes), b.split(sizes), strict=True)
        ]
        loss = torch.stack(rows)
        return gradients_of(loss if divisor is None else loss.sum(1) / divisor, leaves)


def assert_close(ours: list[Tensor], exact: list[Tensor], eps: float) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= eps * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_contrast_of_each_set(normalize: bool, mean: bool) -> None:
    arguments = sets_problem(33, SIZES, 24)
    options = {"normalize": normalize, "mean": mean}
    ours = run("reference", arguments, torch.float64, looped=False, **options)
    assert_close(ours, run("reference", arguments, torch.float64, looped=True, **options), 1e-12)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_kernels_equal_the_reference(backend: str, device: str, normalize: bool) -> None:
    arguments = sets_problem(33, SIZES, 130, device, normalize)
    options = {"normalize": normalize, "mean": False}
    exact = run("reference", arguments, torch.float64, looped=True, **options)
    assert_close(run(backend, arguments, torch.float32, looped=False, **options), exact, 4e-6)


def test_gradients_by_finite_differences() -> None:
    arguments = sets_problem(4, (2, 3), 3)
    targets = arguments["targets"]
    leaves = [
        value.double().nan_to_num(0.5).requires_grad_()
        for value in (arguments["features"], arguments["scale"] / 10, arguments["bias"], *arguments["keys"])
    ]

    def loss(x: Tensor, a: Tensor, b: Tensor, *ys: Tensor) -> Tensor:
        return contrast_sets(x, ys, targets, a, b, normalize=True, divisor=torch.tensor([2.0, 5.0]))

    assert torch.autograd.gradcheck(loss, leaves)


def test_what_is_frozen_costs_nothing() -> None:
    """Frozen keys are not kept; among several, only those that ask get a gradient."""
    arguments = sets_problem(9, SIZES, 5)
    arguments["features"].requires_grad_()
    loss = contrast_sets(**arguments)
    assert [t.numel() for t in loss.grad_fn.saved_tensors if t is not None] == [3 * 45, 45]
    frozen_x = {**arguments, "features": arguments["features"].detach()}
    assert not contrast_sets(**frozen_x).requires_grad

    every = [y.clone().requires_grad_() for y in arguments["keys"]]
    some = [arguments["keys"][0], every[1], arguments["keys"][2]]
    expected = torch.autograd.grad(contrast_sets(**frozen_x | {"keys": every}).sum(), every[1])
    actual = torch.autograd.grad(contrast_sets(**frozen_x | {"keys": some}).sum(), every[1])
    assert torch.equal(actual[0], expected[0])


def test_sets_of_several_dtypes() -> None:
    """Half keys beside float64 ones: all is float64, and the half ones get half gradients."""
    arguments = sets_problem(9, (4, 6), 5)
    keys = [arguments["keys"][0].half().requires_grad_(), arguments["keys"][1].double().requires_grad_()]
    loss = contrast_sets(**arguments | {"keys": keys})
    exact = contrast_sets(**arguments | {"keys": [y.double() for y in keys]})
    assert loss.dtype == torch.float64
    assert torch.equal(loss, exact)
    loss[:, :-1].sum().backward()
    assert [y.grad.dtype for y in keys] == [torch.float16, torch.float64]


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_that_counts_is_zero_with_zero_gradient(n: int) -> None:
    arguments = sets_problem(3, SIZES, 5)
    features = arguments["features"][:n].requires_grad_()
    keys = [y.requires_grad_() for y in arguments["keys"]]
    targets = torch.full((3, n), -1)
    loss = contrast_sets(features, keys, targets, arguments["scale"], divisor=torch.ones(3), normalize=True)
    for value in (loss, *torch.autograd.grad(loss.sum(), [features, *keys])):
        assert torch.equal(value, torch.zeros_like(value))


def test_op_is_sound() -> None:
    arguments = sets_problem(9, SIZES, 5)
    arguments["features"][-1] = 1.0
    for need_dx in (False, True):
        torch.library.opcheck(torch.ops.fastproto.contrast_sets_fwd.default, (*arguments.values(), True, need_dx))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("numbers", [False, True])
def test_proto_nce_of_several_sets_equals_its_loop(reduction: str, numbers: bool) -> None:
    """With stats it takes one set after another."""
    arguments = sets_problem(9, SIZES, 5)
    x = arguments["features"].nan_to_num(1.0).double().requires_grad_()
    ys = [y.double().requires_grad_() for y in arguments["keys"]]
    phis = [0.1, 0.2, 0.5] if numbers else [torch.linspace(0.1, 1, k).double().requires_grad_() for k in SIZES]
    biases = None if numbers else [None, torch.linspace(-1, 1, SIZES[1]).double().requires_grad_(), None]
    labels = [torch.where(t < 0, 300, t).int() for t in arguments["targets"]]
    leaves = [value for value in (x, *ys, *phis, *(biases or [])) if isinstance(value, Tensor)]
    options = {"bias": biases, "reduction": reduction, "ignore_index": 300}
    ours = gradients_of(proto_nce(x, ys, labels, phis, **options), leaves)
    loop = gradients_of(proto_nce(x, ys, labels, phis, **options, return_stats=True)[0], leaves)
    assert_close(ours, loop, 1e-12)
