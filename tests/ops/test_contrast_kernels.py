"""The compiled kernels of the contrast op against the float64 reference, at sizes that reach every path in them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.ops.contrast import contrast, contrast_unchecked

needs_cpp = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
BACKENDS = [pytest.param("cpp", "cpu", marks=needs_cpp)]
LEAVES = ("features", "keys", "scale", "bias")
# One row with keys split into segments; rows beyond one chunk; keys beyond one block; D off every vector width.
SHAPES = [(1, 1, 1), (1, 9000, 24), (33, 507, 130), (1000, 300, 96), (5, 2, 3), (64, 2100, 128)]


def problem(
    n: int, k: int, d: int, *, grouped: bool = True, normalize: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Duplicate targets, ignored rows, temperatures down to 0.05, biases, groups; unit rows, unless they are to be."""
    generator = torch.Generator().manual_seed(n + 7 * k + 31 * d)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out: dict[str, Any] = {
        "features": torch.nn.functional.normalize(randn(n, d), dim=1),
        "keys": torch.nn.functional.normalize(randn(k, d), dim=1),
        "targets": torch.randint(-1, k, (n,), generator=generator),
        "scale": 1 + 19 * torch.rand(k, generator=generator),
        "bias": randn(k),
    }
    if grouped:
        out["groups"] = torch.randint(0, 5, (n,), generator=generator)
        out["key_groups"] = torch.randint(0, 5, (k,), generator=generator)
    if normalize:
        out["features"] *= torch.linspace(0.5, 20, n)[:, None]
        out["keys"] *= torch.linspace(0.1, 3, k)[:, None]
        out["normalize"] = True
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in out.items()}


