"""The contrast of rows against themselves in the compiled kernels, whose symmetric pass computes each pair once."""

from __future__ import annotations

import pytest
import torch
from ops.test_contrast_kernels import BACKENDS, needs_cpp
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.ops.contrast import contrast_unchecked


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("grouped", [None, "rows", "prototypes"])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_rows_against_themselves(backend: str, device: str, grouped: str | None, temperature: float) -> None:
    """The symmetric pass equals the two passes of the reference, targets in a group's own rows included."""
    generator = torch.Generator().manual_seed(5)
    n = 602
    features = torch.randn(n, 70, generator=generator).to(device)
    targets = torch.randint(n, (n,), generator=generator).to(device)  # some a row's own
    targets[:100] = torch.arange(100, device=device).roll(50)
    groups = None
    if grouped is not None:
        groups = torch.arange(n) if grouped == "rows" else torch.randint(4, (n,), generator=generator)
        groups = groups.to(device)

    def run_symmetric(backend: str, dtype: torch.dtype, symmetric: bool) -> tuple[Tensor, Tensor]:
        x = features.detach().to(dtype).requires_grad_()
        with fastproto.backend(backend):
            keys = None if symmetric else x
            (loss,) = contrast_unchecked(x, keys, targets, 1 / temperature, None, groups, groups, normalize=True)
            upstream = torch.linspace(-1, 2, n, device=device, dtype=dtype)
            return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]

    exact = run_symmetric("reference", torch.float64, symmetric=False)
    for name, dtype, tolerance in (("reference", torch.float64, 1e-11), (backend, torch.float32, 2e-5)):
        ours = run_symmetric(name, dtype, symmetric=True)
        for a, b in zip(ours, exact, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@needs_cpp
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("n", "d", "temperature"), [(2, 3, 0.5), (57, 24, -0.3), (300, 130, 0.06), (1100, 40, 0.1)])
def test_pairs_of_blocks_of_rows(n: int, d: int, temperature: float) -> None:
    """Rows against themselves, whose scores are bounded: any number of blocks and threads, any instruction set."""
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, d, generator=generator) * torch.linspace(0.1, 9, n)[:, None]
    targets = torch.randint(n, (n,), generator=generator)
    groups = torch.where(torch.arange(n) < n // 2, torch.arange(n), torch.randint(-3, 0, (n,), generator=generator))

    def run_symmetric(backend: str, dtype: torch.dtype, symmetric: bool = True) -> tuple[Tensor, ...]:
        x = features.to(dtype).requires_grad_()
        with fastproto.backend(backend):
            rest = (targets, None, 1 / temperature, None, groups, groups, True, None, symmetric, None, False, False)
            _, saved = torch.ops.fastproto.contrast_fwd(x.detach(), x.detach(), *rest)
            keys = None if symmetric else x
            (loss,) = contrast_unchecked(x, keys, targets, 1 / temperature, None, groups, groups, normalize=True)
            upstream = torch.linspace(-1, 2, n, dtype=dtype)
            return loss.detach(), *saved, torch.autograd.grad(loss, x, upstream)[0]

    exact = run_symmetric("reference", torch.float64, symmetric=False)
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        torch.set_num_threads(1)
        single = run_symmetric("cpp", torch.float32)
        for a, b in zip(single, exact, strict=True):
            assert (a.double() - b).abs().max() <= 4e-6 * b.abs().max()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run_symmetric("cpp", torch.float32), single)), (isa, threads)
