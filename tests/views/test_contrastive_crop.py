"""ContrastiveCrop is its parts, one after the other; the same views in any batch; bad input is refused by name."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastproto._random import Stream, random_bits
from fastproto.views import (
    SIMC_BOX,
    ContrastiveCrop,
    apply_photometric,
    crop_resize,
    sample_crops,
    sample_photometric,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def images_of(n: int, channels: int = 3, height: int = 40, width: int = 36) -> Tensor:
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("augment", "size", "blurs"), [("simclr", 24, False), ("simclr", 65, True), ("moco", 24, True), ("none", 24, False)]
)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_is_its_parts(augment: str, size: int, blurs: bool, views: int) -> None:
    images, ids = images_of(5), torch.tensor([9, 0, 4, 1, 77])
    boxes = torch.rand(5, 2, 2).sort(dim=1).values.flatten(1)
    jitter = (0.8, 0.8, 0.8, 0.2)
    crop = ContrastiveCrop(
        size, views=views, augment=augment, alpha=0.1, scale=(0.3, 0.9), jitter=jitter, mean=MEAN, std=STD, seed=5
    )
    key = {"views": views, "seed": 5, "epoch": 7}
    crops = sample_crops(ids, (40, 36), boxes=boxes, alpha=0.1, scale=(0.3, 0.9), **key)
    flip = random_bits(ids, Stream.FLIP, 1, **key).flatten() < 2**31
    expected = crop_resize(images, crops, size, flip=flip)
    if augment != "none":
        expected = apply_photometric(expected, **sample_photometric(ids, jitter=jitter, blur_p=blurs / 2, **key))
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    out = crop(images, ids, boxes, epoch=7)
    assert isinstance(out, tuple)
    assert len(out) == views
    for view, theirs in zip(out, expected.chunk(views), strict=True):
        assert view.shape == (5, 3, size, size)
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        torch.testing.assert_close(view, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(None, None), (MEAN, None), (None, STD)])
@pytest.mark.parametrize("augment", ["simclr", "none"])
def test_normalisation(augment: str, mean: Any, std: Any) -> None:
    images, ids = images_of(4), torch.arange(4)
    plain = torch.cat(ContrastiveCrop(20, augment=augment)(images, ids))
    assert plain.min() >= 0
    assert plain.max() <= 1
    out = torch.cat(ContrastiveCrop(20, augment=augment, mean=mean, std=std)(images, ids))
    offset, scale = torch.tensor(mean or (0.0,) * 3), torch.tensor(std or (1.0,) * 3)
    expected = (plain - offset[:, None, None]) / scale[:, None, None]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_the_same_views_in_every_batch() -> None:
    images, ids = images_of(33), torch.randperm(500)[:33]
    crop = ContrastiveCrop((20, 24), augment="moco")
    whole = crop(images, ids, SIMC_BOX, epoch=2)
    for rows in torch.arange(33).split(10):
        for view, part in zip(whole, crop(images[rows], ids[rows].int(), SIMC_BOX, epoch=2), strict=True):
            torch.testing.assert_close(part, view[rows], rtol=0, atol=1e-5)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], crop(images, ids, SIMC_BOX, epoch=3)[0])
    assert not torch.equal(whole[0], crop(images, ids, epoch=2)[0])


SIZES = [(40, 36), (7, 90), (1, 1), (64, 64), (33, 5)]


@pytest.mark.parametrize(("augment", "channels"), [("moco", 3), ("simclr", 1), ("none", 3), ("none", 4)])
def test_images_of_different_sizes_are_each_by_itself(augment: str, channels: int) -> None:
    images = [torch.randint(256, (channels, *size), dtype=torch.uint8) for size in SIZES]
    images[3] = images[3].permute(0, 2, 1)
    ids, boxes = torch.tensor([9, 0, 4, 1, 77]), torch.rand(5, 2, 2).sort(dim=1).values.flatten(1)
    crop = ContrastiveCrop((20, 24), views=3, augment=augment, seed=2)
    views = crop(images, ids, boxes, epoch=3)
    for n, image in enumerate(images):
        alone = crop(image[None], ids[n : n + 1], boxes[n : n + 1], epoch=3)
        in_a_list = crop((image,), ids[n : n + 1], boxes[n : n + 1], epoch=3)
        for view, theirs, listed in zip(views, alone, in_a_list, strict=True):
            assert torch.equal(view[n], theirs[0])
            assert torch.equal(view[n], listed[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("augment", ["moco", "none"])
def test_dtype_and_layout(augment: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images, ids = images_of(5), torch.arange(5)
    options: dict[str, Any] = {"augment": augment, "mean": MEAN, "std": STD}
    views = ContrastiveCrop(20, dtype=dtype, memory_format=memory_format, **options)(images, ids)
    for view, expected in zip(views, ContrastiveCrop(20, **options)(images, ids), strict=True):
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=memory_format)
        # Rounded once: by half a step of the dtype at most.
        rounding = {"rtol": torch.finfo(dtype).eps / 2, "atol": 1e-5}
        torch.testing.assert_close(view.double(), expected.double(), **rounding)


def test_views_are_numbered() -> None:
    images, ids = images_of(4), torch.arange(4)
    all_views = ContrastiveCrop(20, augment="moco", views=5)(images, ids, epoch=1)
    some = ContrastiveCrop(20, augment="moco", views=2, first_view=2)(images, ids, epoch=1)
    assert all(torch.equal(view, all_views[2 + v]) for v, view in enumerate(some))


def test_takes_nothing_from_the_global_generators() -> None:
    crop, images, ids = ContrastiveCrop(16), images_of(3), torch.arange(3)
    state = torch.get_rng_state()
    first = crop(images, ids)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first[0], crop(images, ids)[0])


def test_half_of_the_views_is_flipped() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(2000, 1, 32, 32)
    (out,) = ContrastiveCrop(8, augment="none", views=1)(ramp, torch.arange(2000))
    flipped = out[:, 0, 0, 0] > out[:, 0, 0, -1]
    assert float(flipped.double().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("augment", ["simclr", "moco", "none"])
def test_gray_images_any_strides_and_no_images(augment: str) -> None:
    crop = ContrastiveCrop(20, augment=augment, mean=(0.5,), std=(0.5,))
    images, ids = images_of(4, channels=1), torch.arange(4)
    out = crop(images, ids)
    assert out[1].shape == (4, 1, 20, 20)
    torch.testing.assert_close(crop(images.mT.contiguous().mT, ids)[1], out[1], rtol=0, atol=1e-6)
    assert [view.shape for view in crop(images[:0], ids[:0])] == [(0, 1, 20, 20)] * 2


@pytest.mark.parametrize(
    ("augment", "size", "otherwise"), [("simclr", 16, 0.0), ("simclr", 65, 0.5), ("moco", 16, 0.5)]
)
def test_blur_is_as_asked_or_as_the_augmentation_says(augment: str, size: int, otherwise: float) -> None:
    images, ids = images_of(8), torch.arange(8)
    views = {}
    for blur in (None, 0.0, 0.5, 1.0):
        views[blur] = torch.stack(ContrastiveCrop(size, augment=augment, blur=blur)(images, ids))
    assert torch.equal(views[None], views[otherwise])
    changed = (views[0.0] != views[0.5]).flatten(2).any(2), (views[0.0] != views[1.0]).flatten(2).any(2)
    assert 0 < changed[0].sum() < changed[1].sum() <= 16
    with pytest.raises(ValueError, match=r"ContrastiveCrop: blur expected a number in .0, 1., or one for each view"):
        ContrastiveCrop(16, blur=1.5)


@pytest.mark.parametrize("first_view", [0, 3])
def test_views_that_differ_in_blur_and_solarisation(first_view: int) -> None:
    """BYOL's two views: each is the one that a module has whose views are all like it."""
    images, ids = images_of(8), torch.arange(8)
    options: Any = {"seed": 3, "first_view": first_view, "mean": MEAN, "std": STD}
    views = ContrastiveCrop(16, blur=(1.0, 0.1), solarize=(0.0, 0.2), **options)(images, ids)
    for v, (blur, solarize) in enumerate(((1.0, 0.0), (0.1, 0.2))):
        assert torch.equal(views[v], ContrastiveCrop(16, blur=blur, solarize=solarize, **options)(images, ids)[v])
    assert not torch.equal(views[0], ContrastiveCrop(16, **options)(images, ids)[0])


