"""CUDA kernels as a backend of parametrised tests: on a GPU, or compiled for the CPU (tests/cuda_on_cpu)."""

from __future__ import annotations

import os

import pytest

ON_CPU = "CUDA_ON_CPU" in os.environ
DEVICE = "cpu" if ON_CPU else "cuda"
CUDA = pytest.param("cuda", DEVICE, marks=[] if ON_CPU else [pytest.mark.gpu])
