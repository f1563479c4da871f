"""Data sets in memory: the digits byte for byte, what torchvision reads, and what names are refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastproto.train.data import Dataset, load
from fastproto.train.data.digits import _enlarge
from fastproto.train.evaluate import evaluate

PICTURES = "4ba18a74b5a247aad8239a0200176a9ace6ba685cad1f1c34c75c6419fce8775"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


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
    got = _enlarge(image.numpy(), size)
    expected = torch.nn.functional.interpolate(
        image[None, None].double(), (size, size), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(got / (2 * size) ** 2, expected[0, 0].numpy(), atol=1e-12)


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


def stl10_on_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A few images of each part in STL-10's own format, columns first, without checksums."""
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    pixels = {}
    for seed, (part, labels) in enumerate((("train", [1, 3, 2]), ("unlabeled", None), ("test", [2, 1]))):
        count = 4 if labels is None else len(labels)
        pixels[part] = np.random.default_rng(seed).integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (folder / f"{part}_X.bin").write_bytes(pixels[part].transpose(0, 1, 3, 2).tobytes())
        if labels is not None:
            (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, files, [[name, None] for name, _ in getattr(STL10, files)])
    return pixels


def test_stl10_trains_on_the_unlabelled_too_and_evaluates_on_the_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = stl10_on_disk(tmp_path, monkeypatch)
    data = load("stl10", tmp_path)
    assert np.array_equal(data.train_images.numpy(), np.concatenate([pixels["train"], pixels["unlabeled"]]))
    assert data.train_labels.tolist() == [0, 2, 1, -1, -1, -1, -1]
    assert np.array_equal(data.test_images.numpy(), pixels["test"])
    assert data.test_labels.tolist() == [1, 0]
    assert data.classes == ("airplane", "bird", "car")
    labelled = Dataset("labelled", data.train_images[:3], data.train_labels[:3], *data_after_training(data))
    assert evaluate(corners, data) == evaluate(corners, labelled)


def data_after_training(data: Dataset) -> tuple[Any, ...]:
    return data.test_images, data.test_labels, data.classes, data.mean, data.std


def corners(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, ::19, ::19].flatten(1)


@pytest.mark.parametrize(
    ("name", "class_name", "folder"),
    [("cifar10", "CIFAR10", "cifar-10-batches-py"), ("stl10", "STL10", "stl10_binary")],
)
def test_what_cannot_be_had_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, class_name: str, folder: str
) -> None:
    from torchvision import datasets

    def no_network(self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(getattr(datasets, class_name), "download", no_network)
    message = rf"load: {name} expected the folder .*{folder} of https?://.*tar.gz, unpacked, and it could not "
    with pytest.raises(ValueError, match=message + "be downloaded: no network"):
        load(name, tmp_path / "nothing")
    (tmp_path / "other" / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=message + "be read: Dataset not found or corrupted"):
        load(name, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [folder]


@pytest.mark.parametrize("name", ["", "mnist", "imagefolder:", "imagefolder", "shards:", "Digits", "cifar10:x"])
def test_unknown_names_are_refused(name: str) -> None:
    known = "digits, cifar10, cifar100, stl10, tiny-imagenet, imagenet, imagefolder:PATH or shards:PATTERN"
    with pytest.raises(ValueError, match=f"load: name expected {known}, got '{name}'"):
        load(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size expected an integer of at least 1, got int 0"),
        ({"image_size": 1.5}, "image_size expected an integer of at least 1, got float 1.5"),
        ({"workers": -1}, "workers expected an integer of at least 0, got int -1"),
        ({"image_size": 32}, "image_size expected none: the images of digits have a size of their own, views.size is"),
        ({"resident": False}, "resident expected true or none: digits is kept in memory, got bool False"),
        ({"class_list": Path("x")}, "class_list expected none: only folders have one, got "),
        ({"test_shards": "x.tar"}, "test_shards expected none: only shards have them, got x.tar"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"load: {message}"):
        load("digits", **options)
