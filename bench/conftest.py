"""Benchmarks: `python -m pytest bench --benchmark-only`. Result files are written after each comparison."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_marker import pytest_collection_modifyitems as pytest_collection_modifyitems
from harness import Suite


@pytest.fixture(autouse=True)
def same_data() -> None:
    """The same numbers in every run, on every machine."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    """The rows of one benchmark file, which it writes to bench/results as they come."""
    suite = Suite(request.module.__name__.rsplit(".")[-1].removeprefix("bench_"))
    yield suite
    for path in suite.write():
        print(f"\nwrote {path}")
