"""The package as users meet it: from an sdist, editable or not installed, run elsewhere or in the checkout."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from try_wheel import environment

from fastproto import _native

ROOT = Path(__file__).parent.parent
PACKED = ("fastproto", "kernels", "csrc")
REPORT = """
import fastproto, fastproto.kernels
from fastproto import _native
print(fastproto.__file__, fastproto.kernels.__file__, getattr(_native.cpp, "__file__", None), sep="\\n")
"""
# In the place of the C++ compiler: makes empty objects of sources that are there, and links them to what this
# environment has compiled. `make` and `make wheel` compile; the tests ask where things come from.
COMPILER = """#!/bin/sh
for argument; do
    case $argument in
        *.cpp) test -f "$argument" || exit 1 ;;
        -shared) linked={module} ;;
    esac
    test "$before" = -o && output=$argument
    before=$argument
done
cp "${{linked:-/dev/null}}" "$output"
"""
pytestmark = pytest.mark.install


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FASTPROTO_CUDA": "0", **environ}
    env.pop("PYTHONPATH", None)
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, text=True, capture_output=True)


def pip(python: Path, *args: str | Path, cwd: Path, **environ: str) -> str:
    done = run(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", *args, cwd=cwd, **environ)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def where(python: Path, cwd: Path) -> list[str]:
    """Where fastproto, its Triton kernels and its CPU module come from, seen by a Python started in cwd."""
    done = run(python, "-c", REPORT, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone's files, as they are in the working tree."""
    target = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in PACKED:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables that have a build take COMPILER."""
    if _native.cpp is None:
        pytest.skip(_native.cpp_error)
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(COMPILER.format(module=shlex.quote(str(_native.cpp.__file__))))
    script.chmod(0o755)
    return {"CXX": str(script), "CC": str(script)}


def test_not_installed(checkout):
    package, kernels, native = where(Path(sys.executable), cwd=checkout)
    assert Path(package).parent == checkout / "fastproto"
    assert Path(kernels).parent == checkout / "kernels"
    assert Path(native).parent != checkout


def test_installed_from_an_sdist(checkout, compiler, tmp_path):
    done = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    files = (path for name in PACKED for path in (ROOT / name).rglob("*") if path.is_file())
    assert {path.relative_to(ROOT) for path in files if path.suffix not in (".so", ".pyc")} <= packed

    python = environment(tmp_path / "venv")
    pip(python, sdist, cwd=tmp_path, **compiler)
    package, kernels, native = where(python, cwd=tmp_path)
    site = tmp_path / "venv" / "lib"
    assert all(Path(path).is_relative_to(site) for path in (package, kernels, native))
    package, kernels, native = where(python, cwd=checkout)
    assert Path(package).parent == checkout / "fastproto"
    assert Path(kernels).parent == checkout / "kernels"
    assert Path(native).is_relative_to(site)


def test_installed_editable(checkout, compiler, tmp_path):
    python = environment(tmp_path / "venv")
    pip(python, "--editable", checkout, cwd=tmp_path, **compiler)
    try:
        for folder in (tmp_path, checkout):
            package, kernels, native = where(python, cwd=folder)
            assert Path(package).parent == checkout / "fastproto"
            assert Path(kernels).parent == checkout / "kernels"
            assert Path(native).parent == checkout
    finally:
        for built in checkout.glob("*.so"):
            built.unlink()


def test_without_a_compiler_the_reference_serves(checkout, tmp_path):
    """No module is built, the install goes through and says so, and info names the reason.

    Nor is one packed that an earlier build left, or a file that was there then.
    """
    python = environment(tmp_path / "venv")
    source = tmp_path / "source"
    shutil.copytree(checkout, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    left = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (left / "fastproto").mkdir(parents=True)
    for stale in (f"_fastproto_C{sysconfig.get_config_var('EXT_SUFFIX')}", "fastproto/old.py"):
        (left / stale).write_text("")
    # Another one is on the PATH, but not the one that is asked for.
    output = pip(python, source, cwd=tmp_path, CXX="missing-c++", CC="missing-cc", FASTPROTO_CUDA="0")
    assert "_fastproto_C is left out: no C++ compiler missing-c++" in output
    assert not any((tmp_path / "venv").rglob("old.py"))
    used = "from fastproto import _native, info; print(*info.info_lines(), sep='\\n')"
    done = run(python, "-c", used, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cpu: reference" in done.stdout
    assert "not cpp: _fastproto_C is not there" in done.stdout


def test_cuda_asked_for_without_nvcc_is_an_error(checkout, tmp_path):
    wanted = "FASTPROTO_CUDA_ARCHS expected architectures as in 80;90;100, got"
    for value, archs, message in (
        ("1", "", "no nvcc"),
        ("maybe", "", "FASTPROTO_CUDA expected 0, 1 or auto, got 'maybe'"),
        ("1", "90;", f"{wanted} '90;'"),
        ("1", "sm_90", f"{wanted} 'sm_90'"),
    ):
        done = run(
            sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path, cwd=checkout,
            FASTPROTO_CUDA=value, FASTPROTO_CUDA_ARCHS=archs, PATH="/nowhere", CUDA_HOME="/nowhere", CXX="missing-c++",
        )  # fmt: skip
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


def test_imports_need_neither_triton_nor_torchvision_nor_a_gpu(tmp_path):
    code = """
import sys
for name in ("triton", "torchvision", "sklearn", "lightning_fabric", "faiss", "PIL", "tqdm"):
    sys.modules[name] = None
import fastproto, fastproto.losses, fastproto.cluster, fastproto.views, fastproto.cli
"""
    done = run(sys.executable, "-W", "error", "-c", code, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
