"""Runs every example in the docstrings of the losses and of the ops below them."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest
import torch

from fastproto import losses
from fastproto.losses import functional

MODULES = [
    "fastproto.losses.contrast",
    "fastproto.losses.cosine",
    "fastproto.losses.distribution",
    "fastproto.losses.pauc",
    "fastproto.losses.proto_nce",
    "fastproto.losses.siamese",
    "fastproto.losses.spcl",
    "fastproto.ops.contrast",
    "fastproto.ops.siamese",
    "fastproto.testing",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    public = {name: getattr(package, name) for package in (losses, functional) for name in package.__all__}
    result = doctest.testmod(module, extraglobs={"torch": torch, **public})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", [*losses.__all__, *functional.__all__])
def test_every_public_name_has_an_example_and_a_source(name: str) -> None:
    entry = getattr(losses, name, None) or getattr(functional, name)
    if inspect.ismodule(entry):
        return
    assert "Example:" in entry.__doc__
    assert "Source: " in entry.__doc__
    assert "Raises:" in entry.__doc__
