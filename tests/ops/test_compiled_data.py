"""Compiled code skips the checks of Python; what its data would have the C++ kernels read is refused by them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.test_contrast_kernels import needs_cpp

from fastproto.losses import SPCLLoss
from fastproto.losses.functional import proto_nce
from fastproto.ops.crop_resize import crop_resize
from fastproto.ops.update import update

X, KEYS = torch.randn(8, 16), torch.randn(5, 16)
IMAGES = torch.zeros(2, 3, 9, 8, dtype=torch.uint8)


def refused(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ValueError, match=r"expected below|not inside") as error:
        torch.compile(function, backend="eager")(*arguments)
    return str(error.value).partition("\n")[0]


@needs_cpp
@pytest.mark.parametrize("wrong", [5, 10**9])
def test_targets_and_labels(wrong: int) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    labels[3] = wrong
    expected = f"contrast: targets expected below 5, got {wrong}"
    assert refused(lambda: proto_nce(X.requires_grad_(), KEYS, labels)) == expected
    assert refused(lambda: proto_nce(X, KEYS.clone().requires_grad_(), labels)) == expected
    assert refused(lambda: proto_nce(X, [KEYS, KEYS], [labels, labels])) == expected
    assert refused(lambda: update(X.detach(), labels, 5)) == f"update: labels expected below 5, got {wrong}"
    spcl = SPCLLoss(16, 5)
    assert "5" in refused(lambda: spcl(X, X, X, X, labels))


@needs_cpp
@pytest.mark.parametrize("crop", [(0, 0, 10, 8), (-1, 0, 4, 4), (0, 0, 0, 4), (0, 5, 9, 4), (2**31 - 1, 0, 9, 8)])
def test_crops(crop: tuple[int, ...]) -> None:
    crops = torch.tensor([(0, 0, 9, 8), crop], dtype=torch.int32)
    assert refused(lambda: crop_resize(IMAGES, crops, 4)) == "crop_resize: crops[1] is not inside its image"
    mixed = [IMAGES[0], torch.zeros(3, 20, 3, dtype=torch.uint8)]
    assert refused(lambda: crop_resize(mixed, crops[[0, 0]], 4)) == "crop_resize: crops[1] is not inside its image"


@needs_cpp
@pytest.mark.parametrize("image", [-1, 2])
def test_indices_of_images(image: int) -> None:
    crops, index = torch.tensor([(0, 0, 9, 8)], dtype=torch.int32), torch.tensor([image])
    assert "crops[0] is not inside" in refused(lambda: crop_resize(IMAGES, crops, 4, index=index))
