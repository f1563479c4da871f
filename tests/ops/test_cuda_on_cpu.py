"""The CUDA kernels' own tests, with the kernels compiled for the CPU: their code runs where there is no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_backend import ON_CPU
from cuda_on_cpu.build import build

FILES = ("crop_resize", "localize_kernels", "photometric_kernels", "sample_kernels")
TESTS = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(ON_CPU, reason="this is the pytest that it starts"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


def test_in_any_order_of_the_threads(module: Path) -> None:
    environment = {**os.environ, "CUDA_ON_CPU": str(module), "PYTHONPATH": str(TESTS)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cuda"]
    files = [str(TESTS / "ops" / f"test_{name}.py") for name in FILES]
    done = subprocess.run(
        [*command, "-p", "cuda_on_cpu.plugin", *files], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
