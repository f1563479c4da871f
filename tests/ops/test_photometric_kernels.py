"""The compiled kernels of photometric against the float64 reference and torchvision, at sizes that reach every path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_backend import CUDA
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import fastproto
from fastproto import _native
from fastproto.ops.photometric import apply_photometric, color_jitter, gaussian_blur, grayscale, solarize

needs_cpp = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
BACKENDS = [
    pytest.param("cpp", "cpu", marks=needs_cpp),
    CUDA,
]
# One pixel; rows below, at and off every vector width; more pixels than one block of the mean's sum.
SHAPES = [(1, 1, 1), (3, 1, 7), (33, 33, 17), (24, 32, 32), (2, 70, 131)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVEL = 1 / 255


def problem(n: int, channels: int, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
    """Images with gray, black, white and primary pixels, and each change for some of them, in all orders in turn."""
    images = torch.rand(n, channels, height, width)
    images[:, :, 0, 0] = 0.5
    images[:, :, -1, -1] = torch.randint(2, (n, channels)).float()
    jitter = torch.cat([2 * torch.rand(n, 3), torch.rand(n, 1) - 0.5], dim=1)
    jitter[::4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    orders = torch.tensor(list(itertools.permutations(range(4))))
    return images, {
        "jitter": jitter,
        "order": orders[(5 * torch.arange(n)) % 24],
        "gray": torch.rand(n) < 0.3,
        "sigma": (2 * torch.rand(n) + 0.1) * (torch.rand(n) < 0.5),
        "threshold": torch.where(torch.rand(n) < 0.3, 0.5, math.inf),
        "mean": MEAN[:channels],
        "std": STD[:channels],
    }


def moved(parameters: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in parameters.items()}


def assert_as_in_float64(out: Tensor, images: Tensor, parameters: dict[str, Any], atol: float) -> None:
    """But for values that solarisation turns over on one side of the threshold and not on the other."""
    threshold = parameters.get("threshold")
    before = apply_photometric(images.double(), **{**parameters, "threshold": None, "mean": None, "std": None})
    expected = apply_photometric(images.double(), **parameters)
    if threshold is not None:
        near = (before - threshold.view(-1, 1, 1, 1)).abs() < atol
        assert near.double().mean() < 0.01 or images.numel() < 100
        expected = torch.where(near, out.cpu().double(), expected)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=atol)


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    before, threads = _native.cpp.isa(), torch.get_num_threads()
    yield _native.cpp.supported_isas()
    _native.cpp.set_isa(before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_equals_the_float64_reference(backend: str, device: str, shape: tuple[int, int, int], channels: int) -> None:
    images, parameters = problem(shape[0], channels, *shape[1:])
    with fastproto.backend(backend):
        out = apply_photometric(images.to(device), **moved(parameters, device))
    # Where two channels nearly tie, the hue hangs on their difference: its error is that of the chroma's last bit.
    assert_as_in_float64(out, images, parameters, atol=5e-5)


@needs_cpp
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_and_number_of_threads(
    every_isa: list[str], shape: tuple[int, int, int], channels: int
) -> None:
    images, parameters = problem(shape[0], channels, *shape[1:])
    for isa in every_isa:
        _native.cpp.set_isa(isa)
        outs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(apply_photometric(images, **parameters))
        assert_as_in_float64(outs[0], images, parameters, atol=5e-5)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.5, 40.0])
def test_within_a_level_of_torchvision(backend: str, device: str, factor: float) -> None:
    """Every order of the four, at factors far beyond those that anyone draws."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images = problem(24, 3, 13, 10)[0]
    jitter = torch.tensor([factor, factor, factor, 0.0]).repeat(24, 1)
    jitter[:, 3] = torch.linspace(-0.5, 0.5, 24)
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    expected = images.double()
    for n, order in enumerate(orders.tolist()):
        for which in order:
            expected[n] = changes[which](expected[n], float(jitter[n, which]))
    with fastproto.backend(backend):
        out = color_jitter(images.to(device), jitter.to(device), orders.to(device))
    assert (out.cpu() - expected).abs().max() <= LEVEL


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_each_change_is_torchvisions(backend: str, device: str) -> None:
    images = torch.rand(4, 3, 96, 70)
    sigma, threshold = torch.tensor([0.1, 0.7, 2.0, 30.0]), torch.tensor([0.0, 0.3, 0.7, 1.0])
    with fastproto.backend(backend):
        blurred = gaussian_blur(images.to(device), sigma.to(device), 23).cpu()
        solarized = apply_photometric(images.to(device), threshold=threshold.to(device)).cpu()
        gray = apply_photometric(images.to(device), gray=torch.ones(4, dtype=torch.bool, device=device)).cpu()
        normal = apply_photometric(images.to(device), mean=MEAN, std=STD).cpu()
    for n, image in enumerate(images):
        expected = tv.gaussian_blur(image, [23, 23], [float(sigma[n])])
        torch.testing.assert_close(blurred[n], expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(solarized[n], tv.solarize(image, float(threshold[n])), rtol=0, atol=1e-7)
        torch.testing.assert_close(gray[n], tv.rgb_to_grayscale(image, 3), rtol=0, atol=2e-7)
        torch.testing.assert_close(normal[n], tv.normalize(image, list(MEAN), list(STD)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gray_of_any_values_and_a_threshold_that_a_pixel_meets(backend: str, device: str) -> None:
    """Images that were normalised first: no value is cut off. And a float64 threshold is that of the pixels' dtype."""
    images, chosen = 3 * torch.randn(4, 3, 9, 7), torch.tensor([True, False, True, True])
    threshold = torch.tensor([0.7, 0.9, 0.1, 0.3], dtype=torch.float64)
    levels = threshold.float()[:, None, None, None].expand(4, 3, 5, 5).contiguous()
    with fastproto.backend(backend):
        gray = grayscale(images.to(device), chosen.to(device)).cpu()
        inverted = solarize(levels.to(device), threshold.to(device)).cpu()
    for image, found, is_gray in zip(images, gray, chosen, strict=True):
        expected = tv.rgb_to_grayscale(image, 3) if is_gray else image
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with fastproto.backend("reference"):
        assert torch.equal(inverted, solarize(levels, threshold))
    assert torch.equal(inverted, 1 - levels)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_hue_of_gray_and_primary_pixels(backend: str, device: str) -> None:
    levels = (0.0, 1e-38, 0.25, 1.0)
    cube = torch.tensor(list(itertools.product(levels, repeat=3))).T.reshape(1, 3, 8, 8).repeat(25, 1, 1, 1)
    jitter = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(25, 1)
    jitter[:, 3] = torch.linspace(-0.5, 0.5, 25)
    with fastproto.backend(backend):
        out = color_jitter(cube.to(device), jitter.to(device)).cpu()
    assert_as_in_float64(out, cube, {"jitter": jitter}, atol=2e-6)
    gray = (cube == cube[:, :1]).all(dim=1, keepdim=True).expand_as(cube)
    assert torch.equal(out[gray], cube[gray])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("radius", [1, 4, 16])
def test_blur_up_to_the_widest_kernel(backend: str, device: str, radius: int) -> None:
    images, sigma = torch.rand(3, 3, radius + 1, 61), torch.tensor([0.2, 3.0, 50.0])
    with fastproto.backend(backend):
        out = gaussian_blur(images.to(device), sigma.to(device), 2 * radius + 1)
    assert_as_in_float64(out, images, {"sigma": sigma, "kernel_size": 2 * radius + 1}, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_in_and_out(backend: str, device: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    images, parameters = problem(9, 3, 20, 21)
    images, parameters = images.to(device, dtype), moved(parameters, device)
    out = torch.full(images.shape, math.nan, dtype=out_dtype, device=device)
    with fastproto.backend(backend):
        single = apply_photometric(images.float(), **parameters)
        returned = apply_photometric(images, **parameters, out=out)
        own = apply_photometric(images, **parameters)
    assert returned is out
    if out_dtype == torch.float64:
        torch.testing.assert_close(out.float(), single, rtol=0, atol=5e-5)
    else:
        assert torch.equal(out, single.to(out_dtype))
    assert own.dtype == dtype
    assert torch.equal(own, single.to(dtype))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_layouts_and_in_place(backend: str, device: str, channels: int) -> None:
    images, parameters = problem(9, channels, 20, 21)
    images, parameters = images.to(device), moved(parameters, device)
    doubled = torch.full((9, channels, 20, 42), math.nan, device=device)
    with fastproto.backend(backend):
        expected = apply_photometric(images, **parameters)
        last = apply_photometric(images.to(memory_format=torch.channels_last), **parameters)
        turned = apply_photometric(images.mT.contiguous().mT, **parameters)
        into_last = torch.full_like(images, math.nan, memory_format=torch.channels_last)
        apply_photometric(images, **parameters, out=into_last)
        apply_photometric(images, **parameters, out=doubled[..., ::2])
        same = images[:1].expand(9, -1, -1, -1)
        expanded = apply_photometric(same, **parameters)
        copied = apply_photometric(same.contiguous(), **parameters)
        in_place = images.clone()
        apply_photometric(in_place, **parameters, out=in_place)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert turned.stride() == images.mT.contiguous().mT.stride()
    for other in (last, turned, into_last, doubled[..., ::2], in_place):
        assert torch.equal(other, expected)
    assert doubled[..., 1::2].isnan().all()
    assert torch.equal(expanded, copied)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_nan_stays_in_its_image(backend: str, device: str, channel: int) -> None:
    images, parameters = problem(24, 3, 9, 9)
    colours = {"jitter": parameters["jitter"].to(device), "order": parameters["order"].to(device)}
    changed = images.clone()
    changed[3::4, channel, 4, 4] = math.nan
    with fastproto.backend(backend):
        out = color_jitter(changed.to(device), **colours).cpu()
        clean = color_jitter(images.to(device), **colours).cpu()
    others = torch.arange(24) % 4 != 3
    assert torch.equal(out[others], clean[others])
    assert out[3::4, :, 4, 4].isnan().any(dim=1).all()
    assert not clean.isnan().any()


@needs_cpp
def test_op_is_sound_and_compiles() -> None:
    images, parameters = problem(5, 3, 12, 12)
    order, rest = parameters["order"], parameters
    args = (images, rest["jitter"], order, rest["gray"], rest["sigma"], 3, rest["threshold"], [1.0] * 3, [0.0] * 3)
    torch.library.opcheck(torch.ops.fastproto.photometric.default, (*args, torch.zeros_like(images)))
    expected = apply_photometric(images, **parameters)

    def in_place(x: Tensor) -> Tensor:
        x = x + 0
        return apply_photometric(x, **parameters, out=x) * 2

    compiled = torch.compile(in_place, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected * 2)


X = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": (0.5,)}, ValueError, "mean expected 3 numbers, one per channel, got tuple"),
        ({"std": (0.5,) * 4}, ValueError, "std expected 3 numbers, one per channel, got tuple"),
        ({"std": (0.5, 0.5, 0.0)}, ValueError, "std expected positive finite numbers, got tuple"),
        ({"out": X[:1]}, ValueError, r"out expected \(2, 3, 8, 8\) on cpu, got float32 \(1, 3, 8, 8\)"),
        ({"out": X.byte()}, TypeError, "out expected a float32 or float64 or float16 or bfloat16 tensor"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"apply_photometric: {message}"):
        apply_photometric(X, **options)
