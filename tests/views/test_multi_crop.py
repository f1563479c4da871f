"""MultiCrop: two ContrastiveCrops that share no draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto.views import SIMC_BOX, ContrastiveCrop, MultiCrop

OPTIONS: dict[str, Any] = {"alpha": 0.1, "augment": "moco", "mean": (0.5,) * 3, "std": (0.2,) * 3, "seed": 3}


def images_of(n: int, channels: int = 3) -> Tensor:
    return torch.randint(256, (n, channels, 40, 36), dtype=torch.uint8)


def test_is_two_contrastive_crops() -> None:
    images, ids = images_of(5), torch.tensor([9, 0, 4, 1, 77])
    boxes = torch.rand(5, 2, 2).sort(dim=1).values.flatten(1)
    views = MultiCrop(24, (10, 12), views=2, small_views=3, **OPTIONS)(images, ids, boxes, epoch=7)
    assert isinstance(views, tuple)
    assert [tuple(view.shape[2:]) for view in views] == [(24, 24)] * 2 + [(10, 12)] * 3
    large = ContrastiveCrop(24, scale=(0.14, 1.0), **OPTIONS)(images, ids, boxes, epoch=7)
    small = ContrastiveCrop((10, 12), scale=(0.05, 0.14), views=5, **OPTIONS)(images, ids, boxes, epoch=7)
    for view, expected in zip(views, (*large, *small[2:]), strict=True):
        assert torch.equal(view, expected)


def test_the_papers_setting() -> None:
    crop = MultiCrop()
    assert (crop.large.size, crop.large.views, crop.large.scale) == ((224, 224), 2, (0.14, 1.0))
    assert (crop.small.size, crop.small.views, crop.small.scale) == ((96, 96), 6, (0.05, 0.14))


def test_no_two_views_share_a_draw() -> None:
    """Where a crop lies, seen in the colours of a ramp: centres of different views of an image are uncorrelated."""
    ramp = torch.stack(torch.meshgrid(torch.arange(240), torch.arange(240), indexing="ij")).to(torch.uint8)
    n = 2000
    crop = MultiCrop(2, 2, views=2, small_views=3, scale=(0.05, 0.14), alpha=1.0, augment="none")
    views = crop(ramp.expand(n, 2, 240, 240), torch.arange(n))
    rows, columns = (torch.stack([view[:, axis].mean((1, 2)) for view in views]) for axis in (0, 1))
    correlation = torch.corrcoef(torch.cat([rows, columns]).double()) - torch.eye(10)
    assert correlation.abs().max() < 0.09
    # The same scale, and yet other crops: large and small are told apart by their numbers.
    assert not any(torch.equal(views[a], views[b]) for a in range(5) for b in range(a))


def test_small_views_keep_to_the_box_and_avoid_its_middle() -> None:
    ramp = torch.arange(200, dtype=torch.uint8).expand(2000, 1, 200, 200)
    at: dict[float, Tensor] = {}
    for alpha in (1.0, 0.1):
        crop = MultiCrop(2, 2, alpha=alpha, augment="none")
        views = crop(ramp, torch.arange(2000), SIMC_BOX)
        at[alpha] = torch.cat([view.mean((1, 2, 3)) * 255 / 200 for view in views[2:]])
        assert at[alpha].min() > 0.24
        assert at[alpha].max() < 0.76
    middle = {alpha: float(((place - 0.5).abs() < 0.125).double().mean()) for alpha, place in at.items()}
    assert middle[1.0] == pytest.approx(0.5, abs=0.03)
    assert middle[0.1] < 0.25


def test_the_same_views_in_every_batch_and_from_a_list() -> None:
    images, ids = images_of(9), torch.randperm(500)[:9]
    crop = MultiCrop(20, 8, augment="none")
    whole = crop(images, ids, SIMC_BOX, epoch=2)
    assert all(torch.equal(*pair) for pair in zip(whole, crop(list(images), ids, SIMC_BOX, epoch=2), strict=True))
    for rows in torch.arange(9).split(4):
        for view, part in zip(whole, crop(images[rows], ids[rows], SIMC_BOX, epoch=2), strict=True):
            assert torch.equal(part, view[rows])
    other = crop(images, ids, SIMC_BOX, epoch=3)
    assert not any(torch.equal(view, theirs) for view, theirs in zip(whole, other, strict=True))


def test_options_reach_all_views() -> None:
    options: dict[str, Any] = {"dtype": torch.float16, "memory_format": torch.channels_last}
    for view in MultiCrop(20, 8, **options)(images_of(2), torch.arange(2)):
        assert view.dtype == torch.float16
        assert view.is_contiguous(memory_format=torch.channels_last)
    crop = MultiCrop(20, 8, views=1, small_views=1, first_view=4)
    assert (crop.large.first_view, crop.small.first_view) == (4, 5)
    images, ids, options = images_of(2), torch.arange(2), {"augment": "none"}
    crop, expected = MultiCrop(20, 8, **options), MultiCrop(20, 8, alpha=0.1, **options)
    crop.alpha = 0.1
    assert crop.alpha == 0.1
    assert all(map(torch.equal, crop(images, ids), expected(images, ids)))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "size expected a positive int or two, got int 0", {"small_size": 0}),
        (ValueError, "views expected 1 to 4096, got int 0", {"small_views": 0}),
        (ValueError, "views expected 1 to 4096, got int 0", {"views": 0}),
        (ValueError, "first_view expected 0 to 96, 4096 less views, got int 100", {"views": 100, "small_views": 4000}),
        (ValueError, "scale expected", {"small_scale": (0.2, 0.1)}),
        (ValueError, "alpha expected", {"alpha": -1.0}),
    ],
)
def test_bad_options(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match="^ContrastiveCrop: " + message):
        MultiCrop(**options)


def test_bad_batches() -> None:
    crop, images, ids = MultiCrop(16, 8), images_of(2), torch.arange(2)
    with pytest.raises(TypeError, match="images expected a uint8 tensor"):
        crop(images / 255, ids)
    with pytest.raises(ValueError, match="boxes expected 0 <= h0"):
        crop(images, ids, (0.5, 0.0, 0.2, 1.0))
