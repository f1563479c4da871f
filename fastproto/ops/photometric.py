"""photometric: colour jitter, grayscale, blur and solarisation with one set of parameters per image.

See fastproto/reference/photometric.py for the formulas. Compiled for the CPU (C++) and the GPU (CUDA); the reference
takes float64, and on a GPU images that are too large for the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproto import _native
from fastproto._check import FLOATS, INTEGERS, INTS, expect, expect_tensor, expect_type, reads_data
from fastproto.ops._dispatch import DTYPE_CODES, Op
from fastproto.ops.crop_resize import expect_writable, normalisation
from fastproto.reference import photometric as reference

# Half of the 48 KiB in which a block of the CUDA kernel keeps weights and a row while it blurs; pixels that it counts.
MAX_CUDA_BLUR_WIDTH = 6144
MAX_CUDA_PIXELS = 2**31 - 1


def _cpp(images: Tensor, *rest: Any) -> None:
    out = rest[-1]
    if torch.float64 in (images.dtype, out.dtype):
        reference.photometric(images, *rest)
    else:
        _launch(_native.cpp, torch.get_num_threads(), None, images, *rest)


def _cuda(images: Tensor, *rest: Any) -> None:
    sigma, out = rest[3], rest[-1]
    height, width = images.shape[2:]
    too_large = height * width > MAX_CUDA_PIXELS or (sigma is not None and width > MAX_CUDA_BLUR_WIDTH)
    if too_large or torch.float64 in (images.dtype, out.dtype):
        reference.photometric(images, *rest)
        return
    with torch.cuda.device(images.device):
        work = None if sigma is None else torch.empty(images.shape, dtype=torch.float32, device=images.device)
        _launch(_native.cuda, torch.cuda.current_stream().cuda_stream, work, images, *rest)


def _launch(
    module: Any,
    threads_or_stream: int,
    work: Tensor | None,
    images: Tensor,
    jitter: Tensor | None,
    order: Tensor | None,
    gray: Tensor | None,
    sigma: Tensor | None,
    kernel_size: int,
    threshold: Tensor | None,
    scale: list[float],
    offset: list[float],
    out: Tensor,
) -> None:
    """Calls a compiled kernel with the op's arguments as csrc/photometric/bind.h takes them."""
    floats = [None if value is None else value.float().contiguous() for value in (jitter, sigma, threshold)]
    order, gray = (None if value is None else value.contiguous() for value in (order, gray))
    tensors = (images, floats[0], order, gray, floats[1], floats[2], out, work)
    module.photometric(
        (*images.shape, kernel_size // 2, DTYPE_CODES[images.dtype], DTYPE_CODES[out.dtype]),
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        images.stride(),
        out.stride(),
        scale,
        offset,
        threads_or_stream,
    )


_op = Op(
    "photometric",
    "(Tensor images, Tensor? jitter, Tensor? order, Tensor? gray, Tensor? sigma, int kernel_size, Tensor? threshold, "
    "float[] scale, float[] offset, Tensor(a!) out) -> ()",
    reference=reference.photometric,
    cpp=_cpp,
    cuda=_cuda,
)


@_op.fake
def _fake(*args: Any) -> None:
    """Writes to out, returns nothing."""


def color_jitter(
    images: Tensor,  # (N, C, H, W) float
    jitter: Tensor,  # (N, 4) float
    order: Tensor | None = None,  # (N, 4) integer
) -> Tensor:  # (N, C, H, W)
    """Changes brightness, contrast, saturation and hue, each image by its own factors and in its own order.

    Equals torchvision's ``adjust_brightness``, ``adjust_contrast``, ``adjust_saturation`` and ``adjust_hue`` on every
    image to within 1/255. Brightness 1, contrast 1, saturation 1 and hue 0 leave an image as it is. An image of one
    channel has neither saturation nor hue, and keeps them.

    Args:
        images: (N, C, H, W) with C 1 or 3, values in [0, 1]; float32, float64, float16 or bfloat16.
        jitter: (N, 4) finite factors of brightness, contrast and saturation, at least 0, and the turn of the hue, a
            part of the circle in [-1/2, 1/2].
        order: (N, 4) the numbers 0 (brightness), 1 (contrast), 2 (saturation), 3 (hue) in the order in which an image
            gets them. None: as they are numbered.

    Returns:
        (N, C, H, W) in the dtype of ``images``; no gradient flows.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device; a factor is out of range; an order is no permutation.

    Source:
        torchvision.transforms.v2.ColorJitter; the strengths and the order in SimCLR, arXiv 2002.05709, appendix A.

    Example:
        >>> import torch
        >>> from fastproto.views import color_jitter
        >>> images = torch.full((2, 3, 4, 4), 0.25)
        >>> jitter = torch.tensor([[1.0, 1.0, 1.0, 0.0], [2.0, 1.0, 1.0, 0.0]])
        >>> color_jitter(images, jitter)[:, 0, 0, 0]
        tensor([0.2500, 0.5000])
    """
    return _photometric("color_jitter", images, jitter=jitter, order=order)


def grayscale(
    images: Tensor,  # (N, C, H, W) float
    gray: Tensor,  # (N,) bool
) -> Tensor:  # (N, C, H, W)
    """Makes the chosen images gray: 0.2989 r + 0.587 g + 0.114 b in all three channels.

    Args:
        images: (N, C, H, W) with C 1 or 3; float32, float64, float16 or bfloat16. One channel is gray already.
        gray: (N,) bool, which images.

    Returns:
        (N, C, H, W) in the dtype of ``images``; no gradient flows.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device.

    Source:
        torchvision.transforms.v2.functional.rgb_to_grayscale.

    Example:
        >>> import torch
        >>> from fastproto.views import grayscale
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> grayscale(red, torch.tensor([True])).flatten()
        tensor([0.2989, 0.2989, 0.2989])
    """
    return _photometric("grayscale", images, gray=gray)


def gaussian_blur(
    images: Tensor,  # (N, C, H, W) float
    sigma: Tensor,  # (N,) float
    kernel_size: int | None = None,
) -> Tensor:  # (N, C, H, W)
    """Blurs each image by a Gaussian of its own width, mirrored at the edges.

    Args:
        images: (N, C, H, W) with C 1 or 3; float32, float64, float16 or bfloat16.
        sigma: (N,) standard deviations in pixels; 0 leaves an image as it is.
        kernel_size: odd number of pixels the Gaussian is cut to, at most ``2 min(H, W) - 1``. None: SimCLR's tenth of
            the shorter side, made odd.

    Returns:
        (N, C, H, W) in the dtype of ``images``; no gradient flows.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: an argument has another shape or device; a sigma is negative; kernel_size is even or too large.

    Source:
        torchvision.transforms.v2.functional.gaussian_blur; the size in SimCLR, arXiv 2002.05709, appendix A.

    Example:
        >>> import torch
        >>> from fastproto.views import gaussian_blur
        >>> dot = torch.zeros(1, 1, 3, 3)
        >>> dot[..., 1, 1] = 1.0
        >>> gaussian_blur(dot, torch.tensor([0.5]), kernel_size=3)[0, 0, 1]
        tensor([0.1676, 0.6193, 0.1676])
    """
    return _photometric("gaussian_blur", images, sigma=sigma, kernel_size=kernel_size)


def solarize(
    images: Tensor,  # (N, C, H, W) float
    threshold: Tensor,  # (N,) float
) -> Tensor:  # (N, C, H, W)
    """Inverts the pixels of each image that reach its threshold: 1 - x where x >= t.

    Args:
        images: (N, C, H, W) with C 1 or 3, values in [0, 1]; float32, float64, float16 or bfloat16.
        threshold: (N,); infinity leaves an image as it is.

    Returns:
        (N, C, H, W) in the dtype of ``images``; no gradient flows.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device.

    Source:
        torchvision.transforms.v2.functional.solarize; in self-supervision BYOL, arXiv 2006.07733, appendix B.

    Example:
        >>> import torch
        >>> from fastproto.views import solarize
        >>> images = torch.tensor([0.25, 0.75]).view(1, 1, 1, 2)
        >>> solarize(images, torch.tensor([0.5])).flatten()
        tensor([0.2500, 0.2500])
    """
    return _photometric("solarize", images, threshold=threshold)


def apply_photometric(
    images: Tensor,  # (N, C, H, W) float
    *,
    jitter: Tensor | None = None,  # (N, 4) float
    order: Tensor | None = None,  # (N, 4) integer
    gray: Tensor | None = None,  # (N,) bool
    sigma: Tensor | None = None,  # (N,) float
    kernel_size: int | None = None,
    threshold: Tensor | None = None,  # (N,) float
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: Tensor | None = None,  # (N, C, H, W) float
) -> Tensor:  # (N, C, H, W)
    """``color_jitter``, ``grayscale``, ``gaussian_blur`` and ``solarize`` in this order, each where it has parameters.

    Then ``(x - mean) / std``. All of it is one op, which in C++ (CPU) and CUDA holds one image at a time close to the
    processor: nothing between ``images`` and ``out`` is written to memory but, on a GPU, what is to be blurred.

    Args:
        images, jitter, order, gray, sigma, kernel_size, threshold: those of the four functions, each of which is this
            one with its own parameters.
        mean, std: C numbers each. None: nothing is subtracted, nothing divided.
        out: (N, C, H, W) to write into, of any of the dtypes and any strides; may be ``images`` itself. None: a new
            tensor of the dtype and layout of ``images``.

    Returns:
        ``out``; no gradient flows.

    Raises:
        TypeError, ValueError: as the four functions; mean or std that are not C numbers, a std that is not positive.

    Example:
        >>> import torch
        >>> from fastproto.views import apply_photometric, sample_photometric
        >>> images = torch.rand(8, 3, 32, 32)
        >>> parameters = sample_photometric(torch.arange(8), views=1, blur_p=0.5)
        >>> apply_photometric(images, **parameters).shape
        torch.Size([8, 3, 32, 32])
    """
    return _photometric("apply_photometric", images, jitter, order, gray, sigma, kernel_size, threshold, mean, std, out)


def _photometric(
    op: str,
    images: Tensor,
    jitter: Tensor | None = None,
    order: Tensor | None = None,
    gray: Tensor | None = None,
    sigma: Tensor | None = None,
    kernel_size: int | None = None,
    threshold: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Checks in the name of the function that was called."""
    expect_tensor(images, op, "images", ("N", "C", "H", "W"))
    rows, channels, height, width = images.shape
    expect(channels in (1, 3), op, "images", "1 or 3 channels", images)
    expect(height > 0 and width > 0, op, "images", "H and W of at least 1", images)
    for argument, value, shape, dtypes in (
        ("jitter", jitter, (rows, 4), FLOATS),
        ("order", order, (rows, 4), INTEGERS),
        ("gray", gray, (rows,), (torch.bool,)),
        ("sigma", sigma, (rows,), FLOATS),
        ("threshold", threshold, (rows,), FLOATS),
    ):
        if value is not None:
            expect_tensor(value, op, argument, shape, dtypes, images.device)
    if jitter is None:
        expect(order is None, op, "order", "None where there is no jitter", order)
    elif order is None:
        order = torch.arange(4, device=images.device).expand(rows, 4)
    kernel_size = _kernel_size(op, kernel_size, min(height, width))
    scale, offset = normalisation(op, mean, std, channels, white=1.0)
    # A tensor that wants a gradient would make the compiler look for one.
    images = images.detach()
    if out is None:
        out = torch.empty_like(images)
    else:
        expect_tensor(out, op, "out", tuple(images.shape), device=images.device)
        expect_writable(op, out)
        expect(not _overlap(images, out), op, "out", "images themselves or memory of its own", "part of their memory")
    if rows and reads_data(images):
        _expect_ranges(op, jitter, order, sigma)
    if rows:
        order = None if order is None else order.long()
        _op(images, jitter, order, gray, sigma, kernel_size, threshold, scale, offset, out)
    return out


def _kernel_size(op: str, kernel_size: int | None, side: int) -> int:
    if kernel_size is None:
        return min(max(side // 10, 2) // 2 * 2 + 1, 2 * side - 1)
    expect_type(kernel_size, INTS, op, "kernel_size", "an odd int or None")
    good = kernel_size % 2 == 1 and 0 < kernel_size < 2 * side
    expect(good, op, "kernel_size", f"an odd number from 1 to {2 * side - 1}", kernel_size)
    return kernel_size


def _overlap(images: Tensor, out: Tensor) -> bool:
    """Whether the two share memory and are not the same view of it."""
    if not images.numel() or not reads_data(images):
        return False
    (low, high), (first, last) = (_range_in_memory(x) for x in (images, out))
    same = low == first and images.stride() == out.stride() and images.dtype == out.dtype
    return not same and low < last and first < high


def _range_in_memory(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _expect_ranges(op: str, jitter: Tensor | None, order: Tensor | None, sigma: Tensor | None) -> None:
    if jitter is not None and order is not None:
        factors = jitter[:, :3]
        good = ((factors >= 0) & (factors < math.inf)).all(dim=1) & (jitter[:, 3].abs() <= 0.5)
        first_bad = jitter[good.int().argmin()].tolist()
        wanted = "three factors of at least 0, finite, and a hue in [-0.5, 0.5]"
        expect(bool(good.all()), op, "jitter", wanted, f"{first_bad}")
        good = (order.sort(dim=1).values == torch.arange(4, device=order.device)).all(dim=1)
        first_bad = order[good.int().argmin()].tolist()
        expect(bool(good.all()), op, "order", "a permutation of 0, 1, 2, 3 in every row", f"{first_bad}")
    if sigma is not None:
        least = float(sigma.min())
        expect(least >= 0, op, "sigma", "numbers of at least 0", least)