def test_is_copied_and_saved() -> None:
    crop = ContrastiveCrop(16, mean=MEAN, std=STD, seed=4, dtype=torch.float16, memory_format=torch.channels_last)
    file = io.BytesIO()
    torch.save(crop, file)
    file.seek(0)
    images, ids = images_of(3), torch.arange(3)
    for other in (copy.deepcopy(crop), torch.load(file, weights_only=False)):
        for view, expected in zip(other(images, ids), crop(images, ids), strict=True):
            assert torch.equal(view, expected)
            assert view.stride() == expected.stride()


def test_compiles_without_a_break() -> None:
    crop, images, ids = ContrastiveCrop(16, augment="moco", mean=MEAN, std=STD), images_of(3), torch.arange(3)
    compiled = torch.compile(crop, fullgraph=True, backend="eager")
    for view, expected in zip(compiled(images, ids, None, 2), crop(images, ids, None, 2), strict=True):
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


IMAGES, IDS = images_of(2), torch.arange(2)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"ContrastiveCrop: images expected a uint8 tensor .*, got float32", (IMAGES / 255, IDS)),
        (ValueError, r"ContrastiveCrop: images expected \(N, C, H, W\), got uint8 \(3, 40, 36\)", (IMAGES[0], IDS)),
        (ValueError, "ContrastiveCrop: images expected 1 or 3 channels in front of H and W, got", (IMAGES[:, :2], IDS)),
        (ValueError, "ContrastiveCrop: images expected H and W of at least 1", (IMAGES[..., :0], IDS)),
        (ValueError, r"ContrastiveCrop: sample_ids expected \(2,\) on cpu, got int64 \(1,\)", (IMAGES, IDS[:1])),
        (ValueError, "ContrastiveCrop: sample_ids expected .* on cpu, got .* on meta", (IMAGES, IDS.to("meta"))),
        (TypeError, "ContrastiveCrop: sample_ids expected an int64 or int32 tensor", (IMAGES, IDS.float())),
        (ValueError, "ContrastiveCrop: mean expected 1 numbers, one per channel", (IMAGES[:, :1], IDS)),
        (ValueError, r"boxes expected \(2, 4\) on cpu", (IMAGES, IDS, torch.zeros(1, 4))),
        (ValueError, "boxes expected .* on cpu, got .* on meta", (IMAGES, IDS, torch.zeros(2, 4).to("meta"))),
        (ValueError, "boxes expected 0 <= h0 <= h1 <= 1", (IMAGES, IDS, (0.0, 0.0, 1.0, 1.1))),
        (ValueError, "epoch expected 0 to", (IMAGES, IDS, None, -1)),
        (TypeError, r"ContrastiveCrop: images expected a uint8 tensor \(N, C, H, W\) or a list", (None, IDS)),
        (ValueError, "ContrastiveCrop: images expected at least one image, got an empty list", ([], IDS[:0])),
        (TypeError, r"images\[1\] expected a uint8 tensor \(C, H, W\), got float", ([IMAGES[0], IMAGES[1] / 255], IDS)),
        (ValueError, r"images\[0\] expected \(C, H, W\), got uint8 \(1, 3, 40, 36\)", ([IMAGES[:1]] * 2, IDS)),
        (ValueError, r"images\[1\] expected \(3, H, W\) on cpu, got uint8 \(1,", ([IMAGES[0], IMAGES[0, :1]], IDS)),
        (ValueError, r"images\[1\] expected H and W of at least 1", ([IMAGES[0], IMAGES[0, :, :0]], IDS)),
        (ValueError, r"images\[1\] expected .* on cpu, got .* on meta", ([IMAGES[0], IMAGES[0].to("meta")], IDS)),
        (ValueError, "images expected 1 or 3 channels in front of H and W, got uint8", ([IMAGES[0, :2]] * 2, IDS)),
        (ValueError, r"ContrastiveCrop: sample_ids expected \(1,\) on cpu, got int64 \(2,\)", ([IMAGES[0]], IDS)),
    ],
)
def test_bad_batches(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        ContrastiveCrop(16, mean=MEAN, std=STD)(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "size expected a positive int or two, got int 0", {"size": 0}),
        (ValueError, "size expected a positive int or two", {"size": (16, -1)}),
        (ValueError, "size expected a positive int or two, got float 16.0", {"size": 16.0}),
        (ValueError, "size expected a positive int or two, got NoneType None", {"size": None}),
        (TypeError, "mean expected one number per channel or None, got float 0.5", {"mean": 0.5}),
        (TypeError, "std expected one number per channel or None, got str 'abc'", {"std": "abc"}),
        (ValueError, "mean expected finite numbers", {"mean": (0.5, float("nan"), 0.5)}),
        (TypeError, "jitter expected four strengths, got tuple", {"jitter": ("a",) * 4}),
        (ValueError, "size expected a positive int or two", {"size": (16, 16, 16)}),
        (ValueError, "augment expected one of simclr, moco, none, got byol", {"augment": "byol"}),
        (ValueError, "augment expected another than none with blur or solarize", {"augment": "none", "blur": 0.5}),
        (ValueError, "augment expected another than none with", {"augment": "none", "solarize": (0.0, 0.2)}),
        (ValueError, "size expected a positive int or two, got bool True", {"size": True}),
        (TypeError, "mean expected one number per channel or None, got tuple", {"mean": (True,) * 3}),
        (TypeError, "scale expected a pair of numbers, got tuple", {"scale": (True, True)}),
        (TypeError, "blur expected a number in .0, 1., or one for each view, got tuple", {"blur": (True, False)}),
        (ValueError, "alpha expected a positive finite number, got int 0", {"alpha": 0}),
        (ValueError, "scale expected", {"scale": (0.0, 1.0)}),
        (ValueError, "ratio expected", {"ratio": (2.0, 1.0)}),
        (ValueError, "views expected 1 to 4096", {"views": 0}),
        (TypeError, "seed expected an int", {"seed": 0.5}),
        (TypeError, "seed expected an int, got bool True", {"seed": True}),
        (ValueError, "jitter expected four strengths", {"jitter": (0.4, 0.4)}),
        (TypeError, "jitter expected four strengths, got float 0.4", {"jitter": 0.4}),
        (TypeError, "blur expected a number in .0, 1., or one for each view, got str 'x'", {"blur": "x"}),
        (ValueError, "blur expected a number in .0, 1., or one for each view, got tuple", {"blur": (0.1, 2.0)}),
        (ValueError, "blur expected a number in .0, 1., or one for each view, got float32", {"blur": torch.ones(3)}),
        (ValueError, "blur expected a number in .0, 1., or one for each view, got float nan", {"blur": float("nan")}),
        (ValueError, "solarize expected a number in .0, 1., or one for each view, got tuple", {"solarize": (0.1,) * 3}),
        (ValueError, "augment expected one of simclr, moco, none, got <U4 array", {"augment": np.array(["moco"] * 2)}),
        (ValueError, "dtype expected a floating point dtype, got ", {"dtype": np.ones(2)}),
        (ValueError, "memory_format expected torch.contiguous_format or", {"memory_format": np.ones(2)}),
        (ValueError, "alpha expected a positive finite number, got int 1000", {"alpha": 10**400}),
        (TypeError, "alpha expected a number, got bool True", {"alpha": True}),
        (TypeError, "views expected an int, got bool True", {"views": True}),
        (ValueError, "mean expected one number per channel or None, got tuple .1000", {"mean": (10**400,)}),
        (ValueError, "scale expected a pair of numbers, got tuple .1000", {"scale": (10**400,) * 2}),
        (ValueError, "size expected sides below 2147483648, got int 2147483648", {"size": 2**31}),
        (ValueError, "std expected positive finite numbers", {"std": (0.0, 1.0, 1.0)}),
        (ValueError, "mean expected one number per channel", {"mean": ()}),
        (TypeError, "first_view expected an int, got float 0.5", {"first_view": 0.5}),
        (ValueError, "first_view expected 0 to 4094, 4096 less views, got int 4095", {"first_view": 4095}),
        (ValueError, "first_view expected 0 to 4094", {"first_view": -1}),
        (ValueError, "dtype expected a floating point dtype, got torch.uint8", {"dtype": torch.uint8}),
        (
            ValueError,
            "memory_format expected torch.contiguous_format or torch.channels_last, got torch.preserve_format",
            {"memory_format": torch.preserve_format},
        ),
    ],
)
def test_bad_options(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match="^ContrastiveCrop: " + message):
        ContrastiveCrop(**{"size": 16, **options})


