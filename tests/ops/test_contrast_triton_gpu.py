"""The contrast op's Triton kernels where no interpreter can tell: all tiles, compiler, CUDA graphs, huge tensors."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import DEVICE, HALVES, assert_captured
from ops import test_contrast_sets
from ops.test_contrast_kernels import LEAVES, assert_close, problem, run
from torch import Tensor

from fastproto.ops.contrast import contrast
from fastproto.ops.contrast_sets import contrast_sets

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("d", [64, 128, 200, 256, 384, 1024])
def test_every_tile_of_the_table(dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastproto.ops.contrast.FEW_SCORES", 0)  # else PyTorch's products take wide rows
    arguments = {
        name: value.to(dtype).float() if value.is_floating_point() else value
        for name, value in problem(300, 1000, d, device=DEVICE).items()
    }
    ours, exact = run("triton", arguments, dtype), run("reference", arguments, torch.float64)
    assert_close(ours[:5] + exact[5:], exact, 4e-6)
    assert_close(exact[:5] + ours[5:], exact, max(2 * torch.finfo(dtype).eps, 4e-6))


@pytest.mark.filterwarnings("ignore")  # what the compiler has to say of a GPU
def test_compiles_as_one_graph() -> None:
    arguments = problem(300, 1000, 128, device=DEVICE)
    leaves = [arguments[name].requires_grad_() for name in LEAVES]
    ours, theirs = torch.compile(contrast, fullgraph=True)(**arguments), contrast(**arguments)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(rows.loss.sum(), leaves) for rows in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_is_captured_into_a_cuda_graph(dtype: torch.dtype) -> None:
    arguments = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in problem(300, 1000, 128, device=DEVICE).items()
    }
    leaves = [arguments[name].requires_grad_() for name in LEAVES]

    def step() -> list[Tensor]:
        rows = contrast(**arguments)
        return [*(row.detach() for row in rows), *torch.autograd.grad(rows.loss.sum(), leaves)]

    assert_captured(step, arguments["features"], arguments["targets"])


def test_several_sets_are_captured_into_a_cuda_graph() -> None:
    x, ys, *rest = test_contrast_sets.sets_problem(256, (300, 1000, 700), 128, DEVICE).values()
    leaves = [y.requires_grad_() for y in (x, *ys)]

    def step() -> list[Tensor]:
        loss = contrast_sets(x, ys, *rest, normalize=True, divisor=torch.full((3,), 2.0, device=DEVICE))
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    x.data.nan_to_num_(1.0)
    assert_captured(step, x)


def test_addresses_beyond_two_to_the_31() -> None:
    """Keys of 4.3 GB, of which the last rows matter alone."""
    k, d = (1 << 31) // 64 + 1000, 64
    keys = torch.zeros(k, d, dtype=torch.bfloat16, device=DEVICE)
    keys[-1], keys[-2] = 0.25, -0.25
    features = torch.full((3, d), 1.0, dtype=torch.bfloat16, device=DEVICE)
    rows = contrast(features, keys, torch.tensor([k - 1, k - 2, -1], device=DEVICE))
    lse = math.log(k - 2 + math.exp(16) + math.exp(-16))
    expected = torch.tensor([lse - 16, lse + 16, 0.0], device=DEVICE)
    torch.testing.assert_close(rows.loss, expected, rtol=1e-4, atol=1e-4)
    assert rows.top1.tolist() == [k - 1, k - 1, -1]
