"""Builds the two compiled modules without torch: _fastproto_C for the CPU, _fastproto_cuda where nvcc is found.

FASTPROTO_CUDA=0 never builds for CUDA, 1 must, auto (the default) does where nvcc is on the PATH, in CUDA_HOME or in
/usr/local/cuda. FASTPROTO_CUDA_ARCHS names the architectures ("80;90;100"), the last also as PTX for what comes after.
No GPU is looked for. A machine without a C++ compiler still installs: the build says so, and the PyTorch reference
serves.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
CUDA = os.environ.get("FASTPROTO_CUDA") or "auto"
CUDA_ARCHS = (os.environ.get("FASTPROTO_CUDA_ARCHS") or "80;90;100").replace(",", ";").split(";")
CUDA_BIN = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(CUDA_BIN))
CXX_FLAGS = ["-std=c++17", "-fno-math-errno", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]

# Kernels (*_cpu.cpp) are compiled once per instruction set; the choice falls at run time (csrc/common/isa.h).
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS = {
        "baseline": ["-march=x86-64-v2"],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in CSRC.glob(pattern))


class Build(build):
    """Begins anew: what an earlier build left in its folder, old modules among it, would be packed too."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "fastproto", ignore_errors=True)
        for module in Path(self.build_lib).glob("_fastproto_*"):
            module.unlink()
        super().run()


class BuildExt(build_ext):
    """Compiles the CPU kernels per instruction set, and hands the CUDA module to nvcc."""

    def build_extension(self, ext: Extension) -> None:
        # Where it fails, no older one is to stand for it.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            if ext.name == "_fastproto_cuda":
                self.build_cuda(ext)
            else:
                self.build_cpp(ext)
        except CompileError as error:
            if ext.optional:
                print(f"fastproto: {ext.name} is left out: {error}", file=sys.stderr)
            raise

    def build_cpp(self, ext: Extension) -> None:
        # Windows' own has neither: its flags are others.
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or getattr(self.compiler, "compiler_so", None)
        if not compiler or shutil.which(compiler[0]) is None:
            raise CompileError(f"no C++ compiler {compiler[0] if compiler else 'of the kind of GCC'}")
        flags = [*CXX_FLAGS, *self.optimization(compiler)]
        kernels = [source for source in ext.sources if source.endswith("_cpu.cpp")]
        rest = [source for source in ext.sources if source not in kernels]
        # From the narrowest to the widest: of an inline function that several objects hold the linker keeps the first,
        # so no object runs instructions wider than its own.
        jobs = [(source, "common", flags) for source in rest]
        for isa in ISA_FLAGS:
            jobs += [(source, isa, [*flags, f"-DFASTPROTO_ISA={isa}", *ISA_FLAGS[isa]]) for source in kernels]
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            objects = list(compilers.map(lambda job: self.compile(ext, *job), jobs))
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, target_lang="c++", extra_postargs=["-pthread"])

    def optimization(self, compiler: list[str]) -> list[str]:
        """-O3. Of GCC's the kernels want two parts; the rest makes the build a quarter longer and no kernel faster."""
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        gcc = "Free Software Foundation" in version
        return ["-O2", "-fvect-cost-model=dynamic", "-fpeel-loops"] if gcc else ["-O3"]

    def compile(self, ext: Extension, source: str, folder: str, flags: list[str]) -> str:
        (compiled,) = self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / folder),
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
            depends=ext.depends,
        )
        return compiled

    def build_cuda(self, ext: Extension) -> None:
        if NVCC is None:
            raise CompileError(f"no nvcc on the PATH, nor in {CUDA_BIN}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        code = [flag for arch in CUDA_ARCHS for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
        code += ["-gencode", f"arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"]
        includes = [flag for folder in [*ext.include_dirs, *self.include_dirs] for flag in ("-I", folder)]
        command = [NVCC, "-shared", "--cudart", "static", "--threads", "0", "-std=c++17", "-O3", *code, *includes]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", f'-DFASTPROTO_ARCHES="{";".join(CUDA_ARCHS)}"']
        try:
            subprocess.run([*command, *ext.sources, "-o", str(target)], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise CompileError(str(error)) from error


def extensions() -> list[Extension]:
    import pybind11

    if CUDA not in ("0", "1", "auto"):
        raise SystemExit(f"FASTPROTO_CUDA expected 0, 1 or auto, got {CUDA!r}")
    include = [pybind11.get_include()]
    headers = [*sources("**/*.h"), "setup.py"]
    cpp = [*sources("bindings_cpp.cpp"), *sources("*/*.cpp")]
    modules = [Extension("_fastproto_C", cpp, include_dirs=include, depends=headers, language="c++", optional=True)]
    if CUDA == "1" or (CUDA == "auto" and NVCC is not None):
        if not all(re.fullmatch(r"[0-9]{2,3}[af]?", arch) for arch in CUDA_ARCHS):
            got = ";".join(CUDA_ARCHS)
            raise SystemExit(f"FASTPROTO_CUDA_ARCHS expected architectures as in 80;90;100, got {got!r}")
        cuda = [*sources("bindings_cuda.cpp"), *sources("*/*.cu")]
        modules.append(Extension("_fastproto_cuda", cuda, include_dirs=include, depends=headers, optional=CUDA != "1"))
    return modules


def packages() -> list[str]:
    found = [".".join(path.parent.parts) for path in sorted(Path("fastproto").rglob("__init__.py"))]
    return [*found, "fastproto.recipes", "fastproto.kernels"]


setup(
    packages=packages(),
    package_dir={"fastproto.kernels": "kernels"},
    package_data={"fastproto": ["py.typed", "train/*.in", "train/*.html"], "fastproto.recipes": ["*.yaml"]},
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildExt},
)
