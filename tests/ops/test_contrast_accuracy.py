"""The contrast op in float32 beside plain PyTorch in float32, both against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ops.test_contrast_kernels import needs_cpp
from torch import Tensor

import fastproto
from fastproto import _native
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
