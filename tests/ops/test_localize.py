"""localize against loops over images and pixels, and against upsample-and-threshold as the authors wrote it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto.views import localize


def upsampled(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, align_corners False, from its definition: pixel centres, edges repeated."""
    out = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * heat.shape[0] / height - 0.5, 0.0)
            u = max((x + 0.5) * heat.shape[1] / width - 0.5, 0.0)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, heat.shape[0] - 1), min(x0 + 1, heat.shape[1] - 1)
            top = heat[y0, x0] * (1 - (u - x0)) + heat[y0, x1] * (u - x0)
            bottom = heat[y1, x0] * (1 - (u - x0)) + heat[y1, x1] * (u - x0)
            out[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return out


def box_by_loops(feature_map: Tensor, threshold: float, height: int, width: int) -> list[float]:
    heat = sum(channel.double().numpy() for channel in feature_map)
    heat = heat - heat.min()
    if heat.max() == 0:
        return [0.0, 0.0, 1.0, 1.0]
    heat = upsampled(heat / heat.max(), height, width)
    rows = [y for y in range(height) if max(heat[y]) > threshold]
    columns = [x for x in range(width) if max(heat[:, x]) > threshold]
    if not rows:
        return [0.0, 0.0, 1.0, 1.0]
    return [rows[0] / height, columns[0] / width, rows[-1] / height, columns[-1] / width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.6, 0.99])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 24, 4, 4), (32, 32)), ((5, 3, 7, 5), (33, 20)), ((3, 130, 1, 6), (17, 24)), ((4, 1, 9, 8), (5, 3))],
)
def test_against_loops(
    shape: tuple[int, ...], size: tuple[int, int], threshold: float, dtype: torch.dtype
) -> None:
    feature_map = torch.randn(shape, dtype=dtype)
    boxes = localize(feature_map, threshold, size)
    assert boxes.dtype == torch.float32
    expected = [box_by_loops(one, threshold, *size) for one in feature_map]
    torch.testing.assert_close(boxes, torch.tensor(expected), rtol=1e-6, atol=0)


def test_against_the_authors_procedure() -> None:
    feature_map = torch.randn(33, 96, 7, 7).relu()
    size = (224, 224)
    heat = feature_map.sum(1)
    heat = heat - heat.amin((1, 2), keepdim=True)
    heat = heat / heat.amax((1, 2), keepdim=True)
    for one, box in zip(heat, localize(feature_map, 0.3, size), strict=True):
        large = F.interpolate(one[None, None], size, mode="bilinear")[0, 0]
        rows = torch.nonzero(large.max(1).values > 0.3).flatten()
        columns = torch.nonzero(large.max(0).values > 0.3).flatten()
        expected = [rows[0] / 224, columns[0] / 224, rows[-1] / 224, columns[-1] / 224]
        torch.testing.assert_close(box, torch.stack(expected), rtol=1e-6, atol=0)


def test_without_an_image_size_it_is_the_maps_own() -> None:
    feature_map = torch.randn(6, 4, 5, 9)
    assert torch.equal(localize(feature_map), localize(feature_map, image_size=(5, 9)))
    assert torch.equal(localize(feature_map, image_size=16), localize(feature_map, image_size=(16, 16)))
    expected = [box_by_loops(one, 0.1, 5, 9) for one in feature_map]
    torch.testing.assert_close(localize(feature_map), torch.tensor(expected), rtol=1e-6, atol=0)


def test_maps_without_a_warm_part_give_the_whole_image() -> None:
    maps = torch.randn(5, 2, 4, 4)
    maps[0] = 0.7
    maps[1] = -3.0
    maps[2, 0, 1, 1] = float("nan")
    maps[3, 0, 1, 1] = float("inf")
    boxes = localize(maps, image_size=(16, 16))
    assert boxes[:4].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 4
    # The neighbour's NaN stays with the neighbour.
    assert torch.equal(boxes[4:], localize(maps[4:], image_size=(16, 16)))
    assert localize(torch.ones(2, 3, 1, 1)).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2


def test_last_edge_is_its_row_not_the_one_after() -> None:
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 3, 3] = 1.0
    assert localize(corner).tolist() == [[0.75, 0.75, 0.75, 0.75]]


def test_any_strides() -> None:
    feature_map = torch.randn(4, 6, 5, 7)
    boxes = localize(feature_map, image_size=(20, 21))
    assert torch.equal(boxes, localize(feature_map.to(memory_format=torch.channels_last), image_size=(20, 21)))
    assert torch.equal(boxes, localize(feature_map.mT.contiguous().mT, image_size=(20, 21)))
    repeated = torch.randn(1, 6, 5, 7).expand(3, 6, 5, 7)
    assert torch.equal(localize(repeated), localize(repeated.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_summed_in_float32(dtype: torch.dtype) -> None:
    """In float16 the sum of 512 channels around 200 is infinite; in bfloat16 it has 8 bits."""
    feature_map = (200 + 10 * torch.randn(5, 512, 4, 4)).to(dtype)
    assert torch.equal(localize(feature_map, 0.4), localize(feature_map.float(), 0.4))


def test_empty_batch_and_no_gradient() -> None:
    assert localize(torch.zeros(0, 3, 4, 4), image_size=(8, 8)).shape == (0, 4)
    assert not localize(torch.randn(2, 3, 4, 4, requires_grad=True)).requires_grad


def test_compiles_without_a_break() -> None:
    feature_map = torch.randn(3, 4, 5, 5)
    compiled = torch.compile(lambda x: localize(x, image_size=(20, 20)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(feature_map), localize(feature_map, image_size=(20, 20)))


MAP = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"feature_map expected a float32 .* \(N, C, h, w\), got int64", {"feature_map": MAP.long()}),
        (ValueError, r"feature_map expected \(N, C, h, w\), got float32 \(3, 4, 4\)", {"feature_map": MAP[0]}),
        (ValueError, "feature_map expected C, h, w of at least 1", {"feature_map": MAP[:, :0]}),
        (ValueError, r"threshold expected a number in \[0, 1\), got float 1.0", {"threshold": 1.0}),
        (ValueError, "threshold expected a number", {"threshold": -0.1}),
        (TypeError, "threshold expected a number, got str", {"threshold": "0.1"}),
        (ValueError, r"image_size expected a positive int, two .* or None, got tuple \(0, 4\)", {"image_size": (0, 4)}),
        (ValueError, "image_size expected a positive int", {"image_size": (4, 4, 4)}),
        (ValueError, "image_size expected sides below 2147483648", {"image_size": (2**40, 3)}),
        (ValueError, "image_size expected a positive int", {"image_size": "32"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match="^localize: " + message):
        localize(**{"feature_map": MAP, **arguments})
