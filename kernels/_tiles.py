# mypy: allow-untyped-defs
"""What the kernels share: tile sizes as rows of a table, how loops are cut into parts, and a few lines of Triton.

Sizes that change from batch to batch (N, K, parts) are in every kernel's do_not_specialize: a value of 1 or a multiple
of 16 shall not compile a kernel of its own. Strides are specialised: aligned_rows makes them multiples of 16, which
vector loads have to know.

A tile is chosen by GPU architecture, bytes of a number and width of the rows; nothing is tried out at run time.
tests/kernels/test_compile.py compiles every row of the table and holds it to the shared memory it has and to no spills;
with all options at once on sm_80 to 160 bytes of them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))
INF = tl.constexpr(math.inf)

WIDE = 1 << 62  # the last bucket of widths: wider than the rows that a tile holds whole
ALIGNED = 16  # rows begin at multiples of so many numbers


class Tile(NamedTuple):
    """What one program takes at a time.

    Attributes:
        block_n: rows.
        block_k: keys.
        block_d: columns of a row that one product of the scores takes; a narrower row is taken whole.
        block_v: columns of the sum that a program keeps in registers; wider rows take several programs. 0 without one.
        warps, stages: as Triton means them: 32 threads each; copies of a loop's loads on their way.
    """

    block_n: int
    block_k: int
    block_d: int
    block_v: int
    warps: int
    stages: int


# {kernel: {bytes of a number: {widest row: tile}}}
Table = dict[str, dict[int, dict[int, Tile]]]

# Whatever the rows are, assign's screen takes them in two bytes. Two programs share a processor where they fit: one's
# minima run beside the other's product.
ASSIGN = {64: Tile(128, 64, 64, 0, 8, 3), 128: Tile(128, 64, 128, 0, 8, 2), WIDE: Tile(128, 64, 64, 0, 8, 3)}
ASSIGN_LARGE = {
    64: Tile(128, 128, 64, 0, 8, 3),
    128: Tile(128, 128, 128, 0, 8, 2),
    256: Tile(128, 128, 256, 0, 8, 2),
    WIDE: Tile(128, 128, 64, 0, 8, 4),
}

# Two warp groups of 64 rows of the accumulator each. What is streamed is as long as registers allow, since a block
# costs a maximum across threads and a wait. A row of four bytes is two of float16 (_halves.py), whose sum over a block
# takes registers beside the sum of all; there block_d is that of both passes, so that scores have the same bits in both
# (test_tiles.py). "default" fits the 99 KB of sm_86, sm_89 and sm_120.
TILES: dict[str, Table] = {
    "sm_100": {
        "contrast_fwd": {
            2: {
                64: Tile(128, 64, 64, 64, 8, 3),
                128: Tile(128, 64, 128, 128, 8, 3),
                256: Tile(128, 32, 256, 256, 8, 2),
                WIDE: Tile(128, 64, 32, 256, 8, 3),
            },
            4: {
                64: Tile(64, 64, 64, 64, 8, 2),
                128: Tile(128, 32, 128, 128, 8, 2),
                WIDE: Tile(64, 64, 64, 128, 8, 2),
            },
        },
        "contrast_bwd_keys": {
            2: {
                64: Tile(64, 128, 64, 64, 8, 3),
                128: Tile(32, 128, 128, 128, 8, 3),
                256: Tile(32, 128, 256, 256, 8, 2),
                WIDE: Tile(32, 128, 64, 256, 8, 3),
            },
            4: {
                64: Tile(64, 64, 64, 64, 8, 2),
                128: Tile(64, 64, 128, 128, 8, 2),
                WIDE: Tile(32, 64, 64, 128, 8, 2),
            },
        },
        "assign": {2: ASSIGN_LARGE},
    },
    "sm_90": {
        "contrast_fwd": {
            2: {
                64: Tile(128, 128, 64, 64, 8, 3),
                128: Tile(128, 128, 128, 128, 8, 3),
                256: Tile(128, 64, 256, 256, 8, 2),
                WIDE: Tile(128, 32, 64, 256, 8, 3),
            },
            4: {
                64: Tile(128, 64, 64, 64, 8, 3),
                128: Tile(128, 64, 128, 128, 8, 2),
                WIDE: Tile(128, 64, 32, 128, 8, 3),
            },
        },
        "contrast_bwd_keys": {
            2: {
                64: Tile(64, 128, 64, 64, 8, 3),
                128: Tile(64, 128, 128, 128, 8, 3),
                256: Tile(32, 128, 256, 256, 8, 3),
                WIDE: Tile(32, 128, 64, 128, 8, 3),
            },
            4: {
                64: Tile(64, 128, 64, 64, 8, 3),
                128: Tile(64, 128, 128, 128, 8, 2),
                WIDE: Tile(64, 128, 32, 128, 8, 2),
            },
        },
        "assign": {2: ASSIGN_LARGE},
    },
    "default": {
        "contrast_fwd": {
            2: {
                64: Tile(128, 64, 64, 64, 8, 3),
                128: Tile(128, 64, 128, 128, 8, 2),
                WIDE: Tile(128, 64, 64, 128, 8, 2),
            },
            4: {
                64: Tile(128, 32, 64, 64, 8, 2),
                128: Tile(64, 64, 128, 128, 8, 2),
                WIDE: Tile(64, 64, 64, 128, 8, 2),
            },
        },
        "contrast_bwd_keys": {
            2: {
                64: Tile(64, 128, 64, 64, 8, 3),
                128: Tile(64, 128, 128, 128, 8, 2),
                WIDE: Tile(64, 128, 64, 128, 8, 2),
            },
            4: {
                64: Tile(32, 128, 64, 64, 8, 2),
                128: Tile(64, 64, 128, 128, 8, 2),
                WIDE: Tile(32, 64, 64, 128, 8, 2),
            },
        },
        "assign": {2: ASSIGN},
    },
}
# What suits sm_80 stays below 99 KB: its registers are full first.
TILES["sm_80"] = TILES["default"]


def tile_for(kernel: str, dtype: torch.dtype, d: int, device: torch.device) -> Tile:
    """The tile of a kernel ("contrast_fwd", "contrast_bwd_keys", "assign") for rows of d numbers on a device."""
    table = TILES[_architecture(device)][kernel][dtype.itemsize]
    return next(tile for widest, tile in table.items() if d <= widest)


@functools.lru_cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    # The minor number changes shared memory on Ampere alone: 163 KB on sm_80, 99 KB on sm_86 and sm_89.
    name = f"sm_{major}{minor if major < 9 else 0}"
    return name if name in TILES else "default"


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=1024)
def choose_parts(programs: int, blocks: int, device: torch.device) -> int:
    """How many parts to cut a loop of ``blocks`` blocks into, which ``programs`` programs run each.

    The fewest of those that end first, where a processor runs one program at a time and a part costs as much as four
    blocks beside its own. Four programs for each processor are the most, which bounds the memory for their parts. It
    depends on sizes and on the device alone, and so do the bits of the result.
    """
    count = processors(device)

    def time(parts: int) -> int:
        return _ceil(programs * parts, count) * (_ceil(blocks, parts) + 4)

    return min(range(1, max(1, min(4 * count // programs, blocks)) + 1), key=time)


def part_length(total: int, parts: int, block: int) -> int:
    """How much of a loop one of so many parts takes: whole blocks."""
    return _ceil(_ceil(total, parts), block) * block


@functools.lru_cache(maxsize=1024)
def common_part(sizes: tuple[int, ...], parts: int, block: int) -> int:
    """The length of a part, alike for all of several loops: ``parts`` parts in all, or one a loop if that is more."""
    parts = max(parts, len(sizes))
    length = part_length(sum(sizes), parts, block)
    # One part more than there are processors would take as long as twice as many.
    while sum(_ceil(size, length) for size in sizes) > parts:
        length += block
    return length


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def aligned_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, D) as (N, D rounded up to 16), every row at a multiple of 16 numbers: itself, or a copy padded by zeros.

    So a row is always read in vectors of 16 bytes, and no kernel is compiled once more for an odd width or stride. The
    copy is N · D numbers beside N · K · D operations.
    """
    x = x.to(dtype)
    d, row = x.shape[1], x.stride(0)
    # Offsets inside a tile of at most 256 rows are 32 bits wide.
    fits = x.stride(1) == 1 and d % ALIGNED == 0 and row % ALIGNED == 0 and row < 1 << 23
    if fits and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -d % ALIGNED)).contiguous()


@triton.jit
def load_rows(ptr, stride, offs_n, mask_n, offs_d, D: tl.constexpr, EVEN: tl.constexpr):
    """Columns offs_d of rows offs_n as a tile, 0 where the row is masked or, unless EVEN, the column is beyond D.

    In a loop ptr is the first row of the block and offs_n counts from there in 32 bits: 64 would cost registers.
    """
    mask = mask_n[:, None] if EVEN else mask_n[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs_n[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_scale(a_ptr, b_ptr, offs_k, mask_k, HAS_BIAS: tl.constexpr):
    """a and b of keys, for scores in base 2. A masked key has the bias -inf: no row sees it, at no cost per score."""
    a_k = tl.load(a_ptr + offs_k, mask=mask_k, other=0.0)
    if HAS_BIAS:  # noqa: SIM108
        b_k = tl.load(b_ptr + offs_k, mask=mask_k, other=-INF) * LOG2E
    else:
        b_k = tl.where(mask_k, 0.0, -INF)
    return a_k * LOG2E, b_k
