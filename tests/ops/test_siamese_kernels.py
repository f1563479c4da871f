"""The compiled kernels of the siamese ops against the float64 reference, at sizes that reach every path in them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.ops.siamese import siamese_all_pairs, siamese_pairs

needs_cpp = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
BACKENDS = [
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
# One row; blocks of 24 rows and panels of 144 that end on and off their ends; C off every vector width.
SHAPES = [(1, 1), (2, 130), (33, 1), (48, 24), (150, 100), (289, 33), (64, 2048)]


def problem(n: int, c: int, device: str = "cpu") -> dict[str, Any]:
    """Rows with zeros as after a ReLU (ties), two equal rows, two views of each image, some without prototype."""
    generator = torch.Generator().manual_seed(n + 7 * c)
    features = torch.randn(n, c, generator=generator).relu()
    features[n // 2] = features[0]
    prototypes = torch.randint(-1, 4, (n,), generator=generator)
    out = {
        "features": features,
        "images": torch.arange(max(1, (n + 1) // 2)).repeat(2)[:n],
        "prototypes": prototypes,
        "weight": torch.randn(c, generator=generator) / c**0.5,
        "bias": torch.tensor(0.3),
    }
    return {name: value.to(device) for name, value in out.items()}


def run(backend: str, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of both forms; the given pairs are the rows with those after them, upside down."""
    cast = {name: value.detach().to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}
    leaves = [cast[name].requires_grad_() for name in ("features", "weight", "bias")]
    with fastproto.backend(backend):
        terms = torch.stack(siamese_all_pairs(**cast))
        upstream = torch.tensor([0.7, -0.4, 1.3]).to(terms)
        all_pairs = torch.autograd.grad(terms, leaves, upstream)
        a, b = leaves[0], leaves[0].detach().flip(0).roll(1, 0).requires_grad_()
        same = cast["prototypes"].clamp(max=1)
        loss = siamese_pairs(a, b, same, *leaves[1:])
        upstream = torch.linspace(-1, 1, len(loss)).to(loss)
        pairs = torch.autograd.grad(loss, [a, b, *leaves[1:]], upstream)
    names = ("terms", "dx", "dw", "dbias", "loss", "da", "db", "dw_pairs", "dbias_pairs")
    return dict(zip(names, (terms.detach(), *all_pairs, loss.detach(), *pairs), strict=True))


