"""Large outputs of the C++ kernels ask Linux for huge pages (csrc/common/huge_pages.h)."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastproto import _native
from fastproto.ops.crop_resize import crop_resize
from fastproto.ops.photometric import apply_photometric

SMAPS = Path("/proc/self/smaps")
pytestmark = [
    pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error),
    pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"),
]


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


@pytest.mark.parametrize(("side", "asks"), [(1000, True), (200, False)])
def test_crop_resize(side: int, asks: bool) -> None:
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    crops = torch.tensor([[0, 0, 40, 40], [3, 5, 20, 30]], dtype=torch.int32)
    out = in_new_memory(2, 3, side, side)
    assert not asks_for_huge_pages(out)
    crop_resize(images, crops, side, out=out)
    assert asks_for_huge_pages(out) == asks
    assert torch.equal(out, crop_resize(images, crops, side))


@pytest.mark.parametrize(("side", "asks"), [(1000, True), (200, False)])
def test_photometric(side: int, asks: bool) -> None:
    images, out = torch.rand(2, 3, side, side), in_new_memory(2, 3, side, side)
    apply_photometric(images, gray=torch.tensor([True, False]), out=out)
    assert asks_for_huge_pages(out) == asks
    assert torch.equal(out[1], images[1])
