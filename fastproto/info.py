"""What ``fastproto info`` prints: versions, devices, and for each op which backend runs it and why no other does."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import platform

import torch

import fastproto
from fastproto import _native, _settings
from fastproto import ops as _ops
from fastproto.ops._dispatch import OPS, PREFERENCE, Op

PACKAGES = ("torch", "triton", "torchvision", "numpy", "lightning-fabric", "faiss-cpu", "faiss-gpu")


def print_info() -> None:
    """Prints the report to standard output."""
    print("\n".join(info_lines()))


def info_lines() -> list[str]:
    """The report, line by line."""
    for module in pkgutil.iter_modules(_ops.__path__):
        importlib.import_module(f"fastproto.ops.{module.name}")
    lines = [f"fastproto {fastproto.__version__}, Python {platform.python_version()}, {platform.machine()}"]
    lines += [f"  {name:<24}{_version(name)}" for name in PACKAGES]
    lines += ["", "devices", f"  {'cpu':<24}{_cpu()}"]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [f"  {f'cuda:{i}':<24}{name}" for i, name in enumerate(devices)] or [f"  {'cuda':<24}none"]
    lines += ["", "compiled modules", f"  {'_fastproto_C':<24}{_native.cpp_error or 'there'}"]
    arches = getattr(_native.cuda, "arches", "")
    lines += [f"  {'_fastproto_cuda':<24}{_native.cuda_error or f'there, for sm_{arches}'}"]
    forced = _settings.forced_backend or "none"
    lines += ["", f"ops (forced backend: {forced}, debug checks on CUDA: {_settings.debug})"]
    for name in sorted(OPS):
        op = OPS[name]
        for device in ("cpu", "cuda") if devices else ("cpu",):
            lines.append(f"  {name:<24}{device}: {op.choose(device)} ({_why(op, device)})")
    return lines


def _why(op: Op, device: str) -> str:
    """Why that backend: what stands behind it, and what keeps the others that the op has from running."""
    others = [backend for backend in PREFERENCE[device] if backend in op.implementations]
    reasons = [f"not {backend}: {reason}" for backend in others if (reason := op.why_not(backend, device))]
    able = " before ".join(backend for backend in others if not op.why_not(backend, device))
    return "; ".join([able, *reasons])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    isa = f", {_native.cpp.isa()} of {', '.join(_native.cpp.supported_isas())}" if _native.cpp is not None else ""
    return f"{torch.get_num_threads()} threads{isa}"
