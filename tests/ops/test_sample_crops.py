"""sample_crops against the formula in plain Python, the published figures, and torchvision's RandomResizedCrop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastproto
from fastproto._random import Stream, quantile, quantile_table, random_bits
from fastproto.views import (
    SIMC_BOX,
    BoxBank,
    ContrastiveCrop,
    ContrastiveCropTransform,
    localize,
    sample_crops,
    sample_photometric,
)

CPU = torch.device("cpu")
FULL = (0.0, 0.0, 1.0, 1.0)


def crop_in_python(
    draws: list[int],
    height: int,
    width: int,
    box: list[float],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    alpha: float,
) -> list[int]:
    """The authors' get_params with the draws given: 10 areas, 10 aspects, 2 places."""

    def drawn(name: Any, parameters: tuple[float, ...], word: int) -> float:
        return float(quantile(torch.tensor(word), quantile_table(name, parameters, CPU)))

    def start(length: int, crop: int, box0: float, box1: float, place: float) -> int:
        low = min(max(int(length * box0) - crop // 2, 0), length - crop)
        high = min(max(int(length * box1) - crop // 2, 0), length - crop)
        return low + int((high - low) * place)

    for area_word, aspect_word in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * drawn("uniform", scale, area_word)
        aspect = drawn("log_uniform", ratio, aspect_word)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            place_h, place_w = (drawn("beta", (alpha,), word) for word in draws[20:22])
            return [start(height, h, box[0], box[2], place_h), start(width, w, box[1], box[3], place_w), h, w]
    if width / height < ratio[0]:
        h, w = max(round(width / ratio[0]), 1), width
    elif width / height > ratio[1]:
        h, w = height, max(round(height * ratio[1]), 1)
    else:
        h, w = height, width
    return [(height - h) // 2, (width - w) // 2, h, w]


def random_boxes(rows: int) -> Tensor:
    sides = torch.rand(rows, 2, 2).sort(dim=1).values
    return sides.flatten(1)


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    ("alpha", "scale", "ratio"),
    [(0.6, (0.2, 1.0), (3 / 4, 4 / 3)), (1, (0.08, 1.0), (0.5, 2.0)), (0.1, (0.9, 1.0), (1.0, 1.0))],
)
def test_formula(n: int, views: int, alpha: float, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    ids = torch.randint(2**40, (n,))
    sizes = torch.randint(1, 300, (n, 2))
    sizes[0] = torch.tensor([10, 300])
    boxes = random_boxes(n)
    key = {"views": views, "seed": 11, "epoch": 2}
    crops = sample_crops(ids, sizes, boxes=boxes, scale=scale, ratio=ratio, alpha=alpha, **key)
    assert crops.shape == (views * n, 4)
    assert crops.dtype == torch.int32
    bits = random_bits(ids, Stream.CROP, 22, **key)
    for v in range(views):
        for i in range(n):
            draws = bits[v, i].tolist()
            expected = crop_in_python(draws, *sizes[i].tolist(), boxes[i].double().tolist(), scale, ratio, alpha)
            assert crops[v * n + i].tolist() == expected


def test_pinned() -> None:
    """These numbers may never change: a run continued with a new version would see other crops."""
    crops = sample_crops(torch.tensor([0, 1, 123_456_789]), (224, 160), boxes=SIMC_BOX, seed=5, epoch=7)
    view0 = [[3, 0, 116, 137], [19, 9, 132, 110], [72, 1, 121, 135]]
    view1 = [[59, 4, 111, 114], [27, 0, 125, 108], [87, 27, 114, 129]]
    assert crops.tolist() == view0 + view1


def test_the_same_in_every_batch_and_form() -> None:
    ids = torch.randperm(500)[:33]
    boxes = random_boxes(33)
    whole = sample_crops(ids, (40, 30), boxes=boxes, epoch=3).view(2, 33, 4)
    for rows in torch.arange(33).split(5):
        part = sample_crops(ids[rows], (40, 30), boxes=boxes[rows], epoch=3).view(2, -1, 4)
        assert torch.equal(part, whole[:, rows])
    flat = whole.flatten(0, 1)
    sizes = torch.tensor([[40, 30]]).expand(33, 2)
    assert torch.equal(flat, sample_crops(ids, sizes, boxes=boxes, epoch=3))
    assert torch.equal(flat, sample_crops(ids, sizes.int(), boxes=boxes, epoch=3))
    assert torch.equal(flat, sample_crops(ids.int(), [40, 30], boxes=boxes.T.contiguous().T, epoch=3))
    assert torch.equal(flat, sample_crops(torch.stack([ids, ids], 1)[:, 1], (40, 30), boxes=boxes.double(), epoch=3))
    assert not torch.equal(flat, sample_crops(ids, (40, 30), boxes=boxes, epoch=4))
    assert not torch.equal(flat, sample_crops(ids, (40, 30), boxes=boxes, epoch=3, seed=1))
    assert torch.equal(whole[0], sample_crops(ids, (40, 30), boxes=boxes, epoch=3, views=1))


def test_boxes_in_every_form() -> None:
    ids = torch.arange(7)
    one_for_all = torch.tensor([SIMC_BOX]).expand(7, 4)
    assert torch.equal(sample_crops(ids, (32, 32), boxes=SIMC_BOX), sample_crops(ids, (32, 32), boxes=one_for_all))
    whole = torch.tensor([FULL]).expand(7, 4)
    assert torch.equal(sample_crops(ids, (32, 32)), sample_crops(ids, (32, 32), boxes=whole))
    assert torch.equal(sample_crops(ids, (32, 32)), sample_crops(ids, (32, 32), boxes=whole.bfloat16()))
    trained = one_for_all.clone().requires_grad_()
    assert not sample_crops(ids, (32, 32), boxes=trained).requires_grad


def test_a_box_for_all_keeps_its_digits() -> None:
    """100 · 0.7 is 70, and 69 where 0.7 is rounded to float32."""
    ids, box = torch.arange(50), (0.0, 0.0, 0.7, 0.7)
    options: dict[str, Any] = {"alpha": 1e9, "scale": (0.04, 0.04), "ratio": (1, 1)}
    one_for_all = torch.tensor([box], dtype=torch.float64).expand(50, 4)
    expected = sample_crops(ids, (100, 100), boxes=one_for_all, **options)
    assert torch.equal(sample_crops(ids, (100, 100), boxes=box, **options), expected)
    with fastproto.backend("reference"):
        assert torch.equal(sample_crops(ids, (100, 100), boxes=box, **options), expected)


def test_empty_batch() -> None:
    assert sample_crops(torch.empty(0, dtype=torch.int64), (32, 32), views=3).shape == (0, 4)
    no_boxes, no_sizes = torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)
    assert sample_crops(torch.empty(0, dtype=torch.int64), no_sizes, boxes=no_boxes).shape == (0, 4)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    low = torch.maximum(a[:, :2], b[:, :2])
    high = torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    return (high - low).clamp(min=0).prod(dim=1).double()


@pytest.mark.parametrize(
    ("box", "alpha", "iou"),
    [
        (FULL, 1, 0.506),
        (FULL, 0.6, 0.479),
        (FULL, 0.1, 0.425),
        ((0.35, 0.35, 0.65, 0.65), 1, 0.538),
        ((0.35, 0.35, 0.65, 0.65), 0.6, 0.512),
        ((0.35, 0.35, 0.65, 0.65), 0.1, 0.465),
    ],
)
def test_iou_of_two_views(box: tuple[float, float, float, float], alpha: float, iou: float) -> None:
    a, b = sample_crops(torch.arange(20_000), (224, 224), boxes=box, alpha=alpha).chunk(2)
    both = overlap(a, b)
    measured = both / (a[:, 2:].prod(dim=1) + b[:, 2:].prod(dim=1) - both)
    assert float(measured.mean()) == pytest.approx(iou, rel=0.01)


@pytest.mark.parametrize(("alpha", "share"), [(1, 0.88), (0.6, 0.85), (0.1, 0.78)])
def test_share_of_the_box_in_a_crop(alpha: float, share: float) -> None:
    crops = sample_crops(torch.arange(20_000), (224, 224), boxes=SIMC_BOX, alpha=alpha)
    box = torch.tensor([[56, 56, 112, 112]])
    assert float((overlap(crops, box) / 112**2).mean()) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("size", [(64, 48), (30, 120)])
def test_sizes_are_those_of_random_resized_crop(size: tuple[int, int]) -> None:
    """30 × 120 often falls back to the centre crop."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = torch.empty(3, *size)
    get_params = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(2000)])
    ours = sample_crops(torch.arange(10_000), size, alpha=1)[:, 2:]
    for column in (0, 1):
        a, b = theirs[:, column], ours[:, column]
        assert scipy.stats.ks_2samp(a.numpy(), b.numpy()).statistic < 0.045
        assert float(a.double().mean()) == pytest.approx(float(b.double().mean()), rel=0.02)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.6])
def test_both_ends_of_the_places_are_as_likely(alpha: float) -> None:
    """int((a1 - a0) u) with u < 1 never gives a1, however near to 1 a draw for a small alpha is."""
    crops = sample_crops(torch.arange(20_000), (224, 224), scale=(0.25, 0.25), ratio=(1, 1), alpha=alpha)
    places = 224 - 112
    for start in crops[:, 0], crops[:, 1]:
        assert int(start.max()) == places - 1
        first, last = ((start == end).double().mean() for end in (0, places - 1))
        assert abs(first - last) < 0.015


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1, 3])
def test_place_is_beta(alpha: float) -> None:
    """Uniform for alpha 1, as in RandomResizedCrop."""
    crops = sample_crops(torch.arange(4000), (100_000, 80_000), alpha=alpha)
    places = crops[:, :2] / (torch.tensor([100_000, 80_000]) - crops[:, 2:]).double()
    # Inside a pixel nothing is known, and for a small alpha much lies in the first and the last.
    edges = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    expected = torch.from_numpy(scipy.stats.beta(alpha, alpha).cdf(edges.numpy()))
    for column in places.unbind(1):
        share = torch.searchsorted(column.sort().values, edges) / len(column)
        assert (share - expected).abs().max() < 1.95 / math.sqrt(len(column))
    assert abs(torch.corrcoef(places.T)[0, 1]) < 0.05


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    box=st.tuples(*[st.floats(0, 1, width=32)] * 4),
    alpha=st.floats(0.01, 10),
    seed=st.integers(0, 2**63 - 1),
)
def test_crops_lie_in_the_image_and_centres_in_the_box(
    size: tuple[int, int], box: tuple[float, float, float, float], alpha: float, seed: int
) -> None:
    low, high = torch.tensor(box).view(2, 2).sort(dim=0).values
    boxes = torch.cat([low, high]).expand(9, 4)
    crops = sample_crops(torch.arange(9), size, boxes=boxes, alpha=alpha, seed=seed).long()
    start, side, limit = crops[:, :2], crops[:, 2:], torch.tensor(size)
    assert ((start >= 0) & (side >= 1) & (start + side <= limit)).all()
    if 3 / 4 <= size[1] / size[0] <= 4 / 3:
        first = torch.minimum(((limit * low.double()).long() - side // 2).clamp(min=0), limit - side)
        last = torch.minimum(((limit * high.double()).long() - side // 2).clamp(min=0), limit - side)
        whole = (side == limit).all(dim=1, keepdim=True)
        assert (whole | ((first <= start) & (start <= last))).all()


def test_compiler_sees_one_op() -> None:
    ids = torch.arange(5)
    sizes, boxes = torch.full((5, 2), 32), random_boxes(5)
    options = ([0.2, 1.0], [0.75, 1.25], 0.6, 2, 0, 0)
    torch.library.opcheck(torch.ops.fastproto.sample_crops.default, (ids, sizes, [0, 0], boxes, FULL, *options))
    torch.library.opcheck(torch.ops.fastproto.sample_crops.default, (ids, None, [32, 24], None, FULL, *options))
    compiled = torch.compile(lambda ids: sample_crops(ids, (32, 32), epoch=1) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), sample_crops(ids, (32, 32), epoch=1) + 1)


def test_inference_mode_leaves_nothing_behind() -> None:
    with torch.inference_mode():
        first = sample_crops(torch.arange(3), (32, 32), alpha=0.123)
    assert torch.equal(first, sample_crops(torch.arange(3), (32, 32), alpha=0.123))


def test_backend_is_chosen_by_name() -> None:
    with fastproto.backend("reference"):
        assert sample_crops(torch.arange(3), (32, 32)).shape == (6, 4)
    message = "sample_crops: backend 'triton' cannot run on cpu"
    with fastproto.backend("triton"), pytest.raises(RuntimeError, match=message):
        sample_crops(torch.arange(3), (32, 32))


def test_numpy_numbers() -> None:
    """What comes out of an array; no op takes all of them as they are."""
    ids, one = torch.arange(3), np.int64(1)
    expected = sample_crops(ids, (32, 40), alpha=0.5, views=1, seed=1, epoch=1)
    size = (np.int64(32), np.int32(40))
    assert torch.equal(expected, sample_crops(ids, size, alpha=np.float32(0.5), views=one, seed=one, epoch=np.uint8(1)))
    drawn = sample_photometric(ids, jitter_p=np.float32(0.5), gray_p=np.float32(0.5), views=one, seed=one, epoch=one)
    assert torch.equal(drawn["gray"], sample_photometric(ids, gray_p=0.5, views=1, seed=1, epoch=1)["gray"])
    module = ContrastiveCrop(np.int64(8), alpha=np.float32(0.5), views=one, seed=one, first_view=one)
    images = torch.randint(256, (3, 3, 9, 9), dtype=torch.uint8)
    theirs = ContrastiveCrop(8, alpha=0.5, views=1, seed=1, first_view=1)(images, ids, epoch=1)
    assert torch.equal(module(images, ids, epoch=one)[0], theirs[0])
    assert localize(torch.rand(1, 2, 3, 3), np.float32(0.25), (np.int64(8), np.int64(8))).shape == (1, 4)
    transform = ContrastiveCropTransform(8, boxes=BoxBank(np.int64(3)))
    transform.set_epoch(np.int64(2))
    assert int(transform.epoch) == 2


IDS = torch.arange(3)
BOXES = torch.tensor([FULL] * 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"sample_ids expected an int64 or int32 tensor \(N,\), got list", {"sample_ids": [1, 2]}),
        (TypeError, "sample_ids expected an int64 or int32 tensor", {"sample_ids": IDS.float()}),
        (ValueError, r"sample_ids expected \(N,\), got int64 \(3, 1\)", {"sample_ids": IDS[:, None]}),
        (ValueError, r"image_size expected a positive int, two .*, got tuple \(0, 32\)", {"image_size": (0, 32)}),
        (ValueError, "image_size expected a positive int", {"image_size": (32,)}),
        (ValueError, "image_size expected a positive int", {"image_size": (32.0, 32.0)}),
        (ValueError, "image_size expected a positive int, two", {"image_size": (True, True)}),
        (ValueError, r"image_size expected .* or an integer tensor \(N, 2\), got str '32'", {"image_size": "32"}),
        (ValueError, r"scale expected high of at least 2\^-24, got tuple", {"scale": (1e-8, 2e-8)}),
        (ValueError, r"image_size expected \(3, 2\) on cpu, got int64 \(2, 2\)", {"image_size": IDS.new_ones(2, 2)}),
        (TypeError, "image_size expected an int64 or int32 tensor", {"image_size": torch.ones(3, 2)}),
        (ValueError, "image_size expected sizes of at least 1, got int 0", {"image_size": torch.zeros(3, 2).long()}),
        (ValueError, "image_size expected sides below 2147483648", {"image_size": (2**31, 5)}),
        (ValueError, "image_size expected sides below 2147483648", {"image_size": torch.full((3, 2), 2**33)}),
        (ValueError, r"boxes expected \(3, 4\) on cpu, got float32 \(2, 4\)", {"boxes": BOXES[:2]}),
        (TypeError, "boxes expected a float32 or", {"boxes": BOXES.long()}),
        (ValueError, "boxes expected 0 <= h0 <= h1 <= 1 and .*, got .0.0, 0.0, 1.5, 1.0.", {"boxes": (0, 0, 1.5, 1)}),
        (ValueError, "boxes expected 0 <= h0", {"boxes": (0.5, 0, 0.25, 1)}),
        (ValueError, "boxes expected 0 <= h0", {"boxes": (0, -0.1, 1, 1)}),
        (ValueError, "boxes expected 0 <= h0", {"boxes": BOXES * float("nan")}),
        (TypeError, r"boxes expected four numbers \(h0, w0, h1, w1\), got tuple", {"boxes": (0, None, 1, 1)}),
        (TypeError, r"boxes expected four numbers \(h0, w0, h1, w1\), got tuple", {"boxes": (0, "0", 1, 1)}),
        (TypeError, "scale expected a pair of numbers, got tuple", {"scale": ("0.2", 1.0)}),
        (ValueError, r"boxes expected four numbers \(h0, w0, h1, w1\)", {"boxes": (0, 1)}),
        (TypeError, r"boxes expected a tensor \(N, 4\), four numbers or None", {"boxes": "full"}),
        (ValueError, "scale expected .low, high. with 0 < low <= high, both within 0 to 1", {"scale": (0.0, 1.0)}),
        (ValueError, "scale expected", {"scale": (0.5, 0.2)}),
        (ValueError, "scale expected", {"scale": (0.5, 1.2)}),
        (ValueError, "ratio expected .low, high. with", {"ratio": (-1, 1)}),
        (TypeError, "ratio expected a pair of numbers, got float 1.0", {"ratio": 1.0}),
        (ValueError, "alpha expected a positive finite number, got int 0", {"alpha": 0}),
        (ValueError, "alpha expected a positive finite number", {"alpha": -0.5}),
        (ValueError, "alpha expected a positive finite number", {"alpha": float("nan")}),
        (TypeError, "alpha expected a number", {"alpha": "0.6"}),
        (ValueError, "views expected 1 to 4096", {"views": 0}),
        (ValueError, "seed expected 0 to", {"seed": -1}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match="^sample_crops: " + message):
        sample_crops(**{"sample_ids": IDS, "image_size": (32, 32), **arguments})


@pytest.mark.gpu
def test_cuda_gives_the_same_bits() -> None:
    ids = torch.arange(100_000)
    sizes, boxes = torch.randint(1, 500, (len(ids), 2)), random_boxes(len(ids))
    cpu = sample_crops(ids, sizes, boxes=boxes)
    assert torch.equal(cpu, sample_crops(ids.cuda(), sizes.cuda(), boxes=boxes.cuda()).cpu())
    with pytest.raises(ValueError, match=r"boxes expected .* on cuda:0, got .* on cpu"):
        sample_crops(ids.cuda(), (32, 32), boxes=boxes)
