"""The photometric functions against loops in plain Python (colorsys for hue) and against torchvision."""

from __future__ import annotations

import colorsys
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto.views import apply_photometric, color_jitter, gaussian_blur, grayscale, solarize

Pixel = tuple[float, ...]


def luma(pixel: Pixel) -> float:
    return pixel[0] if len(pixel) == 1 else 0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def jittered(pixels: list[Pixel], factors: list[float], order: list[int]) -> list[Pixel]:
    """One image's pixels through the four changes, one after the other, from their definitions."""

    def blended(pixel: Pixel, factor: float, target: float) -> Pixel:
        return tuple(min(max(factor * value + (1 - factor) * target, 0.0), 1.0) for value in pixel)

    for which in order:
        factor = factors[which]
        if which == 0:
            pixels = [blended(pixel, factor, 0.0) for pixel in pixels]
        elif which == 1:
            mean = sum(luma(pixel) for pixel in pixels) / len(pixels)
            pixels = [blended(pixel, factor, mean) for pixel in pixels]
        elif len(pixels[0]) == 3 and which == 2:
            pixels = [blended(pixel, factor, luma(pixel)) for pixel in pixels]
        elif len(pixels[0]) == 3:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
            pixels = [colorsys.hsv_to_rgb((h + factor) % 1.0, s, v) for h, s, v in hsv]
    return pixels


def jittered_by_loops(images: Tensor, jitter: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(images)
    for n, image in enumerate(images):
        pixels = [tuple(pixel) for pixel in image.flatten(1).T.tolist()]
        changed = jittered(pixels, jitter[n].tolist(), order[n].tolist())
        out[n] = torch.tensor(changed, dtype=images.dtype).T.view_as(image)
    return out


def random_jitter(n: int) -> Tensor:
    return torch.cat([2 * torch.rand(n, 3), torch.rand(n, 1) - 0.5], dim=1)


def random_orders(n: int) -> Tensor:
    return torch.rand(n, 4).argsort(dim=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "height", "width"), [(1, 5, 7), (33, 3, 4), (2, 1, 1)])
def test_jitter_against_loops(n: int, channels: int, height: int, width: int) -> None:
    images = torch.rand(n, channels, height, width, dtype=torch.float64)
    # Equal channels, gray, black and white pixels decide ties in the hue.
    images[0, :, 0, 0] = 0.5
    images[-1, :2, -1, -1] = 1.0
    jitter, order = random_jitter(n).double(), random_orders(n)
    expected = jittered_by_loops(images, jitter, order)
    torch.testing.assert_close(color_jitter(images, jitter, order), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(color_jitter(images.float(), jitter, order), expected.float(), rtol=0, atol=1e-5)


def test_every_corner_of_the_colour_cube_at_every_turn() -> None:
    levels = (0.0, 0.25, 1.0)
    cube = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.float64).T.reshape(1, 3, 9, 3)
    turns = torch.linspace(-0.5, 0.5, 25, dtype=torch.float64)
    jitter = torch.stack([torch.ones(25)] * 3 + [turns], dim=1)
    images = cube.expand(25, 3, 9, 3)
    expected = jittered_by_loops(images, jitter, torch.tensor([[3, 0, 1, 2]]).expand(25, 4))
    torch.testing.assert_close(color_jitter(images, jitter), expected, rtol=0, atol=1e-12)


def test_jitter_against_torchvision_in_all_orders() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    order = torch.tensor(list(itertools.permutations(range(4))))
    images, jitter = torch.rand(24, 3, 12, 10), random_jitter(24)
    expected = images.clone()
    for n in range(24):
        for which in order[n].tolist():
            expected[n] = changes[which](expected[n], float(jitter[n, which]))
    torch.testing.assert_close(color_jitter(images, jitter, order), expected, rtol=0, atol=2e-5)
    in_numbered_order = color_jitter(images, jitter, torch.arange(4).expand(24, 4).int())
    assert torch.equal(color_jitter(images, jitter), in_numbered_order)


def test_neutral_jitter_changes_nothing() -> None:
    images = torch.rand(5, 3, 8, 8)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(5, 4)
    torch.testing.assert_close(color_jitter(images, neutral, random_orders(5)), images, rtol=0, atol=1e-6)
    gray = images[:, :1]
    only_colour = torch.tensor([1.0, 1.0, 0.3, 0.2]).expand(5, 4)
    assert torch.equal(color_jitter(gray, only_colour, random_orders(5)), gray)


def test_values_outside_the_range_are_clamped() -> None:
    images = torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 1, 3)
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert color_jitter(images, neutral).flatten().tolist() == [0.0, 0.5, 1.0]


def test_grayscale() -> None:
    images = torch.rand(33, 3, 5, 7, dtype=torch.float64)
    chosen = torch.rand(33) < 0.5
    out = grayscale(images, chosen)
    for image, gray, is_chosen in zip(images, out, chosen, strict=True):
        red, green, blue = image
        expected = (0.2989 * red + 0.587 * green + 0.114 * blue).expand(3, 5, 7) if is_chosen else image
        torch.testing.assert_close(gray, expected, rtol=0, atol=1e-12)
    assert torch.equal(out[~chosen], images[~chosen])
    assert torch.equal(grayscale(images[:, :1], chosen), images[:, :1])


