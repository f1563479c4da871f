"""CUDA calls that wait for the GPU raise: what shows that an op waits for nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_host_waits() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Once a process torch warns, after the mode is set, that it is a prototype.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
