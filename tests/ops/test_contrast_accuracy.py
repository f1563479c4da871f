"""The contrast op in float32 beside plain PyTorch in float32, both against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from ops.test_contrast_kernels import needs_cpp
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.losses.functional import nt_xent
from fastproto.ops.contrast import contrast


def assert_as_exact_as_plain_float32(
    backend: str, d: int, temperature: float, rounding: float, device: str, n: int = 70
) -> None:
    """Loss and gradients with twice the error of matrix product and cross-entropy at most, of the largest number
    ``rounding`` more. Half of the rows are near their target, so that little is left of 1 - p; half are anywhere."""
    generator = torch.Generator().manual_seed(d)
    away = torch.linspace(0.1, 1, n)[:, None] * torch.randn(n, d, generator=generator) / math.sqrt(d)
    y = F.normalize(torch.randn(n + 20, d, generator=generator), dim=1)
    x = F.normalize((torch.arange(n) % 2)[:, None] * y[:n] + away, dim=1)
    upstream, targets = torch.rand(n, generator=generator).to(device), torch.arange(n, device=device)

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        features, keys = (rows.to(device, dtype).requires_grad_() for rows in (x, y))
        if ours:
            with fastproto.backend(backend):
                loss = contrast(features, keys, targets, scale=1 / temperature).loss
        else:
            loss = F.cross_entropy(features @ keys.T / temperature, targets, reduction="none")
        return [loss.detach(), *torch.autograd.grad(loss, (features, keys), upstream.to(dtype))]

    results = run(torch.float32, True), run(torch.float32, False), run(torch.float64, False)
    for got, theirs, right in zip(*results, strict=True):
        error, allowed = (float((value.double() - right).abs().max()) for value in (got, theirs))
        assert error <= 2 * allowed + rounding * float(right.abs().max())


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("n", "d"), [(70, 24), (70, 64), (70, 130), (300, 64), (300, 130)])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.2])
def test_as_exact_as_plain_float32(n: int, d: int, temperature: float) -> None:
    """On every instruction set, AMX included, whose products are of bfloat16 pieces from 128 rows of 64 on."""
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        assert_as_exact_as_plain_float32("cpp", d, temperature, 1e-7, "cpu", n)


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_rows_are_exact(n: int) -> None:
    """In the mean over many, as few are by chance. Plain PyTorch errs by 1e-7 and, in gradients, by 3 to 4e-7."""
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        squares = torch.zeros(3, 2, dtype=torch.float64)
        for seed in range(40):
            torch.manual_seed(seed)
            x, y = (F.normalize(torch.randn(rows, 128), dim=1).requires_grad_() for rows in (n, 200))
            targets = torch.randint(200, (n,))
            loss = contrast(x, y, targets, scale=100.0).loss
            wide = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
            right = F.cross_entropy(100 * wide[0] @ wide[1].T, targets, reduction="none")
            ours = loss.detach(), *torch.autograd.grad(loss.sum(), (x, y))
            exact = right.detach(), *torch.autograd.grad(right.sum(), wide)
            for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
                squares[i] += torch.stack([(a - b).square().sum(), b.square().sum()])
        errors = (squares[:, 0] / squares[:, 1]).sqrt()
        assert (errors < 7e-7).all(), (isa, errors)


def gradient_errors(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *leaves: Tensor) -> Iterator[float]:
    """Of each leaf, our error over that of plain PyTorch in float32, both in the mean over the numbers."""

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        return [gradient.double() for gradient in torch.autograd.grad(loss(*given), given)]

    results = run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64)
    for got, theirs, right in zip(*results, strict=True):
        yield float((got - right).norm() / (theirs - right).norm())


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("n", "d", "temperature"), [(200, 16, 0.001), (200, 16, 0.01), (512, 128, 0.05), (200, 96, 0.1)]
)
def test_errors_do_not_grow_with_sharpness_or_rows(n: int, d: int, temperature: float) -> None:
    """lse as large as 1 / τ, s_ij beside lse_j, and a key's many small terms beside its target's: none costs digits."""
    torch.manual_seed(n + d)
    z0, z1, keys = torch.randn(n, d), torch.randn(n, d), F.normalize(torch.randn(2 * n, d), dim=1)
    targets, others = torch.arange(n), torch.eye(2 * n, dtype=torch.bool)

    def plain_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]), dim=1)
        scores = (z @ z.T / temperature).masked_fill(others, -torch.inf)
        return F.cross_entropy(scores, torch.arange(2 * n).roll(n))

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return contrast(x, y, targets, scale=1 / temperature, divisor=n, stats=False).loss

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x @ y.T / temperature, targets)

    assert _native.cpp is not None
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        assert max(gradient_errors(lambda a, b: nt_xent(a, b, temperature=temperature), plain_nt_xent, z0, z1)) < 1.5
        assert max(gradient_errors(ours, plain, F.normalize(z0, dim=1), keys)) < 1.5


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("n", "k", "d"), [(4096, 10, 64), (2048, 300, 40)])
def test_sums_of_many_rows_of_one_sign(n: int, k: int, d: int) -> None:
    """As after a ReLU: no sum of a key's terms is small, so that each could be rounded beside all before it."""
    torch.manual_seed(n)
    x, y, bias, targets = torch.randn(n, d).relu(), torch.randn(k, d) / d**0.5, torch.zeros(k), torch.randint(k, (n,))
    scale = torch.ones(k)

    def ours(y: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return contrast(x.to(y.dtype), y, targets, scale=scale, bias=bias, divisor=n, stats=False).loss

    def plain(y: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(x.to(y.dtype) @ y.T * scale + bias, targets)

    def plain_nt_xent(z: Tensor) -> Tensor:
        scores = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.5
        scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z) // 2))

    assert _native.cpp is not None
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        assert max(gradient_errors(ours, plain, y, bias, scale)) < 2
        assert max(gradient_errors(lambda z: nt_xent(*z.chunk(2), temperature=0.5), plain_nt_xent, x[:2048])) < 2


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("d", [128, 512, 2048])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scores_of_wide_rows(d: int, offset: float) -> None:
    """Rows near their targets, or with a common offset: products of one sign, each rounded beside all before it."""
    torch.manual_seed(d)
    y = F.normalize(torch.randn(200, d) + offset, dim=1)
    x = F.normalize(y[:128] + 0.5 / d**0.5 * torch.randn(128, d), dim=1)
    targets = torch.arange(128)
    right = F.cross_entropy(x.double() @ y.double().T / 0.1, targets, reduction="none")
    allowed = (F.cross_entropy(x @ y.T / 0.1, targets, reduction="none") - right).norm()
    assert _native.cpp is not None
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        assert (contrast(x, y, targets, scale=10.0, stats=False).loss - right).norm() < 2 * allowed
        # Rows against themselves go another way.
        mean = nt_xent(x[:64], x[64:], temperature=0.5)
        z, others = x.double(), torch.eye(128, dtype=torch.bool)
        expected = F.cross_entropy((z @ z.T / 0.5).masked_fill(others, -torch.inf), torch.arange(128).roll(64))
        assert abs(mean - expected) < 3e-7 * expected


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("temperature", "offset"), [(0.07, 0.0), (0.01, 0.0), (0.2, 1000.0)])
def test_entropy_does_not_lose_digits_to_large_scores(temperature: float, offset: float) -> None:
    """lse - Σ p s would be the difference of two numbers as large as the scores."""
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(70, 24), dim=1), F.normalize(torch.randn(600, 24), dim=1)
    targets, bias = torch.arange(70), torch.full((600,), offset)

    def error(entropy: Tensor) -> float:
        p = ((x.double() @ y.double().T / temperature).log_softmax(1)).exp()
        return float((entropy + torch.xlogy(p, p).sum(1)).abs().max())

    allowed = error(torch.distributions.Categorical(logits=x @ y.T / temperature + offset).entropy())
    assert _native.cpp is not None
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        assert error(contrast(x, y, targets, scale=1 / temperature, bias=bias).entropy) <= 2 * allowed


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("mask", [-1e38, torch.finfo(torch.float32).min])
def test_entropy_behind_a_large_finite_mask(mask: float) -> None:
    """Sums of another maximum are far below: 0, not infinity times 0."""
    assert _native.cpp is not None
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        assert_entropy_behind_a_mask("cpp", mask, "cpu")


