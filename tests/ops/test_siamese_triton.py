"""The siamese ops' Triton kernels under Triton's interpreter, where there is no GPU; on one, test_siamese_kernels.py.

A second pytest runs this file: the interpreter has to be chosen before triton is first imported. It gets bfloat16
wrong, so that is left to the GPU.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted
from ops import test_siamese_kernels as kernels

from fastproto import _settings

interpreted = pytest.mark.skipif(not _settings.triton_interpreted, reason="runs in a second pytest, interpreted")


@pytest.mark.skipif(_settings.triton_interpreted or torch.cuda.is_available(), reason="the kernels run here themselves")
def test_all_of_this_file_under_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (2, 130), (33, 1), (40, 70)])
def test_is_as_exact_as_plain_pytorch(shape: tuple[int, int]) -> None:
    kernels.assert_as_exact_as_plain("triton", kernels.problem(*shape))


@interpreted
def test_panels_smaller_than_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastproto.kernels import siamese_all_pairs

    monkeypatch.setattr(siamese_all_pairs, "PANEL", 20)
    monkeypatch.setattr(siamese_all_pairs, "PARTS", 2)
    kernels.assert_as_exact_as_plain("triton", kernels.problem(50, 5))


@interpreted
def test_half_precision_rows_are_summed_in_float32() -> None:
    kernels.test_half_precision_rows_are_summed_in_float32("triton", "cpu", torch.float16)


@interpreted
def test_a_common_offset_costs_the_gradient_of_w_no_digits() -> None:
    arguments = kernels.problem(40, 5)
    arguments["features"] += 1000
    kernels.assert_as_exact_as_plain("triton", arguments)


@interpreted
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_large_logits(shift: float) -> None:
    arguments = kernels.problem(17, 5)
    arguments["bias"] += shift
    kernels.assert_as_exact_as_plain("triton", arguments)


@interpreted
def test_edges() -> None:
    """Strides, batches without a pair, NaN."""
    kernels.test_strides("triton", "cpu")
    for n in (0, 1):
        kernels.test_no_pair_is_zero_with_zero_gradient("triton", "cpu", n)
    kernels.test_nan_shows_where_its_row_has_a_pair("triton", "cpu")
