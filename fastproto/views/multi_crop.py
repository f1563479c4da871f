"""Multi-crop: a few large views of each image and many small ones, which cost little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastproto.views.contrastive_crop import ContrastiveCrop


class MultiCrop(nn.Module):
    """SwAV's multi-crop with the crops of ContrastiveCrop: large views of most of an image, small views of its parts.

    Two ``ContrastiveCrop`` whose views are numbered on: the large ones 0, 1, …, the small ones after them. So every
    view has draws of its own, and the large views are those of ``ContrastiveCrop`` with the same seed and scale. The
    centres of the small crops too lie in the image's box, away from its middle.

    Args:
        size: height and width of the large views, or one number for both; 224 in the paper.
        small_size: those of the small views; 96 in the paper.
        views: large views of each image.
        small_views: small views of each image; 6 in the paper, beside 2 large ones.
        scale: least and greatest share of the image's area that a large crop takes.
        small_scale: those of a small crop.
        options: the others of ``ContrastiveCrop``, for all views: ratio, alpha, augment, jitter, mean, std, seed,
            first_view, dtype, memory_format, and blur and solarize as one number each. With ``augment="simclr"`` small
            views of at most 64 pixels are not blurred, whatever the large ones are.

    Shape:
        images, sample_ids, boxes, epoch: as ``ContrastiveCrop``
        output: ``views`` tensors (N, C, h, w), then ``small_views`` tensors (N, C, h', w')

    Raises:
        TypeError, ValueError: as ``ContrastiveCrop``, in its name and with its names of the arguments.

    Source:
        Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), arXiv
        2006.09882, section 3.2 and appendix; the place of the crops: ContrastiveCrop, arXiv 2202.03278.

    Example:
        >>> import torch
        >>> from fastproto.views import MultiCrop
        >>> crop = MultiCrop(32, 16)
        >>> views = crop(torch.randint(256, (4, 3, 48, 40), dtype=torch.uint8), torch.arange(4), epoch=1)
        >>> [view.shape[-1] for view in views]
        [32, 32, 16, 16, 16, 16, 16, 16]
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        small_size: int | tuple[int, int] = 96,
        *,
        views: int = 2,
        small_views: int = 6,
        scale: tuple[float, float] = (0.14, 1.0),
        small_scale: tuple[float, float] = (0.05, 0.14),
        first_view: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.large = ContrastiveCrop(size, scale=scale, views=views, first_view=first_view, **options)
        first_small = first_view + views
        self.small = ContrastiveCrop(
            small_size, scale=small_scale, views=small_views, first_view=first_small, **options
        )

    @property
    def alpha(self) -> float:
        """α of all views; it may be set anew between epochs."""
        return self.large.alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.large.alpha = self.small.alpha = alpha

    def forward(
        self,
        images: Tensor | Sequence[Tensor],  # (N, C, H, W) uint8, or N × (C, H, W)
        sample_ids: Tensor,  # (N,) integer
        boxes: Tensor | tuple[float, float, float, float] | None = None,  # (N, 4)
        epoch: int = 0,
    ) -> tuple[Tensor, ...]:  # views × (N, C, h, w), small_views × (N, C, h', w')
        return self.large(images, sample_ids, boxes, epoch) + self.small(images, sample_ids, boxes, epoch)