def run(backend: str, arguments: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The five results, and the gradients of all that may have one for a fixed upstream gradient."""
    cast = dict(arguments)
    for name in LEAVES:
        cast[name] = cast[name].to(dtype)
    leaves = [cast[name].requires_grad_() for name in LEAVES]
    with fastproto.backend(backend):
        rows = contrast(**cast)
        upstream = torch.linspace(-1, 1, len(rows.loss), device=rows.loss.device).to(rows.loss.dtype)
        return [*(row.detach() for row in rows), *torch.autograd.grad(rows.loss, leaves, upstream)]


def op_arguments(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """As the op's schema has them, up to normalize."""
    features, keys, targets, scale, *rest = arguments.values()
    return (features, keys, targets, scale, 1.0, *rest, *([] if "normalize" in arguments else [False]))


def one_scale(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Likewise, with one number as scale and no bias."""
    features, keys, targets, _, _, groups, key_groups = arguments.values()
    return features, keys, targets, None, 2.5, None, groups, key_groups, False


def assert_close(ours: list[Tensor], exact: list[Tensor], eps: float) -> None:
    names = ("loss", "lse", "entropy", "top1", "positive", *LEAVES)
    for name, a, b in zip(names, ours, exact, strict=True):
        if name == "top1":
            assert torch.equal(a.cpu(), b.cpu())
            continue
        error = (a.double() - b.double()).abs().max() if a.numel() else torch.zeros(())
        assert error <= eps * b.abs().max().clamp(min=1e-3), f"{name}: {float(error):.2e}"


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_reference(
    backend: str, device: str, shape: tuple[int, int, int], grouped: bool, normalize: bool
) -> None:
    arguments = problem(*shape, grouped=grouped, normalize=normalize, device=device)
    assert_close(run(backend, arguments, torch.float32), run("reference", arguments, torch.float64), 4e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_rows_are_summed_in_float32(
    backend: str, device: str, dtype: torch.dtype, normalize: bool
) -> None:
    """Against the reference on the same rounded inputs, so that only the arithmetic is judged."""
    arguments = problem(33, 507, 96, normalize=normalize, device=device)
    for name in LEAVES:
        arguments[name] = arguments[name].to(dtype).float()
    ours, exact = run(backend, arguments, dtype), run("reference", arguments, torch.float64)
    assert all(row.dtype == torch.float32 for row in ours[:3])
    assert all(gradient.dtype == dtype for gradient in ours[5:])
    assert_close(ours[:5] + exact[5:], exact, 4e-6)
    assert_close(exact[:5] + ours[5:], exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_vectors_may_have_any_stride(backend: str, device: str) -> None:
    """A column of a table of assignments, every second entry, one entry for all."""
    arguments = problem(20, 50, 24, device=device)
    expected = run(backend, arguments, torch.float32)
    for name in ("targets", "scale", "bias", "groups", "key_groups"):
        value = arguments[name]
        column = torch.stack([torch.zeros_like(value), value, torch.ones_like(value)], 1)[:, 1]
        assert not column.is_contiguous()
        for a, b in zip(run(backend, arguments | {name: column}, torch.float32), expected, strict=True):
            assert torch.equal(a, b), name
    arguments["targets"] = torch.tensor([3], device=device).expand(20)
    expanded = run(backend, arguments, torch.float32)
    arguments["targets"] = arguments["targets"].contiguous()
    assert all(map(torch.equal, expanded, run(backend, arguments, torch.float32)))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_sharp_temperatures_and_large_biases(backend: str, device: str) -> None:
    """Logits of ±100 in float32: the running maximum keeps every exponential finite."""
    arguments = problem(40, 1000, 24, device=device)
    arguments["scale"] = torch.full_like(arguments["scale"], 100.0)
    arguments["bias"] = arguments["bias"] * 50
    exact = run("reference", arguments, torch.float64)
    # A logit of 250 is known to 250 · 2⁻²⁴ · a few, and so is its probability.
    assert_close(run(backend, arguments, torch.float32), exact, 2e-4)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("n", "d"), [(40, 24), (140, 70)])  # the second in pieces, on AMX
def test_nan_stays_in_its_row_and_infinite_biases_hide(backend: str, device: str, n: int, d: int) -> None:
    arguments = problem(n, 600, d, device=device)
    arguments["features"][7, 3] = math.nan
    arguments["targets"][7] = 5
    arguments["targets"][8] = -1
    arguments["features"][8] = math.nan
    arguments["bias"][::3] = -math.inf
    arguments["targets"][arguments["targets"] % 3 == 0] = 1
    ours = run(backend, arguments, torch.float32)
    assert ours[0].isnan().nonzero().flatten().tolist() == [7]
    assert ours[0][8] == 0
    assert (ours[5][8] == 0).all()
    assert ours[5].isnan().any(1).nonzero().flatten().tolist() == [7]
    arguments["targets"][7] = -1
    assert_close(run(backend, arguments, torch.float32), run("reference", arguments, torch.float64), 4e-6)


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("shape", [(1, 9000, 24), (500, 600, 130)])
def test_every_instruction_set_is_right_and_threads_change_no_bit(shape: tuple[int, int, int]) -> None:
    """Neither their number nor whose they are: PyTorch's, then a pool of our own."""
    arguments = problem(*shape)
    exact = run("reference", arguments, torch.float64)
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        torch.set_num_threads(1)
        single = run("cpp", arguments, torch.float32)
        assert_close(single, exact, 4e-6)
        for threads, repeat in itertools.product((2, 3, 7), range(2)):
            torch.set_num_threads(threads)
            _native.cpp.set_openmp_parallel(0) if repeat else _native.share_threads(_native.cpp)
            assert all(map(torch.equal, run("cpp", arguments, torch.float32), single)), (isa, threads, repeat)


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 130), (64, 2100, 33)])
def test_bfloat16_products_lose_no_digit_of_the_loss(n: int, k: int, d: int, normalize: bool) -> None:
    """On every instruction set the losses are those of the rows as they came; gradients beat eager bfloat16's."""
    arguments = problem(n, k, d, normalize=normalize, grouped=False)
    arguments["targets"] = arguments["targets"].clamp(min=0)
    arguments |= {name: arguments[name].bfloat16() for name in ("features", "keys")}

    def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.linspace(-1, 1, n).to(loss.dtype))]

    def leaves_in(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, y = (arguments[name].to(dtype).requires_grad_() for name in ("features", "keys"))
        return x, y

    def eager(x: Tensor, y: Tensor) -> Tensor:
        if normalize:
            x, y = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
        logits = (x @ y.T) * arguments["scale"].to(x.dtype) + arguments["bias"].to(x.dtype)
        return torch.nn.functional.cross_entropy(logits, arguments["targets"], reduction="none")

    x, y = leaves_in(torch.float64)
    exact = gradients(eager(x, y), (x, y))
    x, y = leaves_in(torch.bfloat16)
    theirs = gradients(eager(x, y), (x, y))
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        x, y = leaves_in(torch.bfloat16)
        with fastproto.backend("cpp"):
            ours = gradients(contrast(**arguments | {"features": x, "keys": y}).loss, (x, y))
        assert (ours[0] - exact[0]).abs().max() <= 2e-6 * exact[0].abs().max() + 1e-7
        for a, b, c in zip(ours[1:], theirs[1:], exact[1:], strict=True):
            assert (a.double() - c).norm() <= (b.double() - c).norm() + 1e-6


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("n", "temperature", "noise"), [(8, 0.05, 0.03), (64, 0.07, 0.03), (600, 0.1, 0.1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_small_loss_keeps_its_digits(n: int, temperature: float, noise: float, symmetric: bool) -> None:
    """Nearly equal views and far negatives: of losses of 1e-8 float32 sums that hold the target know nothing."""
    generator = torch.Generator().manual_seed(n)
    one = torch.randn(n, 128, generator=generator)
    if n <= 128:
        one = torch.linalg.qr(one.T)[0].T * 9
    two = one + noise * torch.randn(n, 128, generator=generator) / 128**0.5
    rows, targets = torch.arange(2 * n), torch.arange(2 * n).roll(n)

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = torch.cat([one, two]).to(dtype).requires_grad_()
        keys, groups = (None, rows) if symmetric else (x.detach()[n:], None)
        own = x if symmetric else x[:n]
        goal = targets if symmetric else rows[:n]
        with fastproto.backend(backend):
            (loss,) = contrast_unchecked(own, keys, goal, 1 / temperature, None, groups, groups, normalize=True)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    exact = gradients("reference", torch.float64)
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        for ours, expected in zip(gradients("cpp", torch.float32), exact, strict=True):
            assert (ours.double() - expected).norm() <= 1e-5 * expected.norm()


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_in_two_places_give_the_bits_of_one(dtype: torch.dtype) -> None:
    features, keys = torch.randn(40, 33).to(dtype), torch.randn(700, 33).to(dtype)
    targets, groups = torch.randint(-1, 700, (40,)), torch.randint(3, (740,))
    more = torch.randn(660, 66).to(dtype)[:, 33:]
    keys[40:] = more
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)

        def run_split(backend: str, keys: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
            x = features.detach().requires_grad_()
            with fastproto.backend(backend):
                (loss,) = contrast_unchecked(
                    x, keys, targets, 3.0, None, groups[:40], groups[40:], normalize=True, more_keys=more
                )
            return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

        whole = run_split("cpp", keys, None)
        for layout in (more, more.contiguous(), more.T.contiguous().T):
            assert all(map(torch.equal, run_split("cpp", keys[:40], layout), whole))
        assert all(map(torch.equal, run_split("reference", keys[:40], more), run_split("reference", keys, None)))


def test_ops_are_sound() -> None:
    saved, of_rows, of_mean = torch.rand(3, 9), torch.rand(9), torch.rand(())
    for arguments in (op_arguments(problem(9, 11, 5, normalize=True)), one_scale(problem(9, 11, 5))):
        for need_dx, need_stats in itertools.product((False, True), repeat=2):
            torch.library.opcheck(
                torch.ops.fastproto.contrast_fwd.default, (*arguments, None, False, None, need_dx, need_stats)
            )
        torch.library.opcheck(torch.ops.fastproto.contrast_fwd.default, (*arguments, 9.0, False, None, True, False))
        for divisor, grad in ((None, of_rows), (9.0, of_mean)):
            torch.library.opcheck(
                torch.ops.fastproto.contrast_bwd_keys.default, (*arguments, divisor, False, saved, grad)
            )


def test_what_is_frozen_costs_nothing() -> None:
    """No gradient for the features: no dx. No gradient for the keys: they are not kept beside rows and dx."""
    arguments = problem(9, 11, 5)
    frozen = contrast(**arguments, stats=False)
    assert not frozen.loss.requires_grad
    assert frozen.entropy.numel() == 0
    arguments["features"].requires_grad_()
    loss = contrast(**arguments, stats=False).loss
    assert [tensor.numel() for tensor in loss.grad_fn.saved_tensors if tensor is not None] == [45, 45]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_one_number_is_a_scale_for_every_key(backend: str, device: str, normalize: bool) -> None:
    """The same bits as from a tensor of it."""
    arguments = problem(33, 507, 130, normalize=normalize, device=device)
    leaves = [arguments[name].requires_grad_() for name in ("features", "keys", "bias")]

    def results(scale: float | Tensor) -> list[Tensor]:
        with fastproto.backend(backend):
            rows = contrast(**arguments | {"scale": scale})
            return [*rows, *torch.autograd.grad(rows.loss, leaves, torch.linspace(-1, 1, 33, device=device))]

    assert all(map(torch.equal, results(7.3), results(torch.full((507,), 7.3, device=device))))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_divisor_is_the_sum_by_it(backend: str, device: str, n: int) -> None:
    arguments = problem(n, 50, 24, normalize=True, device=device)

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        cast = arguments | {name: arguments[name].to(dtype).requires_grad_() for name in LEAVES}
        with fastproto.backend(backend):
            loss = contrast(**cast, divisor=n + 1, stats=False).loss
            return [loss.detach(), *torch.autograd.grad(loss * 3, [cast[name] for name in LEAVES])]

    for ours, exact in zip(results(backend, torch.float32), results("reference", torch.float64), strict=True):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_upstream_gradient_may_have_any_stride(backend: str, device: str) -> None:
    arguments = problem(20, 50, 24, device=device)
    leaves = [arguments[name].requires_grad_() for name in LEAVES]
    with fastproto.backend(backend):
        loss = contrast(**arguments, stats=False).loss
        for upstream in (torch.rand(20, 2, device=device)[:, 1], torch.rand((), device=device).expand(20)):
            loose = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
            assert all(map(torch.equal, loose, torch.autograd.grad(loss, leaves, upstream.clone(), retain_graph=True)))
