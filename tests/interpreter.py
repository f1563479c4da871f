"""Runs a test file under Triton's interpreter: a second pytest, since it has to be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastproto import _settings

if _settings.triton_interpreted:
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