def assert_as_exact_as_plain(backend: str, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """The largest error is at most twice that of the same formula in plain PyTorch."""
    ours, plain = run(backend, arguments, dtype), run("reference", arguments, dtype)
    exact = run("reference", arguments, torch.float64)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype
        scale = exact[name].abs().amax() + 1e-3
        error, allowed = ((a.double() - exact[name]).abs().amax() / scale for a in (value, plain[name]))
        assert error <= 2 * allowed + 2e-6, f"{name}: {float(error):.2e}, plain PyTorch {float(allowed):.2e}"


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_exact_as_plain_pytorch(backend: str, device: str, shape: tuple[int, int]) -> None:
    assert_as_exact_as_plain(backend, problem(*shape, device=device))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_summed_in_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    arguments = problem(50, 96, device=device)
    arguments = {n: value.to(dtype).float() if value.is_floating_point() else value for n, value in arguments.items()}
    assert_as_exact_as_plain(backend, arguments, dtype)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_common_offset_costs_the_gradient_of_w_no_digits(backend: str, device: str) -> None:
    """dw is found from Σ_i (x_i − m) G_i: without m the offset would be multiplied with rounding."""
    arguments = problem(150, 20, device=device)
    arguments["features"] += 1000
    assert_as_exact_as_plain(backend, arguments)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_large_logits(backend: str, device: str, shift: float) -> None:
    arguments = problem(50, 20, device=device)
    arguments["bias"] += shift
    assert_as_exact_as_plain(backend, arguments)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_strides(backend: str, device: str) -> None:
    dense = problem(30, 40, device=device)
    wide = torch.randn(40, 60, device=device)
    wide[:, ::2] = dense["features"].T
    loose = {**dense, "features": wide[:, ::2].T, "weight": dense["weight"].repeat_interleave(2)[::2]}
    every_other = {**dense, "features": torch.stack([dense["features"], dense["features"] + 1], 1)[:, 0]}
    expected = run(backend, dense, torch.float32)
    for arguments in (loose, every_other):
        assert not arguments["features"].is_contiguous()
        for name, value in run(backend, arguments, torch.float32).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("n", [0, 1])
def test_no_pair_is_zero_with_zero_gradient(backend: str, device: str, n: int) -> None:
    arguments = problem(1, 5, device=device)
    arguments = {name: value[:n] if name not in ("weight", "bias") else value for name, value in arguments.items()}
    arguments["prototypes"] = torch.full_like(arguments["prototypes"], -1)
    for name, value in run(backend, arguments, torch.float32).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_shows_where_its_row_has_a_pair(backend: str, device: str) -> None:
    arguments = problem(40, 24, device=device)
    arguments["prototypes"] = torch.arange(20, device=device).repeat(2) % 3
    arguments["images"] = arguments["images"].clone()
    arguments["images"][3] = 99  # a row alone: no prototype, no second view
    arguments["prototypes"][3] = -1
    clean = run(backend, arguments, torch.float32)
    arguments["features"][3] = math.nan
    alone = run(backend, arguments, torch.float32)
    for name in ("terms", "dx", "dw", "dbias"):
        assert torch.equal(alone[name], clean[name]), name
    assert alone["loss"][3] == 0
    assert (alone["da"][3] == 0).all()
    arguments["features"][5, 2] = math.nan  # views 5 and 25 of image 5, and others with a prototype
    seen = run(backend, arguments, torch.float32)
    assert seen["terms"].isnan().all()
    assert seen["dx"][5].isnan().all()
    assert not seen["dx"][3].isnan().any()
    assert seen["da"][5].isnan().all()
    assert seen["loss"].isnan().sum() == 3  # 5 as a and as b, 3 as b


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_same_bits_every_time(backend: str, device: str) -> None:
    arguments = problem(289, 100, device=device)
    first = run(backend, arguments, torch.float32)
    assert all(torch.equal(value, first[name]) for name, value in run(backend, arguments, torch.float32).items())


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("shape", [(150, 130), (33, 1)])
def test_every_instruction_set_is_right_and_threads_change_no_bit(shape: tuple[int, int]) -> None:
    arguments = problem(*shape)
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        torch.set_num_threads(1)
        assert_as_exact_as_plain("cpp", arguments)
        single = run("cpp", arguments, torch.float32)
        for threads, repeat in itertools.product((2, 3, 7), range(2)):
            torch.set_num_threads(threads)
            for name, value in run("cpp", arguments, torch.float32).items():
                assert torch.equal(value, single[name]), (isa, threads, repeat, name)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, ("reference", "cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_in_two_tensors_are_those_of_one(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whatever the strides and sizes of the two, and in the gradient of each."""
    arguments = problem(70, 37, device=device)
    x = arguments.pop("features").to(dtype)
    upstream = torch.tensor([0.7, -0.4, 1.3], device=device)
    for split in (0, 33, 70):
        whole = x.clone().requires_grad_()
        first = x[:split].t().contiguous().t().requires_grad_()
        second = torch.stack([x[split:], x[split:]], 1)[:, 1].detach().requires_grad_()
        with fastproto.backend(backend):
            expected = torch.stack(siamese_all_pairs(whole, **arguments))
            terms = torch.stack(siamese_all_pairs(first, second=second, **arguments))
        assert torch.equal(terms, expected)
        gradients = torch.autograd.grad(terms, (first, second), upstream)
        assert torch.equal(torch.cat(gradients), torch.autograd.grad(expected, whole, upstream)[0])


def test_ops_are_sound() -> None:
    x, images, prototypes, weight, bias = problem(9, 5).values()
    opcheck, ops = torch.library.opcheck, torch.ops.fastproto
    for rows in ((x, None), (x[:4], x[4:])):
        opcheck(ops.siamese_all_pairs_fwd.default, (*rows, images, prototypes, weight, bias))
        opcheck(ops.siamese_all_pairs_bwd.default, (*rows, images, prototypes, weight, bias, torch.rand(3)))
    opcheck(ops.siamese_pairs_fwd.default, (x, x.flip(0), prototypes.clamp(max=1), weight, bias))
    for needed in itertools.product((False, True), repeat=2):
        opcheck(ops.siamese_pairs_bwd.default, (x, x.flip(0), prototypes, weight, torch.rand(9), *needed))


def test_what_is_frozen_costs_nothing() -> None:
    """Where only β learns, no row waits for the backward pass."""
    arguments = problem(9, 5)
    x, weight, bias = (arguments[name] for name in ("features", "weight", "bias"))
    assert not siamese_all_pairs(**arguments).same_image.requires_grad
    bias.requires_grad_()
    mean = siamese_all_pairs(**arguments).same_image
    (unbind,) = {node for node, _ in mean.grad_fn.next_functions}
    assert sorted(tensor.numel() for tensor in unbind.saved_tensors) == [1, 3, 3]
    loss = siamese_pairs(x, x.flip(0), arguments["prototypes"].clamp(max=1), weight, bias)
    assert [tensor.numel() for tensor in loss.grad_fn.saved_tensors] == [9, 1]


def test_one_tensor_as_both_sides_compiles() -> None:
    arguments = problem(9, 5)
    x, weight, bias = arguments["features"].requires_grad_(), arguments["weight"], arguments["bias"]
    same = arguments["prototypes"].clamp(max=1)
    compiled = torch.compile(siamese_pairs, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x, x, same, weight, bias), siamese_pairs(x, x, same, weight, bias)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], torch.zeros_like(x))