def blurred_by_loops(image: Tensor, sigma: float, kernel_size: int) -> Tensor:
    radius = kernel_size // 2
    weights = [math.exp(-(i * i) / (2 * sigma * sigma)) for i in range(-radius, radius + 1)]
    _, height, width = image.shape

    def mirrored(i: int, side: int) -> int:
        i = abs(i)
        return i if i < side else 2 * (side - 1) - i

    out = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        for (i, a), (j, b) in itertools.product(enumerate(weights), enumerate(weights)):
            pixel = image[:, mirrored(y + i - radius, height), mirrored(x + j - radius, width)]
            out[:, y, x] += a * b * pixel
    return out / sum(weights) ** 2


@pytest.mark.parametrize(
    ("shape", "kernel_size"), [((2, 3, 6, 5), 3), ((1, 1, 4, 9), 7), ((3, 1, 5, 5), 5), ((2, 3, 1, 1), 1)]
)
def test_blur_against_loops(shape: tuple[int, ...], kernel_size: int) -> None:
    images = torch.rand(shape, dtype=torch.float64)
    sigma = 0.1 + 2 * torch.rand(shape[0], dtype=torch.float64)
    expected = [blurred_by_loops(image, float(s), kernel_size) for image, s in zip(images, sigma, strict=True)]
    torch.testing.assert_close(gaussian_blur(images, sigma, kernel_size), torch.stack(expected), rtol=0, atol=1e-12)


def test_blur_against_torchvision() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images, sigma = torch.rand(5, 3, 96, 70), torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    expected = [functional.gaussian_blur(image, [7, 7], [float(s)]) for image, s in zip(images, sigma, strict=True)]
    torch.testing.assert_close(gaussian_blur(images, sigma), torch.stack(expected), rtol=0, atol=1e-5)


