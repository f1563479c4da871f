"""Float32 on tensor cores: what the pairs of float16 rows keep, and what the losses make of them."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, on_gpu, run_interpreted
from ops.test_contrast_accuracy import assert_as_exact_as_plain_float32
from ops.test_contrast_kernels import assert_close, problem, run
from ops.test_contrast_triton import _small_tiles  # noqa: F401
from torch import Tensor

import fastproto
from fastproto.ops.contrast import contrast


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests of this file run here themselves")
def test_all_of_this_file_under_the_interpreter() -> None:
    run_interpreted(__file__)


def joined(x: Tensor) -> Tensor:
    """x again, in float64, from its halves."""
    from fastproto.kernels._halves import factor_rows

    halves, unit = factor_rows(x, torch.float32)
    assert unit is not None
    high, low = halves.double().chunk(2, 1)
    assert float(high.abs().max()) < 2**15
    return (high + low) * unit.double()[:, None]


@on_gpu
@pytest.mark.parametrize("d", [1, 24, 130])
def test_two_halves_keep_23_bits(d: int) -> None:
    """Of numbers over twelve orders of magnitude, in rows of any length: 2^-23 of each, 2^-39 of the row's largest."""
    x = torch.randn(33, d, device=DEVICE) * 10 ** torch.linspace(-12, 0, d, device=DEVICE)
    x *= 10.0 ** torch.linspace(-20, 25, 33, device=DEVICE)[:, None]
    error = (joined(x)[:, :d] - x.double()).abs()
    largest = x.double().abs().amax(1, keepdim=True)
    assert (error <= x.double().abs() * 2**-23 + largest * 2**-39).all()
    assert (joined(x)[:, d:] == 0).all()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_lose_nothing(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter gets bfloat16 wrong")
    x = torch.randn(7, 40, device=DEVICE).to(dtype)
    assert torch.equal(joined(x)[:, :40], x.double())


@on_gpu
def test_rows_of_any_stride_and_of_zeros() -> None:
    x = torch.randn(40, 66, device=DEVICE)
    for rows in (x.T, x[:, 1:50:3], x[::7], x[:1].expand(5, -1), x * 0):
        exact = rows.double()
        torch.testing.assert_close(joined(rows)[:, : rows.shape[1]], exact, rtol=2**-22, atol=0)


@on_gpu
@pytest.mark.parametrize("power", [-15, 15])
def test_lengths_far_from_one(power: int) -> None:
    """Raw rows of 1e±15 against raw keys of 1e∓15, as a classifier that diverges has them."""
    arguments = problem(33, 70, 24, device=DEVICE)
    spread = torch.linspace(0.01, 1, 70, device=DEVICE)[:, None]
    arguments["features"] *= 10.0**power
    arguments["keys"] *= 10.0**-power * spread
    assert_close(run("triton", arguments, torch.float32), run("reference", arguments, torch.float64), 4e-6)


@on_gpu
@pytest.mark.parametrize("d", [24, 130, *([] if INTERPRETED else [768])])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_as_exact_as_plain_float32(d: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastproto.ops.contrast.FEW_SCORES", 0)  # else PyTorch's products take wide rows
    # Under the interpreter a product is numpy's: the positive's logit has not the bits that it has among the others.
    assert_as_exact_as_plain_float32("triton", d, temperature, 2**-22 / temperature if INTERPRETED else 1e-7, DEVICE)


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of an overflow that is cut to 1
def test_logits_of_millions_have_finite_gradients() -> None:
    """There a logit and its log-sum-exp differ by more than 1 of rounding, and exp of that may not leave float16."""
    arguments = problem(33, 70, 130, grouped=False, device=DEVICE)
    arguments["scale"] = torch.full_like(arguments["scale"], 3e8)
    copies = arguments | {"features": arguments["keys"][:33].clone(), "targets": torch.arange(33, device=DEVICE)}
    for case in (arguments, copies):
        assert all(value.isfinite().all() for value in run("triton", case, torch.float32))


@on_gpu
def test_rows_sure_of_another_key_keep_their_digits() -> None:
    """p = 1, while exp(s - lse) lies above or below 1 by the rounding of lse: the keys' gradient is the sum of rows."""
    lengths = torch.linspace(65, 88, 64, device=DEVICE) / 14.3
    keys = torch.eye(2, 16, device=DEVICE).requires_grad_()
    features = lengths[:, None] * keys[:1].detach()
    with fastproto.backend("triton"):
        loss = contrast(features, keys, torch.ones(64, dtype=torch.int64, device=DEVICE), scale=14.3).loss
        gradient = torch.autograd.grad(loss.sum(), keys)[0]
    expected = 14.3 * float(lengths.double().sum())
    assert gradient[0, 0].item() == pytest.approx(expected, rel=3e-7)
    assert gradient[1, 0].item() == pytest.approx(-expected, rel=3e-7)


@on_gpu
def test_gradients_of_any_size() -> None:
    """Upstream gradients down to 1e-30, and rows of which one counts a million times the others."""
    arguments = problem(40, 300, 32, grouped=False, device=DEVICE)
    leaves = [arguments[name].requires_grad_() for name in ("features", "keys", "scale", "bias")]
    for upstream in (torch.linspace(1e-30, 3e-30, 40), torch.linspace(-1, 1, 40) ** 21):
        gradients = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            cast = {name: v.to(dtype) if v.is_floating_point() else v for name, v in arguments.items()}
            with fastproto.backend(backend):
                loss = contrast(**cast).loss
                gradients.append(torch.autograd.grad(loss, leaves, upstream.to(loss)))
        for ours, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=4e-6 * float(exact.abs().max()))
