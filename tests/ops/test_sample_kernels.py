"""The compiled sample_crops and sample_photometric: bit for bit what the reference draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from cuda_backend import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto._random import Stream, random_bits
from fastproto.ops.sample_crops import sample_crops_and_flips
from fastproto.ops.sample_photometric import sample_photometric
from fastproto.views import SIMC_BOX

needs_cpp = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
BACKENDS = [
    pytest.param("cpp", "cpu", marks=needs_cpp),
    CUDA,
]
DEFAULTS = {
    "boxes": None, "scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "alpha": 0.6, "views": 2, "seed": 0, "epoch": 0,
}  # fmt: skip
WIDE = torch.tensor([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**62 + 1, -(2**63)])


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    before, threads = _native.cpp.isa(), torch.get_num_threads()
    yield _native.cpp.supported_isas()
    _native.cpp.set_isa(before)
    torch.set_num_threads(threads)


def random_boxes(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(rows, 2, 2, dtype=dtype).sort(dim=1).values.flatten(1)


def on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def assert_crops_equal(backend: str, device: str, ids: Tensor, size: Any, **options: Any) -> Tensor:
    """The crops, which are the reference's, as are the flips."""
    options = {**DEFAULTS, **options}
    with fastproto.backend("reference"):
        crops, flip = sample_crops_and_flips(ids, size, **options)
    options["boxes"] = on(device, options["boxes"])
    with fastproto.backend(backend):
        ours = sample_crops_and_flips(ids.to(device), on(device, size), **options)
    assert torch.equal(ours[0].cpu(), crops)
    assert torch.equal(ours[1].cpu(), flip)
    return crops


def assert_photometric_equal(backend: str, device: str, ids: Tensor, **options: Any) -> None:
    with fastproto.backend("reference"):
        expected = sample_photometric(ids, **options)
    with fastproto.backend(backend):
        ours = sample_photometric(ids.to(device), **options)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name].cpu(), value), name


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.6, 1, 5.0])
@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        ((0.2, 1.0), (3 / 4, 4 / 3)),
        ((0.05, 0.14), (0.5, 2.0)),
        ((1e-6, 1e-3), (1 / 512, 512.0)),
        ((1.0, 1.0), (1.0, 1.0)),
        ((0.9, 1.0), (0.1, 0.11)),
    ],
)
def test_crops_of_every_size(
    backend: str, device: str, alpha: float, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    """Also of images of one pixel, of one row, and of those that none of ten tries fits."""
    edges = [(1, 1), (1, 4000), (4000, 1), (2, 3), (10, 300), (65_535, 65_537), (46_341, 46_341)]
    sizes = torch.cat([torch.tensor(edges), torch.randint(1, 700, (400, 2))])
    ids = torch.randint(-(2**62), 2**62, (len(sizes),))
    options = {"boxes": random_boxes(len(ids)), "scale": scale, "ratio": ratio, "alpha": alpha, "views": 3}
    assert_crops_equal(backend, device, ids, sizes, **options, seed=2**63 - 1, epoch=2**32 - 1)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (32, 32), (17, 230)])
def test_crops_of_one_size(backend: str, device: str, size: tuple[int, int]) -> None:
    ids = torch.cat([WIDE, torch.arange(300)])
    assert_crops_equal(backend, device, ids, size)
    assert_crops_equal(backend, device, ids, size, boxes=SIMC_BOX, seed=5)
    # Numbers that float32 does not hold.
    assert_crops_equal(backend, device, ids, size, boxes=(0.1, 0.2, 0.3, 0.7), epoch=7)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_centre_crop_after_ten_failures(backend: str, device: str) -> None:
    crops = assert_crops_equal(backend, device, torch.arange(200), (10, 400), scale=(0.9, 1.0))
    assert (crops == torch.tensor([0, 193, 10, 13])).all(dim=1).any()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_forms_of_the_arguments(backend: str, device: str) -> None:
    rows = 50
    ids, sizes = torch.randperm(500)[:rows], torch.randint(1, 90, (rows, 2))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        boxes = random_boxes(rows, torch.float64).to(dtype)
        expected = assert_crops_equal(backend, device, ids, sizes, boxes=boxes)
        for other in (boxes.T.contiguous().T, torch.cat([boxes, boxes], dim=1)[:, :4]):
            assert torch.equal(expected, assert_crops_equal(backend, device, ids, sizes, boxes=other))
        assert torch.equal(expected, assert_crops_equal(backend, device, ids.int(), sizes.int(), boxes=boxes))
        strided = torch.stack([ids, ids], dim=1)[:, 1]
        turned = sizes.T.contiguous().T
        assert torch.equal(expected, assert_crops_equal(backend, device, strided, turned, boxes=boxes))
    assert_crops_equal(backend, device, ids[:1].expand(5), sizes[:1].expand(5, 2), boxes=boxes[:1].expand(5, 4))
    assert_crops_equal(backend, device, ids[:0], sizes[:0], boxes=boxes[:0])
    assert_crops_equal(backend, device, ids[:0], (3, 4))