def test_blur_of_sigma_zero_changes_nothing() -> None:
    images = torch.rand(3, 3, 20, 20)
    out = gaussian_blur(images, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(out[::2], images[::2])
    assert not torch.equal(out[1], images[1])


@pytest.mark.parametrize(("side", "kernel_size"), [(224, 23), (96, 9), (64, 7), (40, 5), (32, 3), (2, 3), (1, 1)])
def test_kernel_is_a_tenth_of_the_image(side: int, kernel_size: int) -> None:
    images, sigma = torch.rand(1, 1, side, side), torch.tensor([1.5])
    assert torch.equal(gaussian_blur(images, sigma), gaussian_blur(images, sigma, kernel_size))


def test_solarize() -> None:
    images = torch.rand(4, 3, 5, 5)
    threshold = torch.tensor([0.5, 0.0, 1.0, math.inf])
    out = solarize(images, threshold)
    for image, one, limit in zip(images, out, threshold, strict=True):
        assert torch.equal(one, torch.where(image >= limit, 1 - image, image))
    assert torch.equal(out[3], images[3])


def parameters(n: int) -> dict[str, Tensor]:
    return {
        "jitter": random_jitter(n),
        "order": random_orders(n),
        "gray": torch.rand(n) < 0.5,
        "sigma": 2 * torch.rand(n),
        "threshold": torch.rand(n),
    }


def test_all_at_once_is_one_after_the_other() -> None:
    images, p = torch.rand(9, 3, 12, 12), parameters(9)
    out = color_jitter(images, p["jitter"], p["order"])
    out = solarize(gaussian_blur(grayscale(out, p["gray"]), p["sigma"]), p["threshold"])
    torch.testing.assert_close(apply_photometric(images, **p), out, rtol=0, atol=1e-6)
    assert torch.equal(apply_photometric(images), images)


def test_input_stays_as_it_is() -> None:
    images = torch.rand(9, 3, 12, 12)
    before = images.clone()
    assert apply_photometric(images).data_ptr() != images.data_ptr()
    apply_photometric(images, **parameters(9))
    assert torch.equal(images, before)


def test_any_strides_and_batches() -> None:
    images, p = torch.rand(9, 3, 12, 10), parameters(9)
    out = apply_photometric(images, **p)
    for same in (images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
        torch.testing.assert_close(apply_photometric(same, **p), out, rtol=0, atol=1e-6)
    one = torch.rand(1, 3, 12, 10).expand(9, 3, 12, 10)
    torch.testing.assert_close(apply_photometric(one, **p), apply_photometric(one.contiguous(), **p), rtol=0, atol=1e-6)
    for n in range(9):
        alone = apply_photometric(images[n : n + 1], **{name: value[n : n + 1] for name, value in p.items()})
        torch.testing.assert_close(alone[0], out[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype: torch.dtype) -> None:
    images, p = torch.rand(9, 3, 12, 12).to(dtype), parameters(9)
    out = apply_photometric(images, **p)
    assert out.dtype == dtype
    assert torch.equal(out, apply_photometric(images.float(), **p).to(dtype))


def test_nan_stays_in_its_image() -> None:
    images, p = torch.rand(9, 3, 12, 12), parameters(9)
    out = apply_photometric(images, **p)
    images[4, 1, 3, 3] = float("nan")
    with_nan = apply_photometric(images, **p)
    assert with_nan[4].isnan().any()
    others = torch.arange(9) != 4
    torch.testing.assert_close(with_nan[others], out[others], rtol=0, atol=1e-6)


def test_empty_batch_and_no_gradient() -> None:
    assert apply_photometric(torch.zeros(0, 3, 12, 12), **parameters(0)).shape == (0, 3, 12, 12)
    images = torch.rand(2, 3, 12, 12, requires_grad=True)
    assert not apply_photometric(images, **parameters(2)).requires_grad


def test_compiles_without_a_break() -> None:
    images, p = torch.rand(3, 3, 12, 12), parameters(3)
    compiled = torch.compile(lambda x: apply_photometric(x, **p), fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), apply_photometric(images, **p))


IMAGES = torch.rand(2, 3, 8, 8)
NEUTRAL = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)
INFINITE = torch.tensor([[1.0, math.inf, 1.0, 0.0]] * 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: color_jitter(IMAGES.byte(), NEUTRAL), TypeError, "color_jitter: images expected a float32 or"),
        (lambda: color_jitter(IMAGES[0], NEUTRAL), ValueError, r"color_jitter: images expected \(N, C, H, W\)"),
        (lambda: color_jitter(IMAGES[:, :2], NEUTRAL), ValueError, "color_jitter: images expected 1 or 3 channels"),
        (lambda: grayscale(IMAGES[..., :0], torch.ones(2) > 0), ValueError, "grayscale: images expected H and W"),
        (lambda: color_jitter(IMAGES, NEUTRAL[:1]), ValueError, r"color_jitter: jitter expected \(2, 4\) on cpu, got"),
        (lambda: color_jitter(IMAGES, NEUTRAL.long()), TypeError, "color_jitter: jitter expected a float32 or"),
        (lambda: color_jitter(IMAGES, -NEUTRAL), ValueError, "color_jitter: jitter expected three factors"),
        (lambda: color_jitter(IMAGES, NEUTRAL + 0.6), ValueError, r"hue in \[-0.5, 0.5\], got \[1.6"),
        (lambda: color_jitter(IMAGES, NEUTRAL * math.nan), ValueError, "color_jitter: jitter expected three factors"),
        (lambda: color_jitter(IMAGES, INFINITE), ValueError, "color_jitter: jitter expected three factors"),
        (lambda: color_jitter(IMAGES, NEUTRAL, NEUTRAL), TypeError, "color_jitter: order expected an int64 or int32"),
        (lambda: color_jitter(IMAGES, NEUTRAL, NEUTRAL.int()), ValueError, r"a permutation of .*\[1, 1, 1, 0\]"),
        (lambda: grayscale(IMAGES, torch.ones(2)), TypeError, "grayscale: gray expected a bool tensor"),
        (lambda: grayscale(IMAGES, torch.ones(3) > 0), ValueError, r"grayscale: gray expected \(2,\) on cpu, got"),
        (lambda: gaussian_blur(IMAGES, torch.ones(3)), ValueError, r"gaussian_blur: sigma expected \(2,\)"),
        (lambda: gaussian_blur(IMAGES, -torch.ones(2)), ValueError, "gaussian_blur: sigma expected .* got float -1.0"),
        (lambda: gaussian_blur(IMAGES, torch.ones(2), 4), ValueError, "kernel_size expected an odd .* 1 to 15, got"),
        (lambda: gaussian_blur(IMAGES, torch.ones(2), 17), ValueError, "kernel_size expected an odd .* 1 to 15, got"),
        (lambda: gaussian_blur(IMAGES, torch.ones(2), 3.0), TypeError, "kernel_size expected an odd int or None"),
        (lambda: solarize(IMAGES, torch.ones(1)), ValueError, r"solarize: threshold expected \(2,\)"),
        (lambda: apply_photometric(IMAGES, order=NEUTRAL.int()), ValueError, "order expected None where there"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_out_that_overlaps_the_images_is_refused() -> None:
    memory = torch.rand(7, 3, 8, 8)
    with pytest.raises(ValueError, match="out expected images themselves or memory of its own"):
        apply_photometric(memory[:6], sigma=torch.ones(6), out=memory[1:])
    with pytest.raises(ValueError, match="out expected a tensor without a gradient"):
        apply_photometric(memory[:6], out=torch.zeros(6, 3, 8, 8, requires_grad=True))
    with pytest.raises(ValueError, match="out expected a place for every number"):
        apply_photometric(memory[:6], out=torch.empty(1, 3, 8, 8).expand(6, -1, -1, -1))
    expected = apply_photometric(memory[:6].clone(), sigma=torch.ones(6))
    assert torch.equal(apply_photometric(memory[:6], sigma=torch.ones(6), out=memory[:6]), expected)
