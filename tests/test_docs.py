"""Every example in a docstring and in the README runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastproto
from fastproto import losses
from fastproto.losses import functional

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(Path(fastproto.__file__).parent)], "fastproto.")
    if not module.name.endswith("__main__")
)
README = (Path(fastproto.__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


@pytest.mark.parametrize("code", re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL))
def test_readme(code):
    exec(code, {})


def test_readme_examples_are_found():
    assert README.count("```python") == README.count("<!-- example -->") == 3


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", [*losses.__all__, *functional.__all__])
def test_every_public_loss_says_what_it_raises_and_keeps_shows_an_example_and_cites(name):
    entry = getattr(losses, name, None) or getattr(functional, name)
    if not inspect.ismodule(entry):
        of_modules = ("Shape:", "Distributed:") if inspect.isclass(entry) else ()
        for part in ("Raises:", "Memory:", "Example:", "Source: ", *of_modules):
            assert part in entry.__doc__, part


def test_what_the_readme_links_to_is_there():
    root = Path(fastproto.__file__).parent.parent
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    assert all((root / link).exists() for link in links)
