"""crop_resize against a float64 oracle in plain loops, against torchvision, and backend against backend."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from cuda_backend import CUDA
from torchvision.transforms.v2 import functional as tv

import fastproto
from fastproto import _native
from fastproto.ops.crop_resize import crop_resize

needs_cpp = pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
BACKENDS = [("reference", "cpu"), pytest.param("cpp", "cpu", marks=needs_cpp), CUDA]


def images_and_crops(n=5, c=3, height=37, width=29, views=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, c, height, width), dtype=torch.uint8, generator=generator)
    rows = []
    for _ in range(n * views):
        h = int(torch.randint(1, height + 1, (), generator=generator))
        w = int(torch.randint(1, width + 1, (), generator=generator))
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        rows.append([top, left, h, w])
    return images, torch.tensor(rows, dtype=torch.int32)


def run(backend, device, images, crops, size, **options):
    """The crops as a backend makes them of tensors on a device, brought back."""
    moved = [image.to(device) for image in images] if isinstance(images, list) else images.to(device)
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    with fastproto.backend(backend):
        return crop_resize(moved, crops.to(device), size, **options).cpu()


def oracle(image, crop, size, flip=False, antialias=True):
    """One crop by the definition of the triangle filter, in Python floats."""
    top, left, height, width = crop

    def weights(side, out_side):
        ratio = side / out_side
        support = max(ratio, 1.0) if antialias else 1.0
        table = []
        for i in range(out_side):
            row = [max(0.0, 1 - abs(p + 0.5 - (i + 0.5) * ratio) / support) for p in range(side)]
            table.append([value / math.fsum(row) for value in row])
        return torch.tensor(table, dtype=torch.float64)

    pixels = image[:, top : top + height, left : left + width].double()
    out = torch.einsum("hy,cyx,wx->chw", weights(height, size[0]), pixels, weights(width, size[1])) / 255
    return out.flip(2) if flip else out


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(
    ("size", "antialias"),
    [((24, 24), True), ((50, 7), True), ((1, 1), True), ((13, 40), False), ((40, 75), True), ((17, 5), False)],
)
@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_equals_the_formula(backend, device, size, antialias, c):
    images, crops = images_and_crops(c=c)
    flip = torch.arange(len(crops)) % 3 == 0
    out = run(backend, device, images, crops, size, flip=flip, antialias=antialias)
    for r, crop in enumerate(crops.tolist()):
        expected = oracle(images[r % len(images)], crop, size, bool(flip[r]), antialias)
        torch.testing.assert_close(out[r].double(), expected, atol=3e-6, rtol=0)


def test_float64_reference_is_exact():
    images, crops = images_and_crops(n=2)
    with fastproto.backend("reference"):
        out = crop_resize(images, crops, (9, 11), dtype=torch.float64)
    expected = torch.stack([oracle(images[r % 2], crop, (9, 11)) for r, crop in enumerate(crops.tolist())])
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("size", [(32, 32), (20, 61)])
def test_within_one_level_of_torchvision(backend, device, size):
    images, crops = images_and_crops(height=64, width=48)
    out = run(backend, device, images, crops, size)
    for r, (top, left, height, width) in enumerate(crops.tolist()):
        expected = tv.resized_crop(images[r % len(images)], top, left, height, width, list(size), antialias=True)
        assert (out[r] * 255 - expected).abs().max() <= 1.0


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [16, (9, 32), (3, 80), (5, 33)])
def test_normalises_and_casts(backend, device, dtype, memory_format, size):
    images, crops = images_and_crops()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    out = run(backend, device, images, crops, size, mean=mean, std=std, dtype=dtype, memory_format=memory_format)
    plain = run("reference", "cpu", images, crops, size, dtype=torch.float64)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    expected = tv.normalize(plain, list(mean), list(std))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_layouts_lists_index_and_out_agree(backend, device):
    images, crops, index = *images_and_crops(), torch.tensor([4, 4, 0, 1, 2, 3, 3, 0, 0, 1])
    make = functools.partial(run, backend, device, index=index)
    expected = make(images, crops, 16)
    channels_last = make(images.permute(0, 2, 3, 1).contiguous(), crops, 16)
    listed = make(list(images), crops, 16)
    wide = images.to(device).repeat(1, 1, 2, 2)[:, :, :37, :29]  # a copy to a device would be dense
    strided = make(wide, crops, 16)
    out = torch.full((10, 3, 16, 32), float("nan"), device=device)
    with fastproto.backend(backend):
        returned = crop_resize(images.to(device), crops.to(device), 16, index=index.to(device), out=out[..., ::2])
    for other in (channels_last, listed, strided, out[..., ::2].cpu()):
        torch.testing.assert_close(other, expected, atol=0, rtol=0)
    assert returned.data_ptr() == out.data_ptr()
    assert out[..., 1::2].isnan().all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_images_of_different_sizes(backend, device):
    sizes = [(1, 1), (1, 40), (33, 5), (64, 64)]
    images = [torch.randint(256, (1, *size), dtype=torch.uint8) for size in sizes]
    crops = torch.tensor([[0, 0, h, w] for h, w in sizes], dtype=torch.int32)
    out = run(backend, device, images, crops, (8, 6))
    for r, image in enumerate(images):
        expected = oracle(image, crops[r].tolist(), (8, 6))
        torch.testing.assert_close(out[r].double(), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_no_crops_gives_an_empty_batch(backend, device):
    images, crops = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.int32)
    assert run(backend, device, images, crops, 8).shape == (0, 3, 8, 8)


@needs_cpp
def test_every_instruction_set_and_thread_count_agrees():
    images, crops = images_and_crops(n=16)
    before_isa, before_threads = _native.cpp.isa(), torch.get_num_threads()
    with fastproto.backend("reference"):
        expected = crop_resize(images, crops, 24)
    try:
        for isa, threads in itertools.product(_native.cpp.supported_isas(), (1, 2, 5)):
            _native.cpp.set_isa(isa)
            torch.set_num_threads(threads)
            with fastproto.backend("cpp"):
                out = crop_resize(images, crops, 24)
                assert torch.equal(out, crop_resize(images, crops, 24))
            torch.testing.assert_close(out, expected, atol=3e-6, rtol=0)
    finally:
        _native.cpp.set_isa(before_isa)
        torch.set_num_threads(before_threads)
    with pytest.raises(ValueError, match="isa: name expected an instruction set of this CPU, got 'mmx'"):
        _native.cpp.set_isa("mmx")


@needs_cpp
def test_half_precision_rounds_as_torch_does():
    """Every pixel value through scales that reach subnormals and infinity."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    crops = torch.tensor([[0, 0, 16, 16]], dtype=torch.int32)
    for dtype, std in itertools.product((torch.float16, torch.bfloat16), (1.0, 1e-5, 3e5, 7e6)):
        with fastproto.backend("cpp"):
            single = crop_resize(images, crops, 16, mean=[0.3], std=[std])
            half = crop_resize(images, crops, 16, mean=[0.3], std=[std], dtype=dtype)
        assert torch.equal(half, single.to(dtype))


