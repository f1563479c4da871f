"""The data sets: what the pictures are, byte for byte, how folders are read, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastproto.train import data as data_module
from fastproto.train.data import Dataset, load

PICTURES = "4ba18a74b5a247aad8239a0200176a9ace6ba685cad1f1c34c75c6419fce8775"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def write_image(file: Path, height: int, width: int, seed: int = 0, mode: str = "RGB") -> np.ndarray:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)
    return pixels


def test_digits_are_the_same_pictures_everywhere(digits: Dataset) -> None:
    pictures = torch.cat([digits.train_images, digits.test_images]).numpy().tobytes()
    assert hashlib.sha256(pictures).hexdigest() == PICTURES


def test_digits_are_split_and_labelled(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    target = torch.from_numpy(load_digits().target).long()
    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.train_images.shape == (1437, 3, 40, 40)
    assert digits.test_images.shape == (360, 3, 40, 40)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert torch.equal(digits.test_labels, target[::5])
    assert torch.equal(digits.train_labels, target[torch.arange(1797) % 5 != 0])


def test_digits_lie_all_over_the_picture(digits: Dataset) -> None:
    """Nothing but ink is brighter than 72, so bright pixels tell where the digits are."""
    bright = (digits.train_images > 100).any(1)
    rows = torch.arange(40.0)
    weight = bright.sum(dim=(1, 2)).clamp(min=1)
    centre_y, centre_x = (bright.sum(2) * rows).sum(1) / weight, (bright.sum(1) * rows).sum(1) / weight
    seen = bright.flatten(1).any(1)
    assert seen.float().mean() > 0.95
    away = ((centre_y - 19.5).abs() > 4) | ((centre_x - 19.5).abs() > 4)
    assert away[seen].float().mean() > 0.4
    # Each corner quarter of the picture is under some digits.
    for part in (bright[:, :10, :10], bright[:, :10, 30:], bright[:, 30:, :10], bright[:, 30:, 30:]):
        assert part.flatten(1).any(1).float().mean() > 0.05


def test_statistics_are_those_of_the_training_pixels(digits: Dataset) -> None:
    pixels = digits.train_images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(digits.std, pixels.std(axis=(0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 8, 9, 20, 32])
def test_enlarge_is_bilinear(size: int) -> None:
    image = torch.randint(0, 17, (8, 8))
    got = data_module._enlarge(image.numpy(), size)
    expected = torch.nn.functional.interpolate(
        image[None, None].double(), (size, size), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(got / (2 * size) ** 2, expected[0, 0].numpy(), atol=1e-12)


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    wide = write_image(tmp_path / "train" / "cat" / "b.png", 8, 12, 1)
    write_image(tmp_path / "train" / "cat" / "deep" / "a.PNG", 8, 8, 2)
    write_image(tmp_path / "train" / "ant" / "1.png", 20, 9, 3)
    write_image(tmp_path / "val" / "cat" / "1.png", 8, 8, 4)
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no class")
    data = load(f"imagefolder:{tmp_path}", image_size=8)
    assert data.classes == ("ant", "cat")
    assert data.train_labels.tolist() == [0, 1, 1]
    assert data.test_labels.tolist() == [1]
    assert data.train_images.shape == (3, 3, 8, 8)
    # Shorter side as it is: the middle eight columns of twelve, byte for byte.
    assert np.array_equal(data.train_images[1].numpy(), wide[:, 2:10].transpose(2, 0, 1))
    assert data.test_images.is_contiguous()


def test_folder_prefers_test_to_val(tmp_path: Path) -> None:
    for part, count in (("train", 2), ("val", 3), ("test", 4)):
        for i in range(count):
            write_image(tmp_path / part / "only" / f"{i}.png", 4, 4, i)
    data = load(f"imagefolder:{tmp_path}", image_size=4)
    assert (len(data.train_labels), len(data.test_labels)) == (2, 4)


def test_folder_of_classes_keeps_every_fifth_for_testing(tmp_path: Path) -> None:
    pixels = {}
    for label, count in (("a", 11), ("b", 5), ("c", 2)):
        for i in range(count):
            pixels[label, i] = write_image(tmp_path / label / f"{i:02}.png", 4, 4, 100 * ord(label) + i)
    data = load(f"imagefolder:{tmp_path}", image_size=4)
    assert data.train_labels.tolist() == [0] * 9 + [1] * 4 + [2] * 2
    assert data.test_labels.tolist() == [0, 0, 1]
    for image, key in zip(data.test_images, (("a", 4), ("a", 9), ("b", 4)), strict=True):
        assert np.array_equal(image.numpy(), pixels[key].transpose(2, 0, 1))
    again = load(f"imagefolder:{tmp_path}", image_size=4)
    assert torch.equal(again.train_images, data.train_images)


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg")])
def test_folder_decodes_every_mode_to_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    for i in range(5):
        write_image(tmp_path / "x" / f"{i}.{suffix}", 30, 45, i, mode)
    data = load(f"imagefolder:{tmp_path}", image_size=16)
    with Image.open(tmp_path / "x" / f"4.{suffix}") as image:
        reference = image.convert("RGB").resize((24, 16), Image.Resampling.BILINEAR).crop((4, 0, 20, 16))
    assert np.abs(data.test_images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference)).max() <= 1


def test_folder_has_a_default_size_and_survives_constant_channels(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), (255, 0, 51)).save(tmp_path / "x" / f"{i}.png")
    data = load(f"imagefolder:{tmp_path}")
    assert data.train_images.shape == (4, 3, 96, 96)
    assert data.mean == (1.0, 0.0, 0.2)
    assert data.std == (1 / 255, 1 / 255, 1 / 255)


def test_folder_refuses(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(f"imagefolder:{tmp_path}/set", image_size=8)

    refused("load: imagefolder expected a folder, got .*set, which is none")
    (tmp_path / "set").mkdir()
    refused("load: imagefolder expected a folder per class, got none in .*set")
    (tmp_path / "set" / "a").mkdir()
    refused("load: imagefolder expected images in every class, got none in .*a")
    write_image(tmp_path / "set" / "a" / "0.png", 8, 8)
    refused("load: imagefolder expected at least 5 images in a class, got fewer in all of .*set")
    write_image(tmp_path / "set" / "train" / "a" / "0.png", 8, 8)
    refused("load: imagefolder expected .*test or .*val, got neither")
    write_image(tmp_path / "set" / "val" / "b" / "0.png", 8, 8)
    refused(r"load: imagefolder expected the classes of .*train, got .*val with \['b'\]")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\nbroken", "cut"])
def test_folder_names_the_image_that_does_not_decode(tmp_path: Path, content: bytes | str) -> None:
    for i in range(5):
        write_image(tmp_path / "x" / f"{i}.png", 30, 40, i)
    broken = tmp_path / "x" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"load: imagefolder expected images that decode, got .*2\.png: "):
        load(f"imagefolder:{tmp_path}", image_size=8)


@pytest.mark.parametrize("name", ["", "mnist", "imagefolder:", "imagefolder", "Digits"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="load: name expected digits, cifar10, cifar100 or imagefolder:PATH, got '"):
        load(name)


def test_sizes_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load: image_size expected at least 1, got int 0"):
        load(f"imagefolder:{tmp_path}", image_size=0)


def cifar_on_disk(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> np.ndarray:
    """Two small batches in CIFAR's own format, of which torchvision then asks no checksum."""
    from torchvision import datasets

    cls: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    labels_key, classes = ("labels", ["a", "b", "c"]) if name == "cifar10" else ("fine_labels", ["x", "y", "z"])
    for file, part in (("train_file", slice(0, 3)), ("test_file", slice(3, 5))):
        entry = {"data": pixels[part], labels_key: [0, 2, 1, 1, 0][part]}
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / "meta_file").write_bytes(pickle.dumps({cls.meta["key"]: classes}))
    monkeypatch.setattr(cls, "train_list", [["train_file", None]])
    monkeypatch.setattr(cls, "test_list", [["test_file", None]])
    monkeypatch.setattr(cls, "meta", {"filename": "meta_file", "key": cls.meta["key"], "md5": None})
    return pixels.reshape(5, 3, 32, 32)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", ("a", "b", "c")), ("cifar100", ("x", "y", "z"))])
def test_cifar_is_read_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: tuple[str, ...]
) -> None:
    pixels = cifar_on_disk(tmp_path / "data", monkeypatch, name)
    data = load(name, tmp_path / "data")
    assert np.array_equal(data.train_images.numpy(), pixels[:3])
    assert np.array_equal(data.test_images.numpy(), pixels[3:])
    assert data.train_labels.tolist() == [0, 2, 1]
    assert data.test_labels.tolist() == [1, 0]
    assert data.classes == classes
    assert data.train_images.is_contiguous()
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load(name).train_images, data.train_images)


def test_cifar_that_cannot_be_had_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def no_network(self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    message = "load: cifar10 expected the folder .*cifar-10-batches-py of https://.*tar.gz, unpacked, and it could not "
    with pytest.raises(ValueError, match=message + "be downloaded: no network"):
        load("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=message + "be read: Dataset not found or corrupted"):
        load("cifar10", tmp_path)
