"""The kernels of k-means compiled ahead of time, without a GPU: no spills, the shared memory that there is, tensor
cores where they are meant to be, two screens on a processor, and no product contracted into a rounded sum."""

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

from fastproto.kernels import _tiles, assign, assign_screen, update  # noqa: E402
from spills import MOST_SPILLED  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# sm_80 stands for all that take the default tiles, so those are held to the least shared memory among them.
SHARED = {"default": 99 * 1024, "sm_90": 232448, "sm_100": 232448}
CAPABILITY = {"default": 80, "sm_90": 90, "sm_100": 100}
SCREEN_CORES = {"default": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
# What two programs of 256 threads on one processor may each have.
HALF_REGISTERS, HALF_SHARED = 128, 227 * 1024 // 2

POINTERS = {
    "q_ptr": "fp16", "qc_ptr": "fp16", "c_ptr": "fp32", "block_ptr": "i32", "open_ptr": "i32", "rows_ptr": "i64",
    "count_ptr": "i64", "place_ptr": "i64", "label_ptr": "i64",
}  # fmt: skip
DOUBLES = ("reach_ptr", "span_ptr", "unit_ptr", "base_ptr", "limit_ptr", "rounder_ptr", "sums_ptr", "counts_ptr")
POINTERS |= dict.fromkeys(DOUBLES, "fp64")
PACK = {"FLUSHED": 0.0, "PACK_ROWS": assign_screen.PACK_ROWS, "PACK_COLUMNS": assign_screen.PACK_COLUMNS}
LOOK = {name: value for name, value in vars(assign).items() if name.endswith(("_ROWS", "_COLUMNS"))}
KERNELS = [
    assign_screen._pack_centers_kernel,
    assign_screen._pack_rows_kernel,
    assign_screen._screen_kernel,
    assign._settle_kernel,
    assign._resolve_kernel,
    update._update_kernel,
]


class Compiled:
    """A kernel for rows at stride 1, addresses and strides divisible by 16."""

    def __init__(self, kernel: Any, arch: str, constants: dict[str, Any], tmp_path: Path, x: str = "fp32",
                 pointers: dict[str, str] | None = None, **options: Any) -> None:  # fmt: skip
        pointees = POINTERS | {"x_ptr": x} | (pointers or {})
        signature, values, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            name = parameter.name
            if parameter.is_constexpr or name in ("stride_xd", "stride_w"):
                signature[name], values[(i,)] = "constexpr", constants.get(name, 1)
                continue
            signature[name] = f"*{pointees.get(name, 'fp32')}" if name.endswith("_ptr") else "i32"
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY[arch], 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = os.fspath(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found, text
        self.registers, self.spilled = int(found[1]), int(found[2])
        self.shared, self.ptx = compiled.metadata.shared, compiled.asm["ptx"]


def screen_tiles(arch: str) -> list[tuple[int, _tiles.Tile]]:
    table = _tiles.TILES[arch]["assign"]
    assert list(table) == [2], "rows of any size are rounded to float16"
    return [(1024 if widest == _tiles.WIDE else widest, tile) for widest, tile in table[2].items()]


@pytest.mark.parametrize("arch", list(SHARED))
def test_screen(arch: str, tmp_path: Path) -> None:
    for d, tile in screen_tiles(arch):
        sizes = {"WIDTH": d, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_d}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        halves = {"c_ptr": "fp16"}
        screen = Compiled(assign_screen._screen_kernel, arch, sizes, tmp_path, "fp16", halves, **options)
        assert screen.spilled <= MOST_SPILLED, (d, tile)
        assert screen.shared <= SHARED[arch], (d, tile)
        assert SCREEN_CORES[arch] in screen.ptx, (d, tile)
        assert not re.search(r"\b(atom|red)\.", screen.ptx), (d, tile)
        if d <= 128 and arch == "sm_90":
            assert screen.registers <= HALF_REGISTERS, (d, tile)
            assert screen.shared <= HALF_SHARED, (d, tile)


@pytest.mark.parametrize("arch", ["default", "sm_90"])
def test_minima_stay_in_their_thread(arch: str, tmp_path: Path) -> None:
    """The loop of the screen at D = 128 exchanges nothing between threads on sm_90; on sm_80 once a block."""
    d, tile = next((d, tile) for d, tile in screen_tiles(arch) if d == 128)
    sizes = {"WIDTH": d, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_d}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    ptx = Compiled(assign_screen._screen_kernel, arch, sizes, tmp_path, "fp16", {"c_ptr": "fp16"}, **options).ptx
    labels = {name: at for at, name in ((m.start(), m[1]) for m in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE))}
    branches = ((m.start(), m[1]) for m in re.finditer(r"bra(?:\.uni)?\s+(\$\w+);", ptx))
    loops = [ptx[labels[name] : at] for at, name in branches if labels[name] < at]
    loop = next(text for text in loops if SCREEN_CORES[arch] in text)
    assert loop.count("shfl.sync.bfly") <= (0 if arch == "sm_90" else 8)


@pytest.mark.parametrize("ip", [False, True], ids=["l2", "ip"])
@pytest.mark.parametrize("arch", list(SHARED))
def test_packing_and_settling(arch: str, ip: bool, tmp_path: Path) -> None:
    kernels = {
        assign_screen._pack_centers_kernel: 4,
        assign_screen._pack_rows_kernel: 4,
        assign._settle_kernel: assign.SETTLE_WARPS,
    }
    block_k = _tiles.TILES[arch]["assign"][2][128].block_k
    for d, x in ((128, "fp32"), (1024, "bf16")):
        sizes = {"D": d, "WIDTH": d, "IP": ip, "EXACT": True, "BLOCK_K": block_k} | PACK | LOOK
        for kernel, warps in kernels.items():
            compiled = Compiled(kernel, arch, sizes, tmp_path, x, num_warps=warps)
            assert compiled.spilled <= MOST_SPILLED, (kernel.__name__, d, x)
            assert compiled.shared <= SHARED["default"], (kernel.__name__, d, x)
            assert not re.search(r"mma|\b(atom|red)\.", compiled.ptx), (kernel.__name__, d, x)


@pytest.mark.parametrize("arch", list(SHARED))
def test_resolve(arch: str, tmp_path: Path) -> None:
    for d, tile in screen_tiles(arch):
        sizes = {"D": d, "WIDTH": d, "IP": d == 64, "BLOCK_K": tile.block_k} | LOOK
        sizes["BLOCK_D"] = min(tile.block_d, assign.RESOLVE_BLOCK_D)
        options = {"num_warps": assign.RESOLVE_WARPS, "num_stages": 2}
        resolve = Compiled(assign._resolve_kernel, arch, sizes, tmp_path, **options)
        # For sm_80 ptxas keeps up to four numbers of a block's start in memory, to hold 80 registers.
        assert resolve.spilled <= (max(MOST_SPILLED, 16) if arch == "default" else MOST_SPILLED), (d, tile)
        assert resolve.shared <= SHARED["default"], (d, tile)
        assert "mma.sync" in resolve.ptx, (d, tile)  # 16 rows are too few for the newer instructions
        assert not re.search(r"\b(atom|red)\.", resolve.ptx), (d, tile)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("arch", list(SHARED))
def test_update_rounds_what_it_adds(arch: str, weighted: bool, tmp_path: Path) -> None:
    """(v + r) - r as written, after a product that was rounded, each a float64 instruction of its own."""
    for columns, x in ((16, "fp32"), (128, "bf16"), (256, "fp32")):
        sizes = {"D": columns, "HAS_WEIGHTS": weighted, "RUN": update.RUN, "COLUMNS": columns}
        pointers = {"label_ptr": "i32", "weight_ptr": "fp32"}
        options = {"num_warps": max(1, columns // 128), "enable_fp_fusion": False}
        compiled = Compiled(update._update_kernel, arch, sizes, tmp_path, x, pointers, **options)
        assert compiled.spilled <= MOST_SPILLED, columns
        assert "fma" not in compiled.ptx, columns
        assert ("mul.rn.f64" in compiled.ptx) == weighted, columns
        assert "add.rn.f64" in compiled.ptx, columns
        assert "sub.rn.f64" in compiled.ptx, columns
        assert len(re.findall(r"atom\.global\.gpu\.relaxed\.add\.f64", compiled.ptx)) >= 2, columns


def test_sizes_do_not_compile_a_kernel_again() -> None:
    for kernel in KERNELS:
        for parameter in kernel.params:
            sizes = ("N", "K", "padded", "blocks")
            assert parameter.do_not_specialize == (parameter.name in sizes), (kernel.__name__, parameter.name)
            assert not (parameter.is_constexpr and parameter.name in sizes), (kernel.__name__, parameter.name)
