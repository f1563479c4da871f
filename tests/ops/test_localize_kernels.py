"""The compiled localize against the reference, at sizes and layouts that reach every path."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cuda_backend import CUDA
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto.ops.localize import MAX_CUDA_PLACES, localize

needs_cpp = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
BACKENDS = [
    pytest.param("cpp", "cpu", marks=needs_cpp),
    CUDA,
]


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    before, threads = _native.cpp.isa(), torch.get_num_threads()
    yield _native.cpp.supported_isas()
    _native.cpp.set_isa(before)
    torch.set_num_threads(threads)


def expected_boxes(feature_map: Tensor, threshold: float, size: tuple[int, int] | None) -> Tensor:
    with fastproto.backend("reference"):
        return localize(feature_map.double(), threshold, size)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("threshold", [0.1, 0.37, 0.6, 0.995])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((33, 512, 4, 4), (32, 32)),
        ((9, 64, 7, 7), (224, 224)),
        ((9, 1, 5, 9), (33, 20)),
        ((9, 3, 1, 6), (17, 24)),
        ((9, 2, 12, 1), (5, 3)),
        ((9, 4, 9, 8), None),
        ((3, 2, 70, 60), (640, 480)),
    ],
)
def test_equals_the_reference(
    backend: str, device: str, threshold: float, shape: tuple[int, ...], size: tuple[int, int] | None
) -> None:
    """One warm place in every second map, so that each edge lies far inside."""
    feature_map = torch.randn(shape).relu()
    feature_map[::2] *= 0.001
    feature_map[::2, :, shape[2] // 2, shape[3] // 3] = 1.0
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        rounded = feature_map.to(dtype)
        with fastproto.backend(backend):
            boxes = localize(rounded.to(device), threshold, size)
        assert boxes.dtype == torch.float32
        assert torch.equal(boxes.cpu(), expected_boxes(rounded, threshold, size))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_layouts(backend: str, device: str) -> None:
    feature_map = torch.randn(6, 24, 5, 7, device=device)
    last = feature_map.to(memory_format=torch.channels_last)
    turned = feature_map.mT.contiguous().mT
    part = torch.cat([feature_map, feature_map], dim=3)[..., 7:]
    one = feature_map[:1].expand(6, -1, -1, -1)
    with fastproto.backend(backend):
        boxes = localize(feature_map, 0.3, (40, 30))
        for other in (last, turned, part):
            assert torch.equal(localize(other, 0.3, (40, 30)), boxes)
        assert torch.equal(localize(one, 0.3, (40, 30)), boxes[:1].expand(6, 4))
        assert localize(feature_map[:0], 0.3, (40, 30)).shape == (0, 4)
    assert torch.equal(boxes.cpu(), expected_boxes(feature_map.cpu(), 0.3, (40, 30)))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_maps_without_a_warm_part(backend: str, device: str) -> None:
    maps = torch.randn(6, 2, 4, 4)
    maps[0] = 0.7
    maps[1, 0, 1, 1] = math.nan
    maps[2, 0, 1, 1] = math.inf
    maps[3, 0, 1, 1] = -math.inf
    # A single place is thinned out between the pixels of a smaller image.
    maps[4] = 0.0
    maps[4, :, 0, 0] = 1.0
    with fastproto.backend(backend):
        boxes = localize(maps.to(device), 0.9, (2, 2)).cpu()
    assert boxes[:5].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 5
    assert torch.equal(boxes, expected_boxes(maps, 0.9, (2, 2)))


@needs_cpp
def test_every_instruction_set_and_number_of_threads(every_isa: list[str]) -> None:
    feature_map = torch.randn(7, 130, 7, 6)
    expected = expected_boxes(feature_map, 0.2, (50, 41))
    for isa in every_isa:
        _native.cpp.set_isa(isa)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(localize(feature_map, 0.2, (50, 41)), expected)


def test_op_is_sound() -> None:
    torch.library.opcheck(torch.ops.fastproto.localize.default, (torch.randn(3, 4, 5, 5), 0.1, 20, 24))


@pytest.mark.gpu
def test_cuda_takes_maps_of_any_size() -> None:
    """Up to the last that fits its memory, and larger ones."""
    for places in (MAX_CUDA_PLACES, MAX_CUDA_PLACES + 1):
        feature_map = torch.randn(2, 3, 1, places, dtype=torch.float64)
        boxes = localize(feature_map.cuda(), 0.9, (3, 2 * places)).cpu()
        assert torch.equal(boxes, expected_boxes(feature_map, 0.9, (3, 2 * places)))
