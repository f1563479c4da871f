"""Skips what is marked gpu where there is none; where there is one, puts Triton last, whose kernels it compiles first.

Imported by the conftest of tests/ and of bench/; that of tests/ also ends a worker whose CUDA is unusable.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items.sort(key=lambda item: "triton" in item.path.name)
    else:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Ends a process of pytest-xdist where a kernel's bad address has left CUDA unusable: another goes on in its place.

    In the same process every later test would fail for it.
    """
    result = yield
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
