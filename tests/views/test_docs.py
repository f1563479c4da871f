"""Every example in the docstrings of fastproto.views runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest

from fastproto import views

PUBLIC = [name for name in views.__all__ if callable(getattr(views, name)) and name != "PhotometricParameters"]


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str) -> None:
    module = importlib.import_module(getattr(views, name).__module__)
    tests = doctest.DocTestFinder(recurse=False).find(getattr(views, name), name, module)
    assert tests[0].examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(tests[0]).failed == 0
