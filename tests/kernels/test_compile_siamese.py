"""The siamese kernels compiled ahead of time, without a GPU: no spills, and shared memory that every GPU has."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastproto import _settings

triton = pytest.importorskip("triton")
if _settings.triton_interpreted:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastproto.kernels import siamese_all_pairs, siamese_pairs  # noqa: E402
from spills import MOST_SPILLED  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

KERNELS = [
    siamese_all_pairs._all_pairs_fwd_kernel,
    siamese_all_pairs._coefficients_kernel,
    siamese_all_pairs._rows_kernel,
    siamese_all_pairs._finish_kernel,
    siamese_pairs._pairs_fwd_kernel,
    siamese_pairs._pairs_bwd_kernel,
]
CONSTANTS = {"NEED_ROWS": True, "NEED_WEIGHT": True} | {
    name: value
    for module in (siamese_all_pairs, siamese_pairs)
    for name, value in vars(module).items()
    if name.isupper()
}
ROWS = ("x_ptr", "a_ptr", "b_ptr")
INTEGERS = ("image_ptr", "prototype_ptr", "same_ptr")


def compile_kernel(kernel: Any, capability: int, dtype: str) -> Any:
    """As for dense rows: columns at stride 1, all else divisible by 16 but N and the panel's rows."""
    signature, values, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in ("stride_c", "stride_ac", "stride_bc"):
            signature[name], values[(i,)] = "constexpr", CONSTANTS.get(name, 1)
            continue
        pointee = dtype if name in ROWS else "i64" if name in INTEGERS else "fp32"
        signature[name] = f"*{pointee}" if name.endswith("_ptr") else "i32"
        if not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__.strip("_"))
def test_fits(kernel: Any, capability: int, tmp_path: Path) -> None:
    compiled = compile_kernel(kernel, capability, "bf16" if capability == 90 else "fp32")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([os.fspath(tool), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    assert int(found[2]) <= MOST_SPILLED
    assert compiled.metadata.shared <= 99 * 1024
    assert not re.search(r"mma|tf32|atom\.|red\.global", compiled.asm["ptx"])


def test_sizes_do_not_compile_a_kernel_again() -> None:
    for kernel in KERNELS:
        for parameter in kernel.params:
            assert parameter.do_not_specialize == (parameter.name in ("N", "R", "first")), parameter.name
