"""What the tests of the ops share: instruction sets and threads as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastproto import _native


@pytest.fixture
def settings() -> Iterator[None]:
    """Restores the instruction set and the number of threads."""
    isa, threads = _native.cpp.isa(), torch.get_num_threads()
    yield
    _native.cpp.set_isa(isa)
    _native.share_threads(_native.cpp)
    torch.set_num_threads(threads)
