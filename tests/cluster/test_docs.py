"""Every example in a docstring of fastproto.cluster and its ops runs."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    ["cluster.kmeans", "cluster.concentration", "cluster.bank", "cluster.whiten", "cluster.faiss_compat"],
)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"fastproto.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
