"""Every tile of the tables compiled ahead of time, without a GPU: no spills (a few with all options at once), the
shared memory that there is, and tensor-core instructions for half precision."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fastproto import _settings

triton = pytest.importorskip("triton")
if _settings.triton_interpreted:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastproto.kernels import _halves, _tiles, contrast_bwd, contrast_fwd, contrast_merge  # noqa: E402
from spills import MOST_SPILLED  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

KERNELS = {
    "contrast_fwd": contrast_fwd._contrast_fwd_kernel,
    "contrast_bwd_keys": contrast_bwd._contrast_bwd_keys_kernel,
    "contrast_merge": contrast_merge._contrast_merge_kernel,
    "halves": _halves._halves_kernel,
}
INTEGERS = {"N", "K", "K0", "K1", "K2", "K3", "part"}
STRIDES = {"stride_x", "stride_y", "stride_n", "stride_d"}
PER_SET = {"y_ptrs", "strides_y"}
POINTERS = {"x_ptr": "", "y_ptr": "", "y_ptrs": ""} | dict.fromkeys(
    ("target_ptr", "group_ptr", "key_group_ptr", "top1_ptr", "part_top1_ptr"), "*i64"
)
# sm_80 stands for all that take the default tiles, so those are held to the least shared memory among them.
SHARED = {"default": 99 * 1024, "sm_90": 232448, "sm_100": 232448}
CAPABILITY = {"default": 80, "sm_90": 90, "sm_100": 100}
TENSOR_CORES = {"default": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
PLAIN = {"HAS_BIAS": False, "HAS_GROUPS": False, "NEED_DX": True, "NEED_STATS": False, "SYMMETRIC": False}
FULL = {"HAS_BIAS": True, "HAS_GROUPS": True, "NEED_DX": True, "NEED_STATS": True, "SYMMETRIC": False}
NT_XENT = {"HAS_BIAS": False, "HAS_GROUPS": True, "NEED_DX": False, "NEED_STATS": False, "SYMMETRIC": True}


def compile_kernel(
    name: str, arch: str, dtype: str, warps: int, stages: int, constants: dict[str, Any], sets: int = 1
) -> Any:
    kernel = KERNELS[name]
    signature, values, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(i,)] = "constexpr", constants[argument]
        elif argument in INTEGERS | STRIDES | {"strides_y"}:
            signature[argument] = "i32"
        else:
            signature[argument] = POINTERS.get(argument, "*fp32") or f"*{dtype}"
        places = [(i, j) for j in range(sets)] if argument in PER_SET else [(i,)]
        if signature[argument] != "constexpr" and argument not in INTEGERS:
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
        if argument in PER_SET:
            signature[argument] = (signature[argument],) * sets
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY[arch], 32), options=options)


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Registers of a thread and the bytes that did not fit in them, from the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([os.fspath(tool), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def constants(tile: _tiles.Tile, d: int, flags: dict[str, bool], *, halves: bool = False) -> dict[str, Any]:
    return {
        "D": d, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_d, "BLOCK_V": tile.block_v,
        "HALVES": halves, **flags,
    }  # fmt: skip


def most_spilled(arch: str, flags: dict[str, bool]) -> int:
    """Without wgmma the tile that stays lives in registers too, and options beside it leave a few bytes no room."""
    return max(MOST_SPILLED, 0 if flags == PLAIN else {"default": 160, "sm_90": 0, "sm_100": 8}[arch])


@pytest.mark.parametrize("flags", [PLAIN, FULL, NT_XENT], ids=["plain", "full", "nt_xent"])
@pytest.mark.parametrize("name", ["contrast_fwd", "contrast_bwd_keys"])
@pytest.mark.parametrize("arch", list(SHARED))
def test_half_precision_tiles(name: str, arch: str, flags: dict[str, bool]) -> None:
    for widest, tile in _tiles.TILES[arch][name][2].items():
        if flags != PLAIN and arch != "sm_90" and widest != 128:
            continue  # minutes for what the others say already
        d = 2 * tile.block_v if widest == _tiles.WIDE else widest
        if flags["NEED_STATS"] and name == "contrast_fwd":
            tile = contrast_fwd.with_stats(tile, halves=False)
        compiled = compile_kernel(name, arch, "bf16", tile.warps, tile.stages, constants(tile, d, flags))
        assert registers_and_stack(compiled)[1] <= most_spilled(arch, flags), (d, tile)
        assert compiled.metadata.shared <= SHARED[arch], (d, tile)
        assert TENSOR_CORES[arch] in compiled.asm["ptx"], (d, tile)


@pytest.mark.parametrize("flags", [PLAIN, FULL, NT_XENT], ids=["plain", "full", "nt_xent"])
@pytest.mark.parametrize("name", ["contrast_fwd", "contrast_bwd_keys"])
@pytest.mark.parametrize("arch", list(SHARED))
def test_float32_tiles(name: str, arch: str, flags: dict[str, bool]) -> None:
    """Pairs of float16 rows, which tensor cores multiply."""
    for widest, tile in _tiles.TILES[arch][name][4].items():
        if flags != PLAIN and arch != "sm_90" and widest != 128:
            continue  # minutes for what the others say already
        d = 2 * tile.block_v if widest == _tiles.WIDE else widest
        if flags["NEED_STATS"] and name == "contrast_fwd":
            tile = contrast_fwd.with_stats(tile, halves=True)
        if flags["HAS_GROUPS"] and name == "contrast_bwd_keys":
            tile = contrast_bwd.with_groups(tile)
        compiled = compile_kernel(name, arch, "fp16", tile.warps, tile.stages, constants(tile, d, flags, halves=True))
        assert registers_and_stack(compiled)[1] <= most_spilled(arch, flags), (d, tile)
        assert compiled.metadata.shared <= SHARED[arch], (d, tile)
        assert TENSOR_CORES[arch] in compiled.asm["ptx"], (d, tile)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_halves(dtype: str) -> None:
    sizes = {"D": 128, "D_OUT": 128, "BLOCK_N": _halves.BLOCK_N, "BLOCK_D": _halves.BLOCK_D}
    compiled = compile_kernel("halves", "sm_90", dtype, 4, 3, sizes)
    assert registers_and_stack(compiled)[1] == 0


@pytest.mark.parametrize("arch", list(SHARED))
def test_several_sets(arch: str) -> None:
    """The keys of a set that is chosen at run time are loaded in vectors, as those of a single one."""
    tile = _tiles.TILES[arch]["contrast_fwd"][2][128]
    loads = []
    for sets in (1, contrast_fwd.MAX_SETS):
        sizes = constants(tile, 128, PLAIN)
        compiled = compile_kernel("contrast_fwd", arch, "bf16", tile.warps, tile.stages, sizes, sets)
        assert registers_and_stack(compiled)[1] <= MOST_SPILLED, sets
        assert compiled.metadata.shared <= SHARED[arch], sets
        assert TENSOR_CORES[arch] in compiled.asm["ptx"], sets
        loads.append(len(re.findall(r"cp\.async\.cg\S* .*0x10", compiled.asm["ptx"])))
    assert loads[0] == loads[1] > 0


@pytest.mark.parametrize("sets", [1, contrast_fwd.MAX_SETS])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("arch", list(SHARED))
def test_merge(arch: str, halves: bool, sets: int) -> None:
    """The positive's score takes the same kind of instruction as all scores."""
    for tile in _tiles.TILES[arch]["contrast_fwd"][4 if halves else 2].values():
        sizes = {"D": 128, "D_OUT": 128, "BLOCK_N": contrast_merge.MERGE_ROWS, "BLOCK_D": tile.block_d,
                 "BLOCK_V": contrast_merge.MERGE_COLUMNS, "HALVES": halves}  # fmt: skip
        dtype, warps = "fp16" if halves else "bf16", contrast_merge.MERGE_WARPS[halves]
        compiled = compile_kernel("contrast_merge", arch, dtype, warps, 3, sizes | FULL, sets)
        assert registers_and_stack(compiled)[1] <= most_spilled(arch, FULL), tile
        assert compiled.metadata.shared <= SHARED["default"], tile
        assert TENSOR_CORES[arch] in compiled.asm["ptx"], tile


def test_sizes_do_not_compile_a_kernel_again() -> None:
    for kernel in KERNELS.values():
        for parameter in kernel.params:
            assert parameter.do_not_specialize == (parameter.name in INTEGERS), parameter.name
            assert parameter.is_constexpr == (parameter.name.isupper() and parameter.name not in INTEGERS)
