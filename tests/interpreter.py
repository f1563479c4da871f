"""What tests of Triton kernels share: where they run, and a second pytest that runs a file under the interpreter,
since that has to be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastproto import _settings

INTERPRETED = _settings.triton_interpreted
DEVICE = "cpu" if INTERPRETED else "cuda"
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    # It would patch triton.language anew in every call of a device function, for half the time of these tests.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def run_interpreted(file: str) -> None:
    """Asserts that the file's tests pass in a process with TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # Triton 3.6's interpreter on its own bounds of loops; numpy 2.4 and later refuse them.
    own = ["-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"]
    result = subprocess.run(command + own, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for the GPU, unless the interpreter stands in for it."""
    return test if INTERPRETED else pytest.mark.gpu(test)


gpu_alone = pytest.mark.skipif(INTERPRETED, reason="of no meaning under the interpreter")


def assert_captured(step: Callable[[], list[Tensor]], *inputs: Tensor) -> None:
    """Replayed on new numbers in the same places: nothing was decided on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for value in inputs:
            value.copy_(value.flip(0))
    graph.replay()
    assert all(map(torch.equal, captured, step()))
