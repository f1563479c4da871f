"""Images in folders, one folder per class: any such folders, ImageNet, Tiny ImageNet."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastproto._check import expect
from fastproto.train.data.dataset import Encoded
from fastproto.views.files import read_content

log = logging.getLogger("fastproto")

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

Split = tuple[Encoded, Encoded, tuple[str, ...]]  # for training, for testing, names of the classes


class FolderFiles:
    """Image files under a folder; their names are bytes in one array, which worker processes share."""

    def __init__(self, folder: Path, names: np.ndarray) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.folder / os.fsdecode(self.names[index]))

    def read(self, index: int) -> tuple[bytes, str]:
        return read_content(self.name(index)), self.name(index)

    def take(self, ids: np.ndarray) -> FolderFiles:
        return FolderFiles(self.folder, self.names[ids])

    def key(self) -> bytes:
        return self.names.tobytes()


def image_folder(folder: Path, class_list: Path | None = None) -> Split:
    """``folder/train/CLASS/*`` with ``test`` or ``val`` beside it, or ``folder/CLASS/*``; raises as ``load`` does."""
    expect(folder.is_dir(), "load", "imagefolder", "a folder", f"{folder}, which is not one")
    if (folder / "train").is_dir():
        tests = [folder / part for part in ("test", "val") if (folder / part).is_dir()]
        expect(bool(tests), "load", "imagefolder", f"{folder / 'test'} or {folder / 'val'}", "neither")
        return _two_folders(folder / "train", tests[0], class_list)
    files = _files_by_class(folder, class_list, tell=True)
    train = {label: [name for i, name in enumerate(names) if i % 5 != 4] for label, names in files.items()}
    test = {label: names[4::5] for label, names in files.items()}
    expect(any(test.values()), "load", "imagefolder", "at least 5 images in a class", f"fewer in all of {folder}")
    return _encoded(folder, train, train), _encoded(folder, test, train), tuple(train)


def imagenet(root: Path, class_list: Path | None = None) -> Split:
    """``train/WNID/*`` and ``val/WNID/*`` in ``root/imagenet`` or in ``root``; raises as ``load`` does."""
    folder = root / "imagenet" if (root / "imagenet").is_dir() else root
    for part in ("train", "val"):
        wanted = f"{folder / part}/WNID/*.JPEG, the images of ILSVRC2012 from https://image-net.org in folders by class"
        expect((folder / part).is_dir(), "load", "imagenet", wanted, f"no folder {folder / part}")
    return _two_folders(folder / "train", folder / "val", class_list)


def tiny_imagenet(root: Path, class_list: Path | None = None) -> Split:
    """``root/tiny-imagenet-200`` as its archive unpacks; the validation images' classes are in a file beside them."""
    folder = root / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    there = (folder / "train").is_dir() and annotations.is_file()
    expect(there, "load", "tiny-imagenet", f"the folder {folder} of {TINY_IMAGENET}, unpacked", "none, or a part of it")
    train = _files_by_class(folder / "train", class_list)
    test: dict[str, list[str]] = {label: [] for label in train}
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{line!r} in line {number} of {annotations}"
        expect("\t" in line, "load", "tiny-imagenet", "FILE and CLASS between tabs", where)
        name, label, *_ = line.split("\t")
        if label in test:
            test[label].append(f"images/{name}")
    expect(any(test.values()), "load", "tiny-imagenet", f"images of its classes in {annotations}", "none")
    return _encoded(folder / "train", train, train), _encoded(folder / "val", test, train), tuple(train)


def _two_folders(train_folder: Path, test_folder: Path, class_list: Path | None) -> Split:
    train, test = (_files_by_class(folder, class_list, tell=True) for folder in (train_folder, test_folder))
    unknown = sorted(test.keys() - train.keys())
    expect(not unknown, "load", "imagefolder", f"the classes of {train_folder}", f"{test_folder} with {unknown}")
    return _encoded(train_folder, train, train), _encoded(test_folder, test, train), tuple(train)


def _files_by_class(folder: Path, class_list: Path | None, *, tell: bool = False) -> dict[str, list[str]]:
    """The image files under each subfolder, or under those of the list, as paths within ``folder``, all in order.

    ``tell`` warns of what else is there.
    """
    labels = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    expect(bool(labels), "load", "imagefolder", "a folder per class", f"none in {folder}")
    if class_list is not None:
        chosen = _read_class_list(class_list)
        missing = sorted(chosen - set(labels))
        expect(not missing, "load", "class_list", f"folders in {folder}", f"{missing[:3]} in {class_list}")
        labels = sorted(chosen)
    files: dict[str, list[str]] = {}
    others: list[str] = []
    for label in labels:
        images, rest = _files_under(folder, label)
        expect(bool(images), "load", "imagefolder", "images in every class", f"none in {folder / label}")
        files[label] = images
        others += rest
    if others and tell:
        log.warning("left out of %s: %d not named as images, such as %s", folder, len(others), others[0])
    return files


def _read_class_list(file: Path) -> set[str]:
    expect(file.is_file(), "load", "class_list", "a file of class folders, one a line", f"{file}, which is not one")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"load: class_list expected text in UTF-8, got {file}: {error}") from error
    classes = {line.strip() for line in lines} - {""}
    expect(bool(classes), "load", "class_list", "a file of class folders, one a line", f"{file}, which is empty")
    return classes


def _files_under(folder: Path, label: str) -> tuple[list[str], list[str]]:
    """The files that are named as images, in order, and the others; of neither those that are hidden."""
    # A million files: os.walk asks the directories alone.
    images: list[str] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder / label, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and not _circles(Path(place, name))]
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in names:
            if name[0] != ".":
                (images if name.lower().endswith(IMAGE_SUFFIXES) else others).append(f"{inside}/{name}")
    return sorted(images), sorted(others)


def _circles(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.absolute().parents)


def _refuse(error: OSError) -> None:
    """A folder that cannot be read is not to look like an empty one."""
    raise error


def _encoded(folder: Path, files: Mapping[str, Sequence[str]], classes: Mapping[str, object]) -> Encoded:
    """The files of all classes in order, with the place of their class among ``classes``."""
    number = {label: place for place, label in enumerate(classes)}
    names = np.array([os.fsencode(name) for part in files.values() for name in part])
    labels = np.repeat([number[label] for label in files], [len(part) for part in files.values()])
    return FolderFiles(folder, names), labels.astype(np.int64)