def test_numbers_may_come_in_an_array() -> None:
    options: dict[str, Any] = {"scale": (0.25, 0.5), "ratio": (0.5, 2.0), "jitter": (0.5, 0.25, 0.5, 0.125)}
    expected = ContrastiveCrop(16, **options)(IMAGES, IDS)
    for kind in (torch.tensor, np.array, list):
        crop = ContrastiveCrop(16, **{name: kind(numbers) for name, numbers in options.items()})
        assert all(torch.equal(*pair) for pair in zip(crop(IMAGES, IDS), expected, strict=True))


def test_options_are_shown() -> None:
    text = repr(ContrastiveCrop((16, 20), alpha=0.1, augment="moco", mean=MEAN, seed=5))
    for part in ("(16, 20), scale=(0.2, 1.0), ", "alpha=0.1, ", "augment='moco', ", "blur=(0.5, 0.5), ", "seed=5, "):
        assert part in text


def test_import_is_light() -> None:
    """Neither torchvision nor PIL nor Triton comes with the views."""
    heavy = "[name for name in ('torchvision', 'PIL', 'triton') if name in sys.modules]"
    program = f"import sys, torch; before = {heavy}; import fastproto.views; assert {heavy} == before, {heavy}"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["moco", "none"])
def test_cuda_gives_the_same_views(augment: str) -> None:
    images, ids = images_of(33), torch.arange(33)
    crop = ContrastiveCrop(24, augment=augment, mean=MEAN, std=STD)
    for cpu, cuda in zip(crop(images, ids), crop(images.cuda(), ids.cuda()), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=0.02)
    sizes = [image[:, : 20 + n] for n, image in enumerate(images[:20])]
    for cpu, cuda in zip(crop(sizes, ids[:20]), crop([x.cuda() for x in sizes], ids[:20].cuda()), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match=r"sample_ids expected .* on cuda:0, got .* on cpu"):
        crop(images.cuda(), ids)


def test_one_compilation_serves_all_epochs_and_sizes() -> None:
    views, counter = ContrastiveCrop(8), CompileCounter()
    compiled = torch.compile(views, backend=counter, fullgraph=True)
    for epoch in range(12):
        images = torch.zeros(2, 3, 20 + epoch, 16, dtype=torch.uint8)
        compiled(images, torch.arange(2), None, epoch)
    assert counter.frame_count <= 2
    torch.compile(views, dynamic=True, backend="eager")(images, torch.arange(2))


@pytest.mark.parametrize("options", [{"augment": "none"}, {"augment": "simclr"}, {"blur": (1.0, 0.1)}])
def test_exports_for_any_batch(options: dict[str, Any]) -> None:
    crop = ContrastiveCrop(16, **options)
    images, ids, batch = images_of(8), torch.arange(8), torch.export.Dim("N", min=2, max=64)
    exported = torch.export.export(crop, (images, ids), dynamic_shapes={"images": {0: batch}, "sample_ids": {0: batch}})
    for n in (3, 8):
        for view, expected in zip(exported.module()(images[:n], ids[:n]), crop(images[:n], ids[:n]), strict=True):
            torch.testing.assert_close(view, expected)
