"""Where each image's interesting part is, kept for the whole data set between the epochs that look for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastproto._check import INTEGERS, expect_index, expect_positive_ints, expect_tensor
from fastproto.ops.sample_crops import FULL_BOX, expect_boxes

SIMC_BOX = (0.25, 0.25, 0.75, 0.75)
"""SimCCrop: one fixed box for every image, the middle half of both sides, for ``sample_crops(boxes=SIMC_BOX)``."""


class BoxBank(nn.Module):
    """One box (h0, w0, h1, w1) per image of a data set, as fractions of its sides; at first the whole image.

    The boxes are a buffer: they move with ``to`` but stay float32, are saved in ``state_dict``, and reach the workers
    of a DataLoader after ``share_memory()``, which ``ContrastiveCropTransform`` calls. ``update`` writes in place.

    Args:
        num_samples: M, images in the data set.

    Shape:
        boxes: (M, 4) float32

    Raises:
        TypeError, ValueError: sample ids that are no integers or do not fit the bank; boxes of another shape, device or
            dtype, outside [0, 1] or inverted.

    Source:
        Peng et al., Crafting Better Contrastive Views for Siamese Representation Learning, arXiv 2202.03278,
        section 3.2.

    Example:
        >>> import torch
        >>> from fastproto.views import BoxBank
        >>> bank = BoxBank(3)
        >>> bank.update(torch.tensor([1]), torch.tensor([[0.25, 0.0, 0.75, 0.5]]))
        >>> bank.lookup(torch.tensor([0, 1]))
        tensor([[0.0000, 0.0000, 1.0000, 1.0000],
                [0.2500, 0.0000, 0.7500, 0.5000]])
    """

    boxes: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        expect_positive_ints("BoxBank", num_samples=num_samples)
        self.register_buffer("boxes", torch.tensor(FULL_BOX, dtype=torch.float32).repeat(int(num_samples), 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BoxBank:
        """Moves the boxes, and leaves them float32: rounded with the half precision of a module, crops would change."""
        boxes = self.boxes
        super()._apply(fn, recurse)
        if self.boxes.dtype != boxes.dtype:
            self.boxes = boxes.to(self.boxes.device)
        return self

    @torch.no_grad()
    def update(
        self,
        sample_ids: Tensor,  # (N,) integer
        boxes: Tensor,  # (N, 4) float
    ) -> None:
        """Writes the boxes of some samples. Where an id comes twice, one of its boxes stays."""
        self._expect_ids(sample_ids)
        expect_boxes("BoxBank", boxes, sample_ids.shape[0], self.boxes.device)
        # A copy: they may be rows of this bank.
        self.boxes.index_copy_(0, sample_ids.long(), boxes.to(self.boxes.dtype, copy=True))

    def lookup(
        self,
        sample_ids: Tensor,  # (N,) integer
    ) -> Tensor:  # (N, 4) float32
        """The boxes of some samples."""
        self._expect_ids(sample_ids)
        return self.boxes[sample_ids.long()]

    def extra_repr(self) -> str:
        return f"{self.boxes.shape[0]}"

    def _expect_ids(self, sample_ids: Tensor) -> None:
        expect_tensor(sample_ids, "BoxBank", "sample_ids", ("N",), INTEGERS, self.boxes.device)
        expect_index(sample_ids, "BoxBank", "sample_ids", len(self.boxes))
