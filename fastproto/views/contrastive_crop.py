"""ContrastiveCrop for batches on any device: crop, flip, change the colours, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproto._check import FLOATS, INTEGERS, INTS, expect, expect_size, expect_tensor, expect_type
from fastproto._random import MAX_VIEWS, expect_key
from fastproto.ops._dispatch import integers
from fastproto.ops.crop_resize import crop_resize, expect_layout, expect_mean, expect_std
from fastproto.ops.photometric import apply_photometric
from fastproto.ops.sample_crops import expect_crop_options, sample_crops_and_flips
from fastproto.ops.sample_photometric import expect_jitter, expect_probabilities, sample_photometric

AUGMENTS = ("simclr", "moco", "none")

# Below, a blur of up to 2 pixels would leave little of the image: SimCLR blurs ImageNet, not CIFAR.
BLUR_ABOVE = 64


class ContrastiveCrop(nn.Module):
    """Turns a batch of images into several augmented views of each, keyed by sample, so that every run repeats them.

    Each view is cropped by ``sample_crops``, resized by ``crop_resize``, flipped with probability 1/2, changed in
    colour and normalised. The same (seed, epoch, sample id) gives the same draws in any batch, worker and rank. The
    module holds no weights and takes nothing from torch's random generators.

    Args:
        size: height and width of the views, or one number for both.
        scale: least and greatest share of the image's area that a crop takes.
        ratio: least and greatest width / height of a crop.
        alpha: of the Beta distribution of a crop's place in the box: 1 uniform, below it avoids the middle. 0.6 in the
            paper, 0.1 in the released settings for small images; 1 there until there are boxes. It may be set anew
            between epochs.
        views: views of each image.
        augment: "simclr": colour jitter with probability 0.8, gray 0.2, and at sizes above 64 blur of sigma 0.1 to 2
            with probability 0.5; "moco": MoCo v2's, the same with the blur at every size; "none": crop and flip alone.
        jitter: strengths of brightness, contrast, saturation and hue.
        blur: probability of the blur, one number or one for each view; None: as ``augment`` says. BYOL's views have
            blur (1.0, 0.1) and solarize (0.0, 0.2).
        solarize: probability that pixels from 1/2 on are inverted, one number or one for each view.
        mean: one number per channel that is subtracted from the values in [0, 1] at the end; None: none is.
        std: one number per channel to divide by after that; None: nothing is divided.
        seed: key of the whole run.
        first_view: number of the first view, which keys its draws too: modules of one seed whose views have other
            numbers draw independently. Views are drawn from number 0 on, and those before the first let go.
        dtype: of the views: float32, float16, bfloat16 or float64, which the last step writes.
        memory_format: of the views: ``torch.contiguous_format`` or ``torch.channels_last``.

    Shape:
        images: (N, C, H, W) uint8, or a list of N (C, H, W) of any sizes; C 1 or 3, with ``augment="none"`` up to 4
        sample_ids: (N,) int64 or int32, the samples' places in the data set
        boxes: (N, 4) fractions (h0, w0, h1, w1), e.g. of a ``BoxBank``; one such tuple for all, e.g. ``SIMC_BOX``; None
        epoch: int, the key of the epoch; another one gives other views
        output: ``views`` tensors (N, C, h, w), of one memory: clone a view that is to outlive the others

    Raises:
        TypeError, ValueError: from the constructor for options out of range; from ``forward`` for images that are not
            uint8 (N, C, H, W) or a list of (C, H, W), ids or boxes that do not fit them or lie on another device, boxes
            outside [0, 1] or inverted.

    Source:
        Peng et al., Crafting Better Contrastive Views for Siamese Representation Learning, arXiv 2202.03278, section 3;
        colours: SimCLR, arXiv 2002.05709, appendix A; MoCo v2, arXiv 2003.04297; BYOL, arXiv 2006.07733, appendix B.

    Example:
        >>> import torch
        >>> from fastproto.views import ContrastiveCrop
        >>> crop = ContrastiveCrop(24, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> view0, view1 = crop(images, torch.arange(8), epoch=3)
        >>> view0.shape
        torch.Size([8, 3, 24, 24])
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        alpha: float = 0.6,
        views: int = 2,
        augment: str = "simclr",
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
        blur: float | Sequence[float] | None = None,
        solarize: float | Sequence[float] = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        first_view: int = 0,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        op = "ContrastiveCrop"
        self.size = expect_size(size, op, "size")
        self.scale, self.ratio, self.alpha = expect_crop_options(op, scale, ratio, alpha)
        self.views, self.seed, _ = expect_key(op, views, seed, epoch=0)
        expect_type(first_view, INTS, op, "first_view", "an int")
        most = MAX_VIEWS - views
        expect(0 <= first_view <= most, op, "first_view", f"0 to {most}, {MAX_VIEWS} less views", first_view)
        expect(isinstance(dtype, torch.dtype) and dtype in FLOATS, op, "dtype", "a floating point dtype", str(dtype))
        expect_layout(op, memory_format)
        known = isinstance(augment, str) and augment in AUGMENTS
        expect(known, op, "augment", "one of " + ", ".join(AUGMENTS), augment)
        self.jitter = expect_jitter(op, jitter)
        wanted = "one number per channel or None"
        self.mean = None if mean is None else expect_mean(mean, op, wanted)
        self.std = None if std is None else expect_std(std, op, wanted)
        for argument, values in (("mean", self.mean), ("std", self.std)):
            expect(values is None or len(values) > 0, op, argument, wanted, values)
        self.augment = augment
        blurs = augment == "moco" or (augment == "simclr" and min(self.size) > BLUR_ABOVE)
        self.blur = expect_probabilities(op, "blur", blurs / 2 if blur is None else blur, self.views)
        self.solarize = expect_probabilities(op, "solarize", solarize, self.views)
        unused = augment == "none" and any(self.blur + self.solarize)
        expect(not unused, op, "augment", "another than none with blur or solarize", augment)
        self.first_view, self.dtype = int(first_view), dtype
        # torch.save cannot write a layout.
        self.channels_last = memory_format == torch.channels_last

    def forward(
        self,
        images: Tensor | Sequence[Tensor],  # (N, C, H, W) uint8, or N × (C, H, W)
        sample_ids: Tensor,  # (N,) integer
        boxes: Tensor | tuple[float, float, float, float] | None = None,  # (N, 4)
        epoch: int = 0,
    ) -> tuple[Tensor, ...]:  # views × (N, C, h, w)
        sizes = self._sizes(images, sample_ids)
        key: dict[str, Any] = {"views": self.first_view + self.views, "seed": self.seed, "epoch": epoch}
        skipped = self.first_view * sample_ids.shape[0]
        crops, flip = sample_crops_and_flips(
            sample_ids, sizes, boxes=boxes, scale=self.scale, ratio=self.ratio, alpha=self.alpha, **key
        )
        crops, flip = crops[skipped:], flip[skipped:]
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        cut: dict[str, Any] = {"size": self.size, "flip": flip, "memory_format": layout}
        scaling: dict[str, Any] = {"mean": self.mean, "std": self.std}
        if self.augment == "none":
            out = crop_resize(images, crops, **cut, **scaling, dtype=self.dtype)
        else:
            chances: Any = {
                name: p[:1] * self.first_view + p for name, p in (("blur_p", self.blur), ("solarize_p", self.solarize))
            }
            drawn: Any = sample_photometric(sample_ids, jitter=self.jitter, **chances, **key)
            drawn = {name: rows[skipped:] for name, rows in drawn.items()}
            # Between the two steps the values are float32, in memory that takes the result too where it is float32.
            resized = crop_resize(images, crops, **cut)
            out = resized if self.dtype == torch.float32 else torch.empty_like(resized, dtype=self.dtype)
            apply_photometric(resized, **drawn, **scaling, out=out)
        return out.unflatten(0, (self.views, sample_ids.shape[0])).unbind()

    def extra_repr(self) -> str:
        names = "scale ratio alpha views augment jitter blur solarize mean std seed first_view dtype channels_last"
        return ", ".join([f"{self.size}", *(f"{name}={getattr(self, name)!r}" for name in names.split())])

    def _sizes(self, images: Tensor | Sequence[Tensor], sample_ids: Tensor) -> tuple[int, int] | Tensor:
        """Refuses images without views; the sizes of the others as ``sample_crops`` takes them."""
        op = "ContrastiveCrop"
        sizes: tuple[int, int] | Tensor
        if isinstance(images, Tensor):
            expect_tensor(images, op, "images", ("N", "C", "H", "W"), (torch.uint8,))
            channels, height, width = images.shape[1:]
            expect(height > 0 and width > 0, op, "images", "H and W of at least 1", images)
            first, sizes, count = images, (height, width), images.shape[0]
        else:
            expect_type(images, (list, tuple), op, "images", "a uint8 tensor (N, C, H, W) or a list of (C, H, W)")
            expect(len(images) > 0, op, "images", "at least one image", "an empty list")
            for n, image in enumerate(images):
                expect_tensor(image, op, f"images[{n}]", ("C", "H", "W"), (torch.uint8,))
                expect(min(image.shape[1:]) > 0, op, f"images[{n}]", "H and W of at least 1", image)
            first, channels, count = images[0], len(images[0]), len(images)
            sizes = integers([image.shape[1:] for image in images], first.device)
        expect_tensor(sample_ids, op, "sample_ids", (count,), INTEGERS, first.device)
        good = 1 <= channels <= 4 if self.augment == "none" else channels in (1, 3)
        wanted = "1 to 4" if self.augment == "none" else "1 or 3"
        expect(good, op, "images", f"{wanted} channels in front of H and W", first)
        for argument, values in (("mean", self.mean), ("std", self.std)):
            good = values is None or len(values) == channels
            expect(good, op, argument, f"{channels} numbers, one per channel of images", values)
        return sizes
