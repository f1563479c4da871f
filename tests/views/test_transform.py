"""ContrastiveCropTransform: the batch module's views one by one, and workers that see new boxes and epochs."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastproto.views import SIMC_BOX, BoxBank, ContrastiveCrop, ContrastiveCropTransform


class Images(Dataset):
    def __init__(self, images: Tensor, transform: ContrastiveCropTransform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample_id: int) -> tuple[tuple[Tensor, ...], int]:
        return self.transform(self.images[sample_id], sample_id), sample_id


def images_of(n: int, channels: int = 3) -> Tensor:
    return torch.randint(256, (n, channels, 30, 32), dtype=torch.uint8)


OPTIONS: dict[str, Any] = {"alpha": 0.1, "augment": "moco", "mean": (0.5,) * 3, "std": (0.2,) * 3}
OPTIONS |= {"seed": 3, "views": 3}


@pytest.mark.parametrize("with_boxes", [False, True])
def test_is_the_batch_module(with_boxes: bool) -> None:
    images, ids = images_of(6), torch.arange(6)
    boxes = None
    if with_boxes:
        boxes = BoxBank(6)
        boxes.update(ids, torch.rand(6, 2, 2).sort(dim=1).values.flatten(1))
    transform = ContrastiveCropTransform(20, boxes=boxes, **OPTIONS)
    transform.set_epoch(4)
    expected = ContrastiveCrop(20, **OPTIONS)(images, ids, None if boxes is None else boxes.boxes, epoch=4)
    for n in range(6):
        views = transform(images[n], n)
        assert isinstance(views, tuple)
        assert len(views) == 3
        for view, theirs in zip(views, expected, strict=True):
            torch.testing.assert_close(view, theirs[n], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_new_boxes_and_epochs_reach_persistent_workers() -> None:
    images, ids = images_of(6), torch.arange(6)
    bank = BoxBank(6)
    transform = ContrastiveCropTransform(20, boxes=bank, **OPTIONS)
    loader = DataLoader(
        Images(images, transform), batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    crop = ContrastiveCrop(20, **OPTIONS)
    for epoch in (0, 1, 2):
        if epoch == 2:
            bank.update(ids, torch.tensor([SIMC_BOX] * 6))
        transform.set_epoch(epoch)
        batches = [views for views, _ in loader]
        expected = crop(images, ids, bank.boxes, epoch)
        for v in range(3):
            out = torch.cat([batch[v] for batch in batches])
            torch.testing.assert_close(out, expected[v], rtol=0, atol=1e-5)


def test_a_pickled_transform_shares_boxes_and_epoch() -> None:
    """As a worker that was started with spawn gets it."""
    bank = BoxBank(3)
    transform = ContrastiveCropTransform(20, boxes=bank)
    copy = ForkingPickler.loads(ForkingPickler.dumps(transform))
    bank.update(torch.tensor([1]), torch.tensor([SIMC_BOX]))
    transform.set_epoch(8)
    assert int(copy.epoch) == 8
    assert torch.equal(copy.boxes.boxes, bank.boxes)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_pil_images(mode: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.fromarray(images_of(1)[0].permute(1, 2, 0).contiguous().numpy()).convert(mode)
    pixels = np.array(image if mode == "L" else image.convert("RGB"))
    tensor = torch.from_numpy(pixels).reshape(30, 32, -1).permute(2, 0, 1)
    transform = ContrastiveCropTransform(20)
    for view, expected in zip(transform(image, 5), transform(tensor, 5), strict=True):
        assert view.shape == (1 if mode == "L" else 3, 20, 20)
        assert torch.equal(view, expected)


def test_torchvision_images() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    image, transform = images_of(1)[0], ContrastiveCropTransform(20)
    views = transform(tv_tensors.Image(image), 5)
    assert type(views[0]) is Tensor
    assert torch.equal(views[0], transform(image, 5)[0])


def test_epoch_and_boxes_are_saved() -> None:
    transform, other = (ContrastiveCropTransform(20, boxes=BoxBank(3)) for _ in range(2))
    transform.set_epoch(8)
    transform.boxes.update(torch.tensor([1]), torch.tensor([SIMC_BOX]))
    other.load_state_dict(transform.state_dict())
    assert int(other.epoch) == 8
    assert torch.equal(other.boxes.boxes, transform.boxes.boxes)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"image expected a uint8 tensor \(C, H, W\), got float32", (torch.rand(3, 8, 8), 0)),
        (ValueError, r"image expected \(C, H, W\), got uint8 \(8, 8\)", (torch.zeros(8, 8, dtype=torch.uint8), 0)),
        (TypeError, r"image expected a PIL image or a uint8 tensor \(C, H, W\), got ndarray", (np.zeros((8, 8, 3)), 0)),
        (TypeError, "sample_id expected an int, got float 0.0", (images_of(1)[0], 0.0)),
        (ValueError, "sample_ids expected 0 to 2, got 3 to 3", (images_of(1)[0], 3)),
    ],
)
def test_bad_images(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        ContrastiveCropTransform(8, boxes=BoxBank(3))(*arguments)


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="ContrastiveCropTransform: boxes expected a BoxBank or None, got float32"):
        ContrastiveCropTransform(8, boxes=torch.zeros(3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Transform: boxes expected a BoxBank on the CPU, got .* on meta"):
        ContrastiveCropTransform(8, boxes=BoxBank(3).to("meta"))
    with pytest.raises(ValueError, match="ContrastiveCrop: alpha expected"):
        ContrastiveCropTransform(8, alpha=0)
    with pytest.raises(ValueError, match="ContrastiveCropTransform: epoch expected 0 to 4294967295, got int -1"):
        ContrastiveCropTransform(8).set_epoch(-1)
