"""The methods by name: each file here is one, its class a module with an encoder, heads, and a loss in named terms."""

from __future__ import annotations

import importlib

from fastproto.train.config import METHOD_NAMES, Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Method as Method
from fastproto.train.methods._base import Prototypes as Prototypes


def _class_of(name: str) -> type[Method]:
    """The one class of a method's file."""
    module = importlib.import_module(f"{__name__}.{name}")
    values = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method))
    (found,) = (value for value in values if value.__module__ == module.__name__)
    return found


METHODS = {name: _class_of(name) for name in METHOD_NAMES}

__all__ = ["METHODS", "Method", "Prototypes", "build_method"]


def build_method(config: Config, encoder: Encoder) -> Method:
    """The configured method on a fresh encoder.

    Raises:
        ValueError: settings that the method refuses.
    """
    return METHODS[config.method](config, encoder)
