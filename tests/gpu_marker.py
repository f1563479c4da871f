"""Skips what is marked gpu where there is none; where there is one, puts Triton last, whose kernels it compiles first.

Imported by the conftest of tests/ and of bench/.
"""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items.sort(key=lambda item: "triton" in item.path.name)
    else:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
