"""bench/gpu.sh with an interpreter and an nvidia-smi that say what they were asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.sh"

# It has the packages whose names stand in HAS.
INTERPRETER = """#!/usr/bin/env bash
if [ "$1" = -c ]; then [[ "$2" =~ ^import\\ ($HAS)$ ]]; exit; fi
echo "$PYTHONUNBUFFERED $FASTPROTO_CUDA_ARCHS $*"
exit "${STATUS:-0}"
"""

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")


def run(folder: Path, *part: str, gpus: str = "9.0", **env: str) -> subprocess.CompletedProcess[str]:
    for name, text in {"python": INTERPRETER, "nvidia-smi": f"#!/bin/sh\n{gpus}"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "bench").mkdir(exist_ok=True)
    shutil.copy(SCRIPT, folder / "bench")
    inherited = {name: os.environ[name] for name in os.environ if name not in ("OUT", "FASTPROTO_CUDA_ARCHS")}
    env = {**inherited, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "HAS": "-", **env}
    return subprocess.run(["bash", folder / "bench" / "gpu.sh", *part], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [("echo 9.0", "90"), ("echo 9.0; echo 8.0; echo 9.0", "80;90"), ("echo no such field; exit 2", "90")],
)
def test_build_is_for_the_gpus_that_are_there(tmp_path: Path, gpus: str, archs: str) -> None:
    assert run(tmp_path, "build", gpus=gpus).stdout.startswith(f"1 {archs} -m pip install")
    assert run(tmp_path, "build", gpus=gpus, FASTPROTO_CUDA_ARCHS="100").stdout.startswith("1 100 -m pip install")


def test_options_are_of_the_packages_that_are_there(tmp_path: Path) -> None:
    assert "--timeout" not in run(tmp_path, "test").stdout
    assert "--numprocesses" not in run(tmp_path, "test").stdout
    found = run(tmp_path, "test", HAS="xdist|pytest_timeout").stdout
    assert "--timeout 120 --numprocesses 12 --dist worksteal --timeout-method thread" in found
    assert "thread" not in run(tmp_path, "test", HAS="pytest_timeout").stdout


def test_a_part_ends_after_its_limit(tmp_path: Path) -> None:
    (tmp_path / "timeout").write_text('#!/bin/sh\necho "$@"')
    (tmp_path / "timeout").chmod(0o755)
    assert "--kill-after 20 540 " in run(tmp_path, "bench").stdout
    assert "--kill-after 20 300 " in run(tmp_path, "bench", LIMIT_S="300").stdout


# A GPU on which the first test leaves CUDA unusable, and the second needs it.
BROKEN = """
import pytest, torch
from gpu_marker import pytest_runtest_protocol

broken = False

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.fixture
def use(request):
    global broken
    synchronize()
    broken = "first" in request.node.name
"""
TWO = "def test_first(use): assert False\ndef test_second(use): pass"


def test_a_broken_gpu_fails_one_test(tmp_path: Path) -> None:
    """The process ends, and another runs the tests that are left."""
    (tmp_path / "conftest.py").write_text(BROKEN)
    (tmp_path / "test_two.py").write_text(TWO)
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses", "1", "--dist", "worksteal"]
    env = {name: os.environ[name] for name in os.environ if not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    # The first test's own failure, and what pytest-xdist says of its process.
    assert "crashed while running 'test_two.py::test_first'" in done.stdout
    assert "2 failed, 1 passed" in done.stdout, done.stdout


def test_results_and_output_are_kept_whatever_comes(tmp_path: Path) -> None:
    for name in ("nvidia-h200/runs", "amd-epyc"):
        (tmp_path / "bench" / "results" / name).mkdir(parents=True)
    (tmp_path / "bench" / "results" / "nvidia-h200" / "runs" / "x.json").write_text("{}")
    # Relative to where it is called.
    out = os.path.relpath(tmp_path / "out")
    done = run(tmp_path, "train", "digits", "--epochs", "2", OUT=out, STATUS="3")
    assert done.returncode == 3
    assert done.stdout.endswith("bench/table.py --minutes 8.5 digits --epochs 2\n")
    assert (tmp_path / "out" / "train.log").read_text() == done.stdout
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["x.json"]
    assert not (tmp_path / "out" / "amd-epyc").exists()
    assert run(tmp_path, "train", "digits", STATUS="3").returncode == 3


def test_anything_else_is_answered_with_its_header(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "gpu.sh build" in done.stdout and "PART.log" in done.stdout
