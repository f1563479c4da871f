"""ContrastiveCropTransform: the batch module's views one by one, and workers that see new boxes and epochs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastproto.views import SIMC_BOX, BoxBank, ContrastiveCrop, ContrastiveCropTransform
from fastproto.views.files import read_image


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


@pytest.fixture
def strategy(request: pytest.FixtureRequest) -> Iterator[None]:
    """How torch shares memory between processes."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(request.param)
    yield
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"], indirect=True)
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.usefixtures("strategy")
def test_new_boxes_and_epochs_reach_persistent_workers(start: str) -> None:
    images, ids = images_of(6), torch.arange(6)
    bank = BoxBank(6)
    transform = ContrastiveCropTransform(20, boxes=bank, **OPTIONS)
    loader = DataLoader(
        Images(images, transform), batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context=start
    )
    crop = ContrastiveCrop(20, **OPTIONS)
    for epoch in (0, 1, 2):
        if epoch == 2:
            bank.update(ids, torch.tensor([SIMC_BOX] * 6))
            transform.set_alpha(0.2)
            crop.alpha = 0.2
            assert "alpha=0.2" in repr(transform)
        transform.set_epoch(epoch)
        batches = [views for views, _ in loader]
        expected = crop(images, ids, bank.boxes, epoch)
        for v in range(3):
            out = torch.cat([batch[v] for batch in batches])
            torch.testing.assert_close(out, expected[v], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda transform: pickle.loads(pickle.dumps(transform))])