@needs_cpp
def test_every_instruction_set_and_number_of_threads(every_isa: list[str]) -> None:
    """So many rows that two threads share them."""
    ids = torch.arange(5001)
    boxes = random_boxes(len(ids))
    for isa in every_isa:
        _native.cpp.set_isa(isa)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_crops_equal("cpp", "cpu", ids, (40, 50), boxes=boxes, views=4)
            assert_photometric_equal("cpp", "cpu", ids, views=4, blur_p=0.5, solarize_p=0.5)


@needs_cpp
@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    scale=st.tuples(st.floats(1e-9, 1), st.floats(2.0**-24, 1)),
    ratio=st.tuples(st.floats(1 / 512, 512), st.floats(1 / 512, 512)),
    seed=st.integers(0, 2**63 - 1),
)
def test_crops_of_any_options(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], seed: int
) -> None:
    low_high = {"scale": tuple(sorted(scale)), "ratio": tuple(sorted(ratio))}
    assert_crops_equal("cpp", "cpu", torch.arange(64), size, **low_high, seed=seed)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_flips_are_the_stream_of_their_own(backend: str, device: str) -> None:
    key = {"views": 3, "seed": 2**40 + 1, "epoch": 9}
    with fastproto.backend(backend):
        _, flip = sample_crops_and_flips(WIDE.to(device), (8, 8), **{**DEFAULTS, **key})
    assert torch.equal(flip.cpu(), random_bits(WIDE, Stream.FLIP, 1, **key).flatten() < 2**31)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_photometric_is_the_references(backend: str, device: str) -> None:
    ids = torch.cat([WIDE, torch.randint(2**40, (2000,))])
    for jitter_p, other_p in itertools.product((0.0, 0.3, 1.0), repeat=2):
        chances = {"jitter_p": jitter_p, "gray_p": other_p, "blur_p": other_p, "solarize_p": other_p}
        for jitter, sigma in (((0.4, 0.4, 0.4, 0.1), (0.1, 2.0)), ((0.7, 1.3, 1 / 3, 0.5), (1 / 3, 7.7))):
            key = {"seed": 2**62 + 5, "epoch": 2**32 - 1, "views": 3}
            assert_photometric_equal(backend, device, ids, jitter=jitter, sigma=sigma, threshold=0.3, **chances, **key)
    for other in (ids.int(), torch.stack([ids, ids], dim=1)[:, 1], ids[:1].expand(5), ids[:0]):
        assert_photometric_equal(backend, device, other, blur_p=0.5, solarize_p=0.1)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_product_and_sum_are_rounded_one_after_the_other(backend: str, device: str) -> None:
    """This sample's hue is so near to the middle that a fused multiply-add gives another float32."""
    ids, options = torch.tensor([1_063_431]), {"jitter": (0.0, 0.0, 0.0, 0.024), "jitter_p": 1.0, "views": 1}
    with fastproto.backend(backend):
        hue = sample_photometric(ids.to(device), **options)["jitter"][0, 3]
    draw = (2**31 + 35) * 2.0**-32
    assert float(hue) == float(torch.tensor(-0.024 + 0.048 * draw))
    assert float(hue) != float(torch.tensor(float(Fraction(-0.024) + Fraction(0.048) * Fraction(draw))))


def test_photometric_is_pinned() -> None:
    """These numbers may never change: a run continued with a new version would see other colours."""
    p = sample_photometric(
        torch.tensor([0, 2**40 + 1, -3]), jitter=(0.4, 0.3, 1.2, 0.1), jitter_p=0.9, gray_p=0.4, blur_p=0.6,
        solarize_p=0.5, threshold=0.3, views=1, seed=2**62 + 5, epoch=2**32 - 1,
    )  # fmt: skip
    jitter = [
        ["0x1.48dd74p+0", "0x1.49a58ep+0", "0x1.4580eap+0", "0x1.b5c34p-5"],
        ["0x1.5b4858p-1", "0x1.6b41aep-1", "0x1.e33e36p+0", "0x1.894cd8p-4"],
        ["0x1.87c764p-1", "0x1.a6e68ep-1", "0x1.fc2bc4p+0", "-0x1.6a9532p-4"],
    ]
    assert p["jitter"].tolist() == [[float.fromhex(number) for number in row] for row in jitter]
    assert p["order"].tolist() == [[2, 1, 3, 0], [1, 0, 2, 3], [1, 3, 0, 2]]
    assert p["gray"].tolist() == [False, False, False]
    assert p["sigma"].tolist() == [0.0, 0.0, 0.0]
    assert p["threshold"].tolist() == [math.inf, math.inf, float.fromhex("0x1.333334p-2")]


def test_photometric_op_is_sound_and_compiles() -> None:
    ids = torch.arange(5)
    options = (0.8, [0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], 0.2, 0.5, [0.1, 2.0], 0.2, 0.5, 2, 0, 0)
    torch.library.opcheck(torch.ops.fastproto.sample_photometric.default, (ids, *options))
    compiled = torch.compile(lambda ids: sample_photometric(ids, epoch=1)["jitter"], fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), sample_photometric(ids, epoch=1)["jitter"])