def assert_entropy_behind_a_mask(backend: str, mask: float, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, 24, generator=generator).to(device) for rows in (33, 900))
    bias = torch.where(torch.arange(900) < 700, mask, 0.0).to(device)
    with fastproto.backend(backend):
        entropy = contrast(x, y, torch.arange(700, 733, device=device), scale=0.3, bias=bias).entropy
    expected = torch.distributions.Categorical(logits=x @ y[700:].T * 0.3).entropy()
    torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_too_short_to_have_a_direction(backend: str) -> None:
    assert_short_rows_as_in_pytorch(backend, "cpu")


def assert_short_rows_as_in_pytorch(backend: str, device: str) -> None:
    """Rows shorter than 1e-12 are divided by that, and their gradient is not turned across them."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, 24, generator=generator).to(device) for rows in (33, 70))
    x[:5] *= torch.tensor([1e-13, 3e-14, 0.0, 2e-12, 1e-15], device=device)[:, None]
    y[:5] *= torch.tensor([3e-13, 1e-14, 0.0, 1e-12, 1e-15], device=device)[:, None]
    targets = torch.randint(70, (33,), generator=generator).to(device)

    def gradients(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [rows.to(dtype).requires_grad_() for rows in (x, y)]
        return list(torch.autograd.grad(loss(*leaves), leaves))

    def ours(x: Tensor, y: Tensor) -> Tensor:
        with fastproto.backend(backend):
            to_keys = contrast(x, y, targets, scale=2.0, normalize=True, divisor=1, stats=False).loss
            return to_keys + nt_xent(x[:32], y[:32], temperature=0.5, reduction="sum")

    def plain(x: Tensor, y: Tensor) -> Tensor:
        to_keys = F.cross_entropy(F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * 2, targets, reduction="sum")
        z, others = F.normalize(torch.cat([x[:32], y[:32]]), dim=1), torch.eye(64, dtype=torch.bool, device=device)
        scores = (z @ z.T * 2).masked_fill(others, -torch.inf)
        return to_keys + F.cross_entropy(scores, torch.arange(64, device=device).roll(32), reduction="sum")

    for got, right in zip(gradients(ours, torch.float32), gradients(plain, torch.float64), strict=True):
        assert ((got.double() - right).norm(dim=1) <= 1e-5 * right.norm(dim=1)).all()
