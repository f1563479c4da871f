"""JPEG files that the device decodes. Without a GPU torchvision's decoder for CPUs stands in for nvJPEG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastproto.train.data import BrokenImage, Streamed, batches, jpeg, load, streamed

# Python 3.12 warns of what DataLoader does by default.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CPU = torch.device("cpu")
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def smooth(height: int, width: int, seed: int) -> Image.Image:
    """Colours that change slowly, as noise is nothing for JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def content(mode: str = "RGB", suffix: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    smooth(24, 32, 0).convert(mode).save(file, suffix, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "plain"),
    [
        (content(), True),
        (content(progressive=True), True),
        (content(subsampling=0), True),
        (content(exif=ROTATED), False),
        (content("L"), False),
        (content("CMYK"), False),
        (content(suffix="PNG"), False),
        (content()[:-2], False),
        (content()[:300], False),
        (content() + b"more", False),
        (content().replace(b"JFIF", b"JFXX"), False),
        (b"\xff\xd8\xff\xd9", False),
        (b"", False),
    ],
)
def test_plain_is_what_leaves_no_doubt(file: bytes, plain: bool) -> None:
    assert jpeg.is_plain(file) is plain


def write_mixed(folder: Path, **options: Any) -> Path:
    """Two classes of ten training images of sizes of their own: JPEG, of which two are turned, and two PNG."""
    for seed in range(20):
        file = folder / "train" / f"class{seed // 10}" / f"{seed:02}.{'png' if seed in (4, 15) else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        smooth(20 + seed, 44 - seed, seed).save(file, exif=ROTATED if seed in (7, 12) else Image.Exif(), **options)
        test = folder / "val" / f"class{seed // 10}" / f"{seed}.jpg"
        test.parent.mkdir(parents=True, exist_ok=True)
        smooth(16, 16, seed).save(test)
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_mixed(tmp_path)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files the device decoded at each call."""
    calls: list[int] = []
    decode = jpeg.decode

    def counted(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        found = decode(contents, device)
        calls.append(len(contents))
        return found

    monkeypatch.setattr(jpeg, "decode", counted)
    monkeypatch.setattr(streamed, "DECODING", ("cuda", "cpu"))
    return calls


def stream(folder: Path, *, gpu_decode: bool = True, **options: Any) -> Streamed:
    images = load(f"imagefolder:{folder}", image_size=16, resident=False, gpu_decode=gpu_decode, **options).train_images
    assert isinstance(images, Streamed)
    return images


def assert_close(images: list[Tensor], expected: list[Tensor]) -> None:
    for image, wanted in zip(images, expected, strict=True):
        assert image.shape == wanted.shape
        # Decoders bring colour of half the resolution up in ways of their own.
        assert (image.int() - wanted.int()).abs().float().mean() < 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_device_decodes_what_is_plain(
    mixed: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(streamed, "PIECE", 4)
    order = torch.randperm(20)
    shares = [order[:5], order[5:6], order[6:6], order[6:]]
    images, expected = (stream(mixed, gpu_decode=wanted, workers=workers) for wanted in (True, False))
    for ids in (images, expected):
        assert ids.take(torch.arange(3)).gpu_decode == ids.gpu_decode
    decoded.clear()
    for _ in range(2):
        for batch, wanted in zip(batches(images, shares, CPU), batches(expected, shares, CPU), strict=True):
            assert_close(batch, wanted)
        # All but two PNG and two that are turned; the other set asks for none.
        assert sum(decoded) == 16
        decoded.clear()


def test_what_a_device_cannot_decode_is_found_out(
    mixed: Path, decoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is whole by its first and last bytes and is not, among others that are."""
    file = mixed / "train" / "class0" / "05.jpg"
    whole = file.read_bytes()
    header = whole.index(b"\xff\xda")
    file.write_bytes(whole[:header] + b"\xff\xd9")
    assert jpeg.is_plain(file.read_bytes())
    images = stream(mixed)
    caplog.clear()
    images.broken.clear()
    decoded.clear()
    ((*found,),) = batches(images, [torch.arange(20)], CPU)
    assert [len(found), *found[5].shape] == [20, 3, 26, 38]
    assert torch.equal(found[5], found[6])
    assert not any(decoded)
    assert images.broken == {5}
    assert "class0/05.jpg" in caplog.text
    images.strict = True
    with pytest.raises(BrokenImage, match=r"class0/05\.jpg"):
        list(batches(images, [torch.arange(20)], CPU))


def test_a_cpu_leaves_decoding_to_the_workers(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = stream(mixed)
    monkeypatch.setattr(jpeg, "is_plain", None)
    assert len(next(batches(images, [torch.arange(20)], CPU))) == 20


def test_a_device_that_cannot_decode_is_named_once(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, expected = stream(mixed), stream(mixed, gpu_decode=False)
    (mixed / "train" / "class0" / "04.png").write_bytes(b"")
    decode = jpeg.decode

    def unable(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        if contents:
            raise RuntimeError("no nvJPEG here")
        return decode(contents, device)

    monkeypatch.setattr(jpeg, "decode", unable)
    monkeypatch.setattr(streamed, "DECODING", ("cpu",))
    for _ in range(2):
        (found,) = batches(images, [torch.arange(20)], CPU)
        (wanted,) = batches(expected, [torch.arange(20)], CPU)
        assert all(map(torch.equal, found, wanted))
    assert images.broken == {4}
    assert caplog.text.count("no nvJPEG here") == 1


@pytest.mark.gpu
def test_nvjpeg_decodes_as_pillow_does(tmp_path: Path, decoded: list[int]) -> None:
    """Colour of full resolution: half of it nvJPEG brings up by repeating it."""
    folder = write_mixed(tmp_path, subsampling=0)
    images, expected = stream(folder), stream(folder, gpu_decode=False)
    decoded.clear()
    (found,) = batches(images, [torch.arange(20)], torch.device("cuda"))
    assert sum(decoded) == 16
    assert all(image.is_cuda for image in found)
    assert_close([image.cpu() for image in found], next(batches(expected, [torch.arange(20)], CPU)))
