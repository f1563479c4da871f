"""What every test shares: NaN in uninitialised memory, a seed, and skipping of GPU tests where there is no GPU."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_marker import pytest_collection_modifyitems as pytest_collection_modifyitems
from gpu_marker import pytest_runtest_protocol as pytest_runtest_protocol

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process of theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_empty = torch.empty


def _poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
    out = _empty(*args, **kwargs)
    if out.is_floating_point():
        out.detach().fill_(float("nan"))  # one that wants a gradient too
    elif out.dtype in (torch.uint8, torch.int32, torch.int64):
        out.fill_(torch.iinfo(out.dtype).max)
    return out


@pytest.fixture(autouse=True)
def _deterministic_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds torch, and lets torch.empty return NaN (or the largest integer), so that unwritten outputs show."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "empty", _poisoned)


# Imported by every process at its start. A Gloo thread that outlives the interpreter may let go of a tensor that Python
# has held, which aborts the process: rarely, and more often on a busy machine.
NO_GLOO_THREADS = """
import atexit, glob, os, sys

def names():
    for path in glob.glob("/proc/self/task/*/comm"):
        try:
            with open(path) as comm:
                yield comm.read().strip()
        except OSError:
            pass

def check():
    if "pt_gloo_runloop" in names():
        print("a thread of Gloo is left", file=sys.stderr, flush=True)
        os._exit(70)

atexit.register(check)
"""


@pytest.fixture
def no_gloo_threads(tmp_path: Path) -> dict[str, str]:
    """The environment of a command whose processes fail if they end with a thread of Gloo."""
    folder = tmp_path / "checks"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_GLOO_THREADS)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
