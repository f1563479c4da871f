"""What the C++ kernels do for large outputs: huge pages, and stores past the caches (csrc/common/large_output.h)."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastproto import _native
from fastproto.ops.crop_resize import crop_resize
from fastproto.ops.photometric import apply_photometric

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
has_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)


def in_new_memory(*shape: int) -> Tensor:
    """Float32 zeros in a mapping of their own, which nothing has given advice on."""
    size = 4 * torch.Size(shape).numel()
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), dtype=torch.float32).view(shape)


def asks_for_huge_pages(tensor: Tensor) -> bool:
    """Whether the pages in the middle of a tensor carry the flag "hg"."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        word, *flags = line.split()
        if word == "VmFlags:" and inside:
            return "hg" in flags
        if not word.endswith(":"):
            start, end = (int(address, 16) for address in word.split("-"))
            inside = start <= middle < end
    raise AssertionError("no mapping holds the tensor")


@has_huge_pages
@pytest.mark.parametrize(("side", "asks"), [(1000, True), (200, False)])
def test_crop_resize_asks_for_huge_pages(side: int, asks: bool) -> None:
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    crops = torch.tensor([[0, 0, 40, 40], [3, 5, 20, 30]], dtype=torch.int32)
    out = in_new_memory(2, 3, side, side)
    assert not asks_for_huge_pages(out)
    crop_resize(images, crops, side, out=out)
    assert asks_for_huge_pages(out) == asks
    assert torch.equal(out, crop_resize(images, crops, side))


@has_huge_pages
@pytest.mark.parametrize(("side", "asks"), [(1000, True), (200, False)])
def test_photometric_asks_for_huge_pages(side: int, asks: bool) -> None:
    images, out = torch.rand(2, 3, side, side), in_new_memory(2, 3, side, side)
    apply_photometric(images, gray=torch.tensor([True, False]), out=out)
    assert asks_for_huge_pages(out) == asks
    assert torch.equal(out[1], images[1])


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "offset"), [(256, 0), (251, 0), (256, 3)])
def test_crops_stored_past_the_caches_are_the_same(dtype: torch.dtype, width: int, offset: int) -> None:
    """More than 16 MiB in one call against one crop a call; rows that no vector divides, and rows off every line."""
    images = torch.randint(256, (3, 3, 40, 50), dtype=torch.uint8)
    crops = torch.tensor([[0, 0, 40, 50], [3, 5, 20, 30], [7, 1, 33, 48]], dtype=torch.int32).repeat(18, 1)
    shape = torch.Size((len(crops), 3, 240, width))
    for isa in _native.cpp.supported_isas():
        _native.cpp.set_isa(isa)
        out = torch.full((shape.numel() + offset,), 7.0, dtype=dtype)[offset:].view(shape)
        assert out.nbytes > 2**24
        crop_resize(images, crops, (240, width), dtype=dtype, out=out)
        for r in range(3):
            one = crop_resize(images[r : r + 1], crops[r : r + 1], (240, width), dtype=dtype)
            assert all(torch.equal(out[again], one[0]) for again in range(r, len(crops), 3))