def test_workers_of_a_copy_see_its_boxes_and_epochs(copied: Callable[..., ContrastiveCropTransform]) -> None:
    images, ids = images_of(6), torch.arange(6)
    transform = copied(ContrastiveCropTransform(20, boxes=BoxBank(6), **OPTIONS))
    loader = DataLoader(
        Images(images, transform), batch_size=6, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    next(iter(loader))
    transform.boxes.update(ids, torch.tensor([SIMC_BOX] * 6))
    transform.set_epoch(1)
    views, _ = next(iter(loader))
    expected = ContrastiveCrop(20, **OPTIONS)(images, ids, SIMC_BOX, epoch=1)
    torch.testing.assert_close(views[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["double", "half", "assign", "inside"])
def test_memory_stays_shared(change: str) -> None:
    """New boxes and epochs would not reach workers that start after a change that takes new memory."""
    transform = ContrastiveCropTransform(20, boxes=BoxBank(6), **OPTIONS)
    state = ContrastiveCropTransform(20, boxes=BoxBank(6)).state_dict()
    if change == "assign":
        transform.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    elif change == "inside":
        loaded = {f"0.{name}": value.clone() for name, value in state.items()}
        torch.nn.Sequential(transform).load_state_dict(loaded, assign=True)
    else:
        getattr(transform, change)()
    assert transform.boxes.boxes.is_shared()
    assert transform.epoch.is_shared()
    assert transform.alpha.is_shared()
    assert copy.deepcopy(transform).boxes.boxes.is_shared()


def test_numpy_numbers_are_sample_ids() -> None:
    transform, image = ContrastiveCropTransform(20), images_of(1)[0]
    assert torch.equal(transform(image, np.int64(5))[0], transform(image, 5)[0])


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "I"])
def test_pil_images_are_read_as_files_are(mode: str, tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    if mode.startswith("I"):
        pixels = torch.randint(1 << 16, (30, 32)).numpy().astype(np.uint16 if mode == "I;16" else np.int32)
        image = image_module.fromarray(pixels)
    else:
        image = image_module.fromarray(images_of(1)[0].permute(1, 2, 0).contiguous().numpy()).convert(mode)
    assert image.mode == mode
    exif = image_module.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.tif", exif=exif, compression="tiff_deflate")
    upright = read_image(tmp_path / "x.tif")
    assert upright.shape == (3, 32, 30)
    transform = ContrastiveCropTransform(20)
    with image_module.open(tmp_path / "x.tif") as opened:
        views = transform(opened, 5)
    for view, expected in zip(views, transform(upright, 5), strict=True):
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
        (
            TypeError,
            r"image expected a PIL image or a uint8 tensor \(C, H, W\), got float64 array",
            (np.zeros((8, 8, 3)), 0),
        ),
        (TypeError, "sample_id expected an int, got float 0.0", (images_of(1)[0], 0.0)),
        (TypeError, "sample_id expected an int64 or int32 tensor", (images_of(1)[0], torch.tensor(0.0))),
        (ValueError, "sample_id expected an int of 64 bits, got int 9223372036854775808", (images_of(1)[0], 2**63)),
        (ValueError, "sample_ids expected 0 to 2, got values from 3 to 3", (images_of(1)[0], 3)),
        (ValueError, "sample_ids expected 0 to 2, got values from -1 to -1", (images_of(1)[0], -1)),
        (ValueError, r"image expected \(C, H, W\), got uint8 \(1, 3, 30, 32\)", (images_of(1), 0)),
        (ValueError, "images expected 1 or 3 channels in front of H and W, got", (images_of(1, channels=2)[0], 0)),
        (ValueError, "images expected 1 or 3 channels in front of H and W, got", (images_of(1)[0].permute(1, 2, 0), 0)),
        (ValueError, "images expected H and W of at least 1", (images_of(1)[0][:, :0], 0)),
        (TypeError, "image expected a PIL image or a uint8 tensor", (None, 0)),
    ],
)
def test_bad_images(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        ContrastiveCropTransform(8, boxes=BoxBank(3))(*arguments)


def test_pil_numbers_without_a_scale_are_refused() -> None:
    image_module = pytest.importorskip("PIL.Image")
    transform = ContrastiveCropTransform(8)
    with pytest.raises(ValueError, match=r'mode "F" expected numbers in 0 to 1, got 0.0 to 7.0'):
        transform(image_module.fromarray(np.array([[0.0, 7.0]], np.float32)), 0)


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 1.0, 1.1), (-0.1, 0.0, 1.0, 1.0), (0.5, 0.0, 0.4, 1.0), (0.0, 0.5, 1.0, 0.4)]
)
def test_bad_boxes_do_not_reach_the_workers(box: tuple[float, ...]) -> None:
    transform = ContrastiveCropTransform(8, boxes=BoxBank(3))
    with pytest.raises(ValueError, match="BoxBank: boxes expected 0 <= h0 <= h1 <= 1 and 0 <= w0 <= w1 <= 1"):
        transform.boxes.update(torch.tensor([1]), torch.tensor([box]))
    # Written past the bank, as a loaded state is, they are refused where they are used.
    transform.boxes.boxes[1] = torch.tensor(box)
    with pytest.raises(ValueError, match="sample_crops: boxes expected 0 <= h0"):
        transform(images_of(1)[0], 1)


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="Transform: boxes expected a BoxBank, four numbers or None, got float32"):
        ContrastiveCropTransform(8, boxes=torch.zeros(3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Transform: boxes expected a BoxBank on the CPU, got .* on meta"):
        ContrastiveCropTransform(8, boxes=BoxBank(3).to("meta"))
    with pytest.raises(ValueError, match="ContrastiveCrop: alpha expected"):
        ContrastiveCropTransform(8, alpha=0)
    with pytest.raises(ValueError, match=r"alpha expected a positive finite number, got float -0.6"):
        ContrastiveCropTransform(8, alpha=-0.6)
    with pytest.raises(ValueError, match="ContrastiveCropTransform: epoch expected 0 to 4294967295, got int -1"):
        ContrastiveCropTransform(8).set_epoch(-1)


def test_takes_the_index_of_a_subset_of_a_tensor_under_any_default_device() -> None:
    images = torch.randint(256, (6, 3, 9, 9), dtype=torch.uint8)
    transform = ContrastiveCropTransform(8, boxes=BoxBank(6))
    expected = transform(images[4], 4)
    with torch.device("meta"):
        assert all(map(torch.equal, transform(images[4], torch.tensor(4, device="cpu")), expected))
        assert ContrastiveCropTransform(8).epoch.is_shared()
    # Nor does a module that holds it take it along.
    torch.nn.Sequential(transform).to("meta")
    assert all(map(torch.equal, transform(images[4], 4), expected))
    with pytest.raises(TypeError, match=r"sample_id expected an int64 or int32 tensor \(\), got float32 \(\) on cpu"):
        transform(images[4], torch.tensor(4.0))


def test_one_box_for_all_images() -> None:
    """SimCCrop in the workers of a DataLoader."""
    images = images_of(4)
    transform = ContrastiveCropTransform(20, boxes=SIMC_BOX, **OPTIONS)
    transform.set_epoch(3)
    expected = ContrastiveCrop(20, **OPTIONS)(images, torch.arange(4), SIMC_BOX, epoch=3)
    for i, image in enumerate(images):
        for view, batch in zip(pickle.loads(pickle.dumps(transform))(image, i), expected, strict=True):
            torch.testing.assert_close(view, batch[i], rtol=0, atol=1e-5)
    message = "^ContrastiveCropTransform: boxes expected 0 <= h0 <= h1 <= 1 and .*, got .0.5, 0.0, 0.25, 1.0.$"
    with pytest.raises(ValueError, match=message):
        ContrastiveCropTransform(20, boxes=(0.5, 0, 0.25, 1))
