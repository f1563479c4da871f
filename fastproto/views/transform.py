"""ContrastiveCrop for a DataLoader whose workers transform one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproto._check import INTEGERS, INTS, describe, expect, expect_tensor, expect_type
from fastproto._random import expect_key
from fastproto.ops.sample_crops import expect_box, expect_crop_options
from fastproto.views.boxes import BoxBank
from fastproto.views.contrastive_crop import ContrastiveCrop
from fastproto.views.files import to_rgb


class ContrastiveCropTransform(nn.Module):
    """The views of ``ContrastiveCrop`` for a single image, for data sets whose images are decoded in workers.

    The boxes, the epoch and α lie in shared memory: what the training process sets between two epochs reaches workers
    that were started before, those of ``persistent_workers=True`` too. Set them before the loader's next ``iter``,
    which starts to prefetch. Not so after ``load_state_dict(..., assign=True)``, which takes new memory. They stay
    where they are, on the CPU, if a module that holds the transform is moved to another device or dtype.

    The paper's crops are uniform until there are boxes: begin with ``alpha=1``, then ``set_alpha``.

    Args:
        size: height and width of the views, or one number for both.
        boxes: a ``BoxBank`` on the CPU, moved into shared memory here; one box (h0, w0, h1, w1) for all images, e.g.
            ``SIMC_BOX``; None crops from the whole image.
        options: those of ``ContrastiveCrop``.

    Shape:
        image: PIL image of any mode, read as ``fastproto.views.files.to_rgb`` does: upright and in RGB, also where it
            is gray; or uint8 tensor (C, H, W)
        sample_id: the image's place in the data set, which the data set's ``__getitem__`` is called with; NumPy's
            integers and torch's () too, which ``Subset`` may hand on
        output: ``views`` tensors (C, h, w)

    Raises:
        TypeError, ValueError: as ``ContrastiveCrop``; for an image of another kind, dtype or rank; a sample_id that is
            no int or not in the bank; a bank that is not on the CPU.

    Source:
        Peng et al., Crafting Better Contrastive Views for Siamese Representation Learning, arXiv 2202.03278, section 3.

    Example:
        >>> import torch
        >>> from fastproto.views import BoxBank, ContrastiveCropTransform
        >>> class Images(torch.utils.data.Dataset):
        ...     def __init__(self, images, transform):
        ...         self.images, self.transform = images, transform
        ...     def __len__(self):
        ...         return len(self.images)
        ...     def __getitem__(self, sample_id):
        ...         return self.transform(self.images[sample_id], sample_id), sample_id
        >>> boxes = BoxBank(6)
        >>> transform = ContrastiveCropTransform(24, boxes=boxes, alpha=0.1)
        >>> images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
        >>> loader = torch.utils.data.DataLoader(Images(images, transform), batch_size=3)
        >>> transform.set_epoch(1)
        >>> (view0, view1), sample_ids = next(iter(loader))
        >>> view0.shape
        torch.Size([3, 3, 24, 24])
    """

    epoch: Tensor
    alpha: Tensor

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        boxes: BoxBank | tuple[float, float, float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        kinds = (BoxBank, tuple, list, type(None))
        expect_type(boxes, kinds, "ContrastiveCropTransform", "boxes", "a BoxBank, four numbers or None")
        if isinstance(boxes, (tuple, list)):
            boxes = expect_box("ContrastiveCropTransform", boxes)
        elif boxes is not None:
            on_cpu = boxes.boxes.device.type == "cpu"
            expect(on_cpu, "ContrastiveCropTransform", "boxes", "a BoxBank on the CPU", boxes.boxes)
        self.crop = ContrastiveCrop(size, **options)
        self.boxes = boxes
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64, device="cpu"))
        alpha = torch.tensor(self.crop.alpha, dtype=torch.float64, device="cpu")
        self.register_buffer("alpha", alpha, persistent=False)
        self.register_load_state_dict_post_hook(_share)
        self.share_memory()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a copy, or unpickled: its memory is new.
        super().__setstate__(state)
        self.share_memory()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContrastiveCropTransform:
        """Nothing: workers are on the CPU, and look where the memory was when they were started."""
        return self

    def share_memory(self) -> ContrastiveCropTransform:
        """Puts boxes, epoch and α into memory that workers share."""
        for tensor in self.buffers():
            # What is shared already would be moved where torch's sharing strategy is another one now.
            if tensor.is_cpu and not tensor.is_shared():
                tensor.share_memory_()
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that keys the draws, in all workers."""
        _, _, checked = expect_key("ContrastiveCropTransform", self.crop.views, self.crop.seed, epoch)
        self.epoch.fill_(checked)

    def set_alpha(self, alpha: float) -> None:
        """Sets the α of the crops, in all workers."""
        *_, checked = expect_crop_options("ContrastiveCropTransform", self.crop.scale, self.crop.ratio, alpha)
        self.alpha.fill_(checked)
        # Shown by repr; in workers forward takes it from the shared memory.
        self.crop.alpha = checked

    def forward(
        self,
        image: Any,  # PIL image or (C, H, W) uint8
        sample_id: int | np.integer[Any] | Tensor,
    ) -> tuple[Tensor, ...]:  # views × (C, h, w)
        if isinstance(sample_id, Tensor):
            expect_tensor(sample_id, "ContrastiveCropTransform", "sample_id", (), INTEGERS)
        else:
            expect_type(sample_id, INTS, "ContrastiveCropTransform", "sample_id", "an int")
        number = int(sample_id)
        expect(-(2**63) <= number < 2**63, "ContrastiveCropTransform", "sample_id", "an int of 64 bits", sample_id)
        ids = torch.tensor([number], device="cpu")
        boxes = self.boxes.lookup(ids) if isinstance(self.boxes, BoxBank) else self.boxes
        self.crop.alpha = float(self.alpha)
        views = self.crop(_to_tensor(image)[None], ids, boxes, int(self.epoch))
        return tuple(view[0] for view in views)


def _share(transform: nn.Module, keys: object) -> None:
    """After a state is loaded: ``assign=True`` puts the state's own tensors in place."""
    transform.share_memory()


def _to_tensor(image: Any) -> Tensor:
    """A PIL image or tensor as a uint8 tensor (C, H, W)."""
    if isinstance(image, Tensor):
        expect_tensor(image, "ContrastiveCropTransform", "image", ("C", "H", "W"), (torch.uint8,))
        # torchvision's image class would otherwise come out on the other side.
        return image.as_subclass(Tensor)
    # Known by its methods, so that neither PIL nor torchvision is imported here.
    if not (hasattr(image, "mode") and hasattr(image, "convert")):
        raise TypeError(
            f"ContrastiveCropTransform: image expected a PIL image or a uint8 tensor (C, H, W), got {describe(image)}"
        )
    return to_rgb(image)
