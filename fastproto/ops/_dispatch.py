"""How an op finds the code that runs it: one name, several backends, the best that can run on the tensors' device.

Every op is an ``Op`` made at the bottom of its file from one function per backend with one signature, and a schema. By
that it is ``torch.ops.fastproto.<name>`` too, so that torch.compile sees a single node.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastproto import _native, _settings

# First that can run wins. An op has a Triton or a CUDA kernel, never both; both come before the reference.
PREFERENCE = {"cpu": ("cpp", "triton", "reference"), "cuda": ("triton", "cuda", "reference")}
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in csrc/common/dtype.h
LIBRARY = torch.library.Library("fastproto", "DEF")
OPS: dict[str, Op] = {}

# Not public: a PyTorch without one of them has its dispatcher called every time.
try:
    _in_functorch, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
    _is_profiled, _is_like_a_subclass = torch._C._autograd._profiler_enabled, torch._C._dispatch_isTensorSubclassLike
    _CAN_ASK = True
except AttributeError:
    _CAN_ASK = False


def unavailable(backend: str, device_type: str) -> str:
    """Why a backend cannot run on a device type here; empty where it can."""
    if backend == "reference":
        return ""
    if backend == "cpp":
        return "it runs on CPU tensors only" if device_type != "cpu" else _native.cpp_error
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cpu" and not _settings.triton_interpreted:
            return "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on the CPU"
        if device_type == "cuda" and not _settings.c_compiler:
            return "Triton finds no C compiler, gcc, clang or what CC names, to build its driver with"
        return ""
    return "it runs on CUDA tensors only" if device_type != "cuda" else _native.cuda_error


class Op:
    """One operation with its backends.

    Args:
        name: the name that all layers share: ops, reference, kernels, csrc, tests, bench.
        schema: torch.library schema behind the name, e.g. ``"(Tensor x) -> Tensor"``.
        implementations: one function per backend name, all with the schema's arguments in its order.
    """

    def __init__(self, name: str, schema: str, **implementations: Callable[..., Any]) -> None:
        self.name = name
        self.implementations = implementations
        self._may_go_straight = _CAN_ASK and "Tensor[]" not in schema.partition("->")[0]
        OPS[name] = self
        LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, self._run, key)
        self._call = getattr(torch.ops.fastproto, name).default

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: what the op returns by shape alone, for the compiler."""
        torch.library.register_fake(f"fastproto::{self.name}", function, lib=LIBRARY)
        return function

    def __call__(self, *args: Any) -> Any:
        # PyTorch's dispatcher costs 15 µs a call on few rows.
        if self._may_go_straight and _goes_straight_to_the_cpu(args):
            return self._run(*args)
        return self._call(*args)

    def _run(self, *args: Any) -> Any:
        device_type = _device_type(args)
        implementation = self.implementations[self.choose(device_type)]
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args)
        # It is on inside of an op too, and would lower the products of a reference.
        with torch.autocast(device_type, enabled=False):
            return implementation(*args)

    def choose(self, device_type: str) -> str:
        """The backend that runs this op on a device type now.

        Raises:
            RuntimeError: ``fastproto.backend`` asks for one that cannot, with the reason.
        """
        forced = _settings.forced_backend
        if forced is not None:
            reason = self.why_not(forced, device_type)
            if reason:
                raise RuntimeError(f"{self.name}: backend {forced!r} cannot run on {device_type}: {reason}")
            return forced
        for name in PREFERENCE.get(device_type, ()):
            if name in self.implementations and not unavailable(name, device_type):
                return name
        return "reference"

    def why_not(self, backend: str, device_type: str) -> str:
        """Why a backend cannot run this op on a device type; empty where it can."""
        if backend not in self.implementations:
            return "this op has no such implementation"
        return unavailable(backend, device_type)


def _goes_straight_to_the_cpu(args: tuple[Any, ...]) -> bool:
    """Whether PyTorch's dispatcher would do nothing with these arguments, here and now, but call the CPU's kernel.

    Not so where a compiler, transform, tracer, profiler or mode is to see the op, nor for a subclass, a fake tensor, or
    a tensor whose memory waits for its sign or its zeros.
    """
    if torch.compiler.is_dynamo_compiling() or _in_functorch() or _tracing() is not None or _is_profiled():
        return False
    if torch.overrides.has_torch_function(args):
        return False
    for arg in args:
        # Under a dispatch mode every tensor is like one of a subclass.
        if isinstance(arg, torch.Tensor) and (
            not arg.is_cpu or arg.is_neg() or arg._is_zerotensor() or _is_like_a_subclass(arg)
        ):
            return False
    return True


def _device_type(args: tuple[Any, ...]) -> str:
    """Device type of the first argument, a tensor or a list of them."""
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    return first.device.type


def integers(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of the host's integers as an int64 tensor. From pinned memory the host need not wait for the copy."""
    host = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """A matrix with its rows contiguous, at any distance from each other: what the C++ kernels take."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward(ctx, kept, *upstream) whose results refuse to be differentiated once more, by either of the latter.

    torch's decorator of that name refuses only where the upstream gradient wants a gradient. That of a loss is 1: a
    penalty on the loss's gradient would pass unseen, as if it were constant. What the forward saved is read once, as
    checkpointing allows.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        kept = ctx.saved_tensors
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, kept, *upstream)
        with torch.no_grad():
            results = backward(ctx, kept, *upstream)
        made_of = [x for x in (*kept, *upstream) if x is not None and x.requires_grad]
        refusing = iter(_Refuse.apply(len(made_of), *made_of, *(x for x in results if x is not None)))
        return tuple(None if result is None else next(refusing) for result in results)

    return run


class _Refuse(torch.autograd.Function):
    """Hands on all but the first tensors, which those were made of. Its gradient is an error."""

    @staticmethod
    def forward(ctx: Any, first: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[first:])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        raise RuntimeError("fastproto: the op has no second derivative (once_differentiable)")