def test_op_is_sound_and_compiles():
    images, crops = images_and_crops()
    args = ([images], crops, None, None, [1.0] * 3, [0.0] * 3, True, torch.zeros(len(crops), 3, 8, 8))
    torch.library.opcheck(torch.ops.fastproto.crop_resize.default, args)
    compiled = torch.compile(lambda x: crop_resize(x, crops, 8) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), crop_resize(images, crops, 8) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_cuda_equals_the_cpu_reference(backend, dtype):
    images, crops = images_and_crops(n=33, height=65, width=47)
    flip = torch.arange(len(crops)) % 2 == 0
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = crop_resize(images, crops, (31, 20), flip=flip, mean=mean, std=std, dtype=torch.float64)
    with fastproto.backend(backend):
        out = crop_resize(
            images.cuda(), crops.cuda(), (31, 20), flip=flip.cuda(), mean=mean, std=std, dtype=dtype,
            memory_format=torch.channels_last,
        )  # fmt: skip
        listed = crop_resize([image.cuda() for image in images], crops.cuda(), (31, 20))
    torch.testing.assert_close(out.cpu().double(), expected, atol=4e-5, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(listed.cpu(), crop_resize(images, crops, (31, 20)), atol=4e-6, rtol=0)


U8 = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
CROPS = torch.tensor([[0, 0, 8, 8]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("images", "crops", "size", "options", "error", "message"),
    [
        (U8.float(), CROPS, 8, {}, TypeError, r"images expected a uint8 tensor \(N, C, H, W\), got float32"),
        (U8[0], CROPS, 8, {}, ValueError, r"images expected \(N, C, H, W\), got uint8 \(3, 8, 8\)"),
        (U8.repeat(1, 2, 1, 1), CROPS, 8, {}, ValueError, "images expected 1 to 4 channels"),
        ([U8[0].permute(1, 2, 0)], CROPS, 8, {}, ValueError, r"images .* in front of H and W, got uint8 \(8, 8, 3\)"),
        ("cat.jpg", CROPS, 8, {}, TypeError, "images expected a uint8 tensor or a list of them, got str"),
        ([], CROPS, 8, {}, ValueError, "images expected at least one image, got an empty list"),
        ([3, U8[0]], CROPS, 8, {}, TypeError, r"images\[0\] expected a uint8 tensor \(C, H, W\), got int 3"),
        ([U8[0], U8[0, :1]], CROPS, 8, {}, ValueError, r"images\[1\] expected \(3, H, W\) on cpu"),
        (U8, CROPS.long(), 8, {}, TypeError, "crops expected an int32 tensor"),
        (U8, CROPS[:, :3], 8, {}, ValueError, r"crops expected \(R, 4\)"),
        (U8, CROPS, 0, {}, ValueError, "size expected a positive int or two, got int 0"),
        (U8, CROPS, "8", {}, ValueError, "size expected a positive int or two, got str '8'"),
        (U8, CROPS, 8.0, {}, ValueError, "size expected a positive int or two, got float 8.0"),
        (U8, CROPS, (8, 8, 3), {}, ValueError, "size expected a positive int or two, got tuple"),
        (U8, CROPS, (8.0, 8), {}, ValueError, "size expected a positive int or two, got tuple"),
        (U8, CROPS, 8, {"memory_format": torch.preserve_format}, ValueError, "memory_format expected torch.contig"),
        (U8, CROPS, 8, {"antialias": "no"}, TypeError, "antialias expected a bool, got str 'no'"),
        (U8, CROPS, 8, {"mean": 0.5}, TypeError, "mean expected 3 numbers, one per channel, got float 0.5"),
        (U8, CROPS, 8, {"mean": "123"}, TypeError, "mean expected 3 numbers, one per channel, got str '123'"),
        (U8, CROPS, 8, {"mean": [0.5, math.nan, 0.5]}, ValueError, "mean expected finite numbers"),
        (U8, CROPS, 8, {"std": [1.0, math.inf, 1.0]}, ValueError, "std expected positive finite numbers"),
        (U8, CROPS, 8, {"std": [1.0, None, 1.0]}, TypeError, "std expected 3 numbers"),
        (U8, CROPS, 8, {"dtype": torch.int32}, ValueError, "dtype expected a floating point dtype, got torch.int32"),
        (U8, CROPS, 8, {"mean": [0.5]}, ValueError, "mean expected 3 numbers, one per channel"),
        (U8, CROPS, 8, {"std": [1.0, 1e-41, 1.0]}, ValueError, "std expected numbers of at least 1e-36"),
        (U8, CROPS, 8, {"std": [1.0, 0.0, 1.0]}, ValueError, "std expected positive finite numbers"),
        (U8, CROPS, 8, {"index": torch.tensor([2])}, ValueError, r"index expected numbers in \[0, 2\), got 2 … 2"),
        (U8, CROPS, 8, {"index": torch.tensor([1, 1])}, ValueError, r"index expected \(1,\) on cpu"),
        (U8, CROPS, 8, {"flip": torch.tensor([1])}, TypeError, "flip expected a bool tensor"),
        (U8, CROPS, 8, {"out": torch.zeros(1, 3, 8, 9)}, ValueError, r"out expected \(1, 3, 8, 8\) on cpu"),
        (U8, CROPS + 1, 8, {}, ValueError, r"crops\[0\] expected .* inside its image of \(8, 8\), got \(1, 1, 9, 9\)"),
        (U8, CROPS * 0, 8, {}, ValueError, r"crops\[0\] expected not empty"),
        (U8, CROPS - 1, 8, {}, ValueError, r"crops\[0\] expected not empty and inside"),
        (U8[:0], CROPS, 8, {}, ValueError, "images expected at least one where there are crops"),
    ],
)  # fmt: skip
def test_refuses(images, crops, size, options, error, message):
    with pytest.raises(error, match=f"crop_resize: {message}"):
        crop_resize(images, crops, size, **options)


def test_out_with_a_gradient_is_refused() -> None:
    out = torch.zeros(1, 3, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="crop_resize: out expected a tensor without a gradient"):
        crop_resize(U8, CROPS, 8, out=out)


def test_out_of_shared_places_is_refused() -> None:
    images, crops = torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.tensor([[0, 0, 9, 9]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="crop_resize: out expected a place for every number, got strides"):
        crop_resize(images, crops, 8, out=torch.empty(1, 3, 8, 8).expand(2, -1, -1, -1))
