"""Process-wide settings, and the one place that reads environment variables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("reference", "cpp", "triton", "cuda")

debug: bool = os.environ.get("FASTPROTO_DEBUG", "0") == "1"
forced_backend: str | None = None
triton_interpreted: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
c_compiler: str = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""
# Set by torchrun: processes in all and on this machine; 0 without it.
torchrun_world: int = int(os.environ.get("WORLD_SIZE", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
torchrun_local_world: int = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if torchrun_world else 0


def set_debug(enabled: bool) -> None:
    """Checks that read data (targets in range, boxes in order) run on CUDA too. They cost a host synchronisation each.

    On the CPU they always run. ``FASTPROTO_DEBUG=1`` in the environment does the same from the start.
    """
    global debug
    debug = bool(enabled)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every op inside the ``with`` block to one backend: "reference", "cpp", "triton" or "cuda".

    It holds for the whole process: blocks of several threads must not overlap, as the last to end would leave its own.

    Kernels that compute in float32 leave float64 to the reference. So do the Triton kernels of the contrast where plain
    matrix products serve better: rows of more than 256 columns, and at most 4 Mi scores.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: raised by the op that is called, where that backend cannot run it; the message says why.

    Example:
        >>> import fastproto
        >>> with fastproto.backend("reference"):
        ...     pass
    """
    global forced_backend
    if name not in BACKENDS:
        raise ValueError(f"backend: name expected one of {', '.join(BACKENDS)}, got {name!r}")
    before, forced_backend = forced_backend, name
    try:
        yield
    finally:
        forced_backend = before
