"""A pytest plugin: the module that build.py has made runs as the backend "cuda" on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch

# Before fastproto looks for one.
spec = importlib.util.spec_from_file_location("_fastproto_cuda", os.environ["CUDA_ON_CPU"])
assert spec is not None and spec.loader is not None
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])

from fastproto.ops import _dispatch  # noqa: E402

unavailable = _dispatch.unavailable
_dispatch.unavailable = lambda backend, device_type: "" if backend == "cuda" else unavailable(backend, device_type)
torch.cuda.device = lambda device: nullcontext()
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
