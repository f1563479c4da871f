"""The compiled modules, as far as they are there. A failed import is kept, and ``fastproto info`` shows it."""

from __future__ import annotations

import importlib
from types import ModuleType


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} is not there: {error}"


cpp, cpp_error = _load("_fastproto_C")
cuda, cuda_error = _load("_fastproto_cuda")
