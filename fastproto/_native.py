"""The compiled modules, where they were built. A failed import is kept, and ``fastproto info`` shows it."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import ModuleType

import torch


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} is not there: {error}"


def share_threads(cpp: ModuleType) -> None:
    """Lets our kernels run on the threads of PyTorch's own OpenMP, where it brings one (csrc/common/parallel.h)."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        cpp.set_openmp_parallel(ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value)


cpp, cpp_error = _load("_fastproto_C")
if cpp is not None:
    share_threads(cpp)
cuda, cuda_error = _load("_fastproto_cuda")
