"""Images in folders: how they are found, split, labelled and brought to one size, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train._files import write_image

from fastproto.train.data import load


def test_folder_with_train_and_val(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = write_image(tmp_path / "train" / "cat" / "b.png", 8, 12, 1)
    write_image(tmp_path / "train" / "cat" / "deep" / "a.PNG", 8, 8, 2)
    write_image(tmp_path / "train" / "ant" / "1.png", 20, 9, 3)
    write_image(tmp_path / "val" / "cat" / "1.png", 8, 8, 4)
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "train" / ".cache").mkdir()
    write_image(tmp_path / "train" / "cat" / ".checkpoints" / "a.png", 8, 8, 5)
    (tmp_path / "train" / "ant" / "._1.png").write_bytes(b"of another system")
    (tmp_path / "train" / "notes.txt").write_text("no class")
    data = load(f"imagefolder:{tmp_path}", image_size=8)
    assert data.classes == ("ant", "cat")
    assert data.train_labels.tolist() == [0, 1, 1]
    assert caplog.messages == [f"left out of {tmp_path / 'train'}: 1 not named as images, such as cat/Thumbs.db"]
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
        write_image(tmp_path / "x" / f"{i}.{suffix}", 32, 48, i, mode)
    data = load(f"imagefolder:{tmp_path}", image_size=16)
    with Image.open(tmp_path / "x" / f"4.{suffix}") as image:
        reference = image.convert("RGB").crop((8, 0, 40, 32)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(data.test_images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference)).max() <= 1


def test_folder_has_a_default_size_and_survives_constant_channels(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), (255, 0, 51)).save(tmp_path / "x" / f"{i}.png")
    data = load(f"imagefolder:{tmp_path}")
    assert data.train_images.shape == (4, 3, 96, 96)
    assert data.mean == (1.0, 0.0, 0.2)
    assert data.std == (1 / 255, 1 / 255, 1 / 255)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {label: tmp_path / "set" / label for label in ("a", "b")}
    for seed, folder in enumerate((inside["a"], inside["b"] / "deep", tmp_path / "elsewhere" / "more")):
        for n in range(5):
            write_image(folder / f"{n}.png", 4, 4, 5 * seed + n)
    # Twice the same folder is no circle; up, up beyond the set, from one class into the other and back, to itself are.
    for link, target in (
        ("a/linked", "../../elsewhere"),
        ("a/again", "../../elsewhere"),
        ("a/up", "."),
        ("a/linked/more/root", tmp_path.parent),
        ("a/over", "../b"),
        ("b/deep/back", "../../a"),
        ("b/self", "self"),
    ):
        (tmp_path / "set" / link).symlink_to(target)
    (tmp_path / "linked set").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "set", "set", "linked set"):
        data = load(f"imagefolder:{name}", image_size=4)
        counts = torch.cat([data.train_labels, data.test_labels]).bincount().tolist()
        # Both have all fifteen, and those elsewhere twice.
        assert counts == [20, 20]


def test_folder_refuses(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(f"imagefolder:{tmp_path}/set", image_size=8)

    refused("load: imagefolder expected a folder, got .*set, which is not one")
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


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(5):
        write_image(tmp_path / "a" / f"{n}.png", 8, 8)
        write_image(tmp_path / "a" / "locked" / f"{n}.png", 8, 8)
    scandir = os.scandir

    def locked(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    # Permissions themselves do not stop a test that root runs.
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match="locked"):
        load(f"imagefolder:{tmp_path}", image_size=8)


def test_imagenet_is_found_in_the_root_or_in_a_folder_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load: imagenet expected .*train/WNID/\*\.JPEG, .*, got no folder .*train"):
        load("imagenet", tmp_path)
    for inside in ("", "imagenet"):
        for part in ("train", "val"):
            for label in ("n01", "n02"):
                write_image(tmp_path / inside / part / label / "x.JPEG", 20, 30, len(inside))
        data = load("imagenet", tmp_path)
        assert data.classes == ("n01", "n02")
        assert data.train_images.shape == data.test_images.shape == (2, 3, 224, 224)
        small = load("imagenet", tmp_path, image_size=20)
        assert small.train_labels.tolist() == small.test_labels.tolist() == [0, 1]
        with Image.open(tmp_path / inside / "train" / "n01" / "x.JPEG") as image:
            assert np.array_equal(small.train_images[0].permute(1, 2, 0).numpy(), np.asarray(image)[:, 5:25])


def tiny_imagenet(root: Path) -> Path:
    """Three classes of two training and one validation image, as the archive unpacks."""
    folder = root / "tiny-imagenet-200"
    lines = []
    for number, label in enumerate(("n03", "n01", "n02")):
        for i in range(2):
            write_image(folder / "train" / label / "images" / f"{label}_{i}.JPEG", 64, 64)
        (folder / "train" / label / f"{label}_boxes.txt").write_text("no image")
        write_image(folder / "val" / "images" / f"val_{number}.JPEG", 64, 64, number)
        lines.append(f"val_{number}.JPEG\t{label}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_tiny_imagenet_is_read_as_its_archive_unpacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"load: tiny-imagenet expected the folder .*200 of http.*zip, unpacked"):
        load("tiny-imagenet", tmp_path)
    folder = tiny_imagenet(tmp_path)
    data = load("tiny-imagenet", tmp_path)
    assert not caplog.messages  # of the boxes, which belong there
    assert data.classes == ("n01", "n02", "n03")
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.train_images.shape == (6, 3, 64, 64)
    # The class is in the annotations, not in the order of the files.
    with Image.open(folder / "val" / "images" / "val_1.JPEG") as image:
        assert np.array_equal(data.test_images[0].permute(1, 2, 0).numpy(), np.asarray(image))
    annotations = folder / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(f"\n{lines} \n\n")
    assert load("tiny-imagenet", tmp_path).test_labels.tolist() == [0, 1, 2]
    annotations.write_text(f"{lines}val_3.JPEG n01 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"expected FILE and CLASS between tabs, got 'val_3.*' in line 4 of .*txt"):
        load("tiny-imagenet", tmp_path)
    annotations.write_text("")
    with pytest.raises(ValueError, match=r"load: tiny-imagenet expected images of its classes in .*txt, got none"):
        load("tiny-imagenet", tmp_path)


def test_a_class_list_picks_classes(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    for part in ("train", "val"):
        for label in ("a b", "c", "d"):
            write_image(tmp_path / "folder" / part / label / "x.png", 8, 8)
    chosen = tmp_path / "classes.txt"
    chosen.write_text("n03\n\n n01 \n")
    data = load("tiny-imagenet", tmp_path, class_list=chosen)
    assert data.classes == ("n01", "n03")
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    # As Windows writes it.
    chosen.write_bytes(b"\xef\xbb\xbfa b\r\nd")
    data = load(f"imagefolder:{tmp_path}/folder", class_list=chosen)
    assert (data.classes, data.train_labels.tolist(), data.test_labels.tolist()) == (("a b", "d"), [0, 1], [0, 1])
    for text, message in (
        ("c\ne\n", r"class_list expected folders in .*train, got \['e'\] in .*classes.txt"),
        (" \n", "class_list expected a file of class folders, one a line, got .*classes.txt, which is empty"),
    ):
        chosen.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(f"imagefolder:{tmp_path}/folder", class_list=chosen)
    with pytest.raises(ValueError, match=r"class_list expected a file of .*, got nowhere, which is not one"):
        load(f"imagefolder:{tmp_path}/folder", class_list="nowhere")
