"""Builds the CUDA module for a CPU: csrc/ as it is, but for what C++ has no syntax for."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAME = "_fastproto_cuda"
LAUNCH = re.compile(r"([\w:]+(?:<[\w:, ]+>)?)<<<(.+?)>>>\((.*?)\);", re.DOTALL)
DYNAMIC_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def as_cpp(source: str) -> str:
    """CUDA C++ whose launches and dynamic shared memory are calls of cuda_runtime.h."""
    source = LAUNCH.sub(r"cuda_on_cpu::launch(\2, [=] { \1(\3); });", source)
    return DYNAMIC_SHARED.sub(r"\1* \2 = static_cast<\1*>(cuda_on_cpu::dynamic_shared());", source)


def build(folder: Path) -> Path:
    """The file of the module, whose functions take addresses on the CPU and any stream."""
    for path in [
        *(ROOT / "csrc").glob("**/*.h"),
        *(ROOT / "csrc").glob("**/*.cu"),
        ROOT / "csrc" / "bindings_cuda.cpp",
    ]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(as_cpp(path.read_text()))
    target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [folder, HERE, pybind11.get_include(), sysconfig.get_path("include")]
    # What a GPU would not do either ends the process: vectors at odd addresses, places outside of arrays.
    checks = ["-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", *checks, *(f"-I{path}" for path in includes)]
    cuda = ["-D__CUDACC__", "-include", "cuda_runtime.h", "-x", "c++"]
    sources = [*(folder / "csrc").glob("**/*.cu"), folder / "csrc" / "bindings_cuda.cpp"]

    def compile_one(source: Path) -> Path:
        kind = cuda if source.suffix == ".cu" else ['-DFASTPROTO_ARCHES="cpu"']
        subprocess.run(["c++", *flags, *kind, "-c", source, "-o", source.with_suffix(".o")], check=True)
        return source.with_suffix(".o")

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        objects = list(compilers.map(compile_one, sources))
    subprocess.run(["c++", "-shared", *objects, "-o", target], check=True)
    return target
