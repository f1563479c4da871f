"""Data sets by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from fastproto._check import expect, is_integer
from fastproto.train.data.dataset import Dataset, from_arrays, from_files
from fastproto.train.data.digits import digits
from fastproto.train.data.downloads import DOWNLOADS, download
from fastproto.train.data.folders import image_folder, imagenet, tiny_imagenet
from fastproto.train.data.shards import image_shards

# Sides of squares where none is asked for.
SIDES = {"tiny-imagenet": 64, "imagenet": 224}
SIDE = 96


def load(
    name: str,
    root: Path | str | None = None,
    *,
    image_size: int | None = None,
    class_list: Path | str | None = None,
    test_shards: str | None = None,
    resident: bool | None = None,
    workers: int = 0,
    strict: bool = False,
    gpu_decode: bool = False,
) -> Dataset:
    """Loads a data set by name.

    Args:
        name: one of

            - ``"digits"``: scikit-learn's 1797 handwritten digits, each at a random place and size on a crop of a
              photograph, 40 x 40 in colour. Needs no download; the same pictures on every machine.
            - ``"cifar10"``, ``"cifar100"``, ``"stl10"``: read by torchvision from ``root``, downloaded into it where
              missing. Of stl10 all of "train" and "unlabeled" is for training; only "train" has labels.
            - ``"tiny-imagenet"``: the folder tiny-imagenet-200 in ``root``.
            - ``"imagenet"``: ``train/WNID/*`` and ``val/WNID/*`` in ``root`` or in its folder imagenet.
            - ``"imagefolder:PATH"``: ``PATH/train/CLASS/*`` with ``PATH/test/CLASS/*`` or ``PATH/val/CLASS/*``; or
              ``PATH/CLASS/*``, of which every fifth image of a class, in order of names, is for testing.
            - ``"shards:PATTERN"``: tar files of KEY.jpg (or .png and so on) and KEY.cls, the number of its class, as
              WebDataset writes them. The pattern has ``*``, ``?``, ``{a,b}`` and ``{000..127}``.
        root: where data sets lie; ``./data`` by default.
        image_size: side of the squares that images in files are brought to, the shorter side first, the centre kept,
            when they are kept in memory, evaluated or clustered; None: 64 for tiny-imagenet, 224 for imagenet, else 96.
            The other data sets have a size of their own.
        class_list: file of the class folders to take, one a line; with tiny-imagenet, imagenet and imagefolder.
        test_shards: pattern of the shards for testing; None: every fifth image that has a label.
        resident: whether the squares of images in files are kept in memory, which is faster, or the files are read
            again in every epoch, each image at its own size; None: in memory where they take no more than 4 GiB.
        workers: processes that decode.
        strict: refuse a file that does not decode. Otherwise it is skipped with a warning: left out of what is kept in
            memory; of what is read again in every epoch, the next image stands in for it. A shard without the mark that
            ends a tar, as one cut between two members, likewise: it is refused, or warned of and counted.
        gpu_decode: JPEG files that are read again in every epoch are decoded by the GPU that they are wanted on, as far
            as they are whole, upright and RGB in JFIF; where colour is stored at half the resolution, the pixels differ
            from those that ``workers`` decode, which they do with all other files.

    Raises:
        ValueError: an unknown name; a folder, list or shard that is missing or not laid out as it should be; a class
            for testing that is not in training; with ``strict`` a file that does not decode; where all or 100 in a
            row do not, also without; data neither there nor to be had.

    Example:
        >>> data = load("digits")
        >>> data.train_images.shape, data.test_images.shape, data.classes[:3]
        (torch.Size([1437, 3, 40, 40]), torch.Size([360, 3, 40, 40]), ('0', '1', '2'))
    """
    folder = Path("data") if root is None else Path(root)
    class_list = None if class_list is None else Path(class_list)
    kind, _, place = name.partition(":") if isinstance(name, str) else ("", "", "")
    in_folders = kind in ("tiny-imagenet", "imagenet", "imagefolder")
    good = image_size is None or (is_integer(image_size) and image_size >= 1)
    expect(good, "load", "image_size", "an integer of at least 1", image_size)
    expect(is_integer(workers) and workers >= 0, "load", "workers", "an integer of at least 0", workers)
    expect(class_list is None or in_folders, "load", "class_list", "none: only folders have one", str(class_list))
    expect(test_shards is None or kind == "shards", "load", "test_shards", "none: only shards have them", test_shards)
    if name == "digits" or name in DOWNLOADS:
        own = f"none: the images of {name} have a size of their own, views.size is that of their views"
        expect(image_size is None, "load", "image_size", own, image_size)
        expect(resident is not False, "load", "resident", f"true or none: {name} is kept in memory", resident)
    if name == "digits":
        return from_arrays(name, *digits())
    if name in DOWNLOADS:
        return from_arrays(name, *download(name, folder))
    cut = 0
    if name == "tiny-imagenet":
        found = tiny_imagenet(folder, class_list)
    elif name == "imagenet":
        found = imagenet(folder, class_list)
    elif kind == "imagefolder" and place:
        found = image_folder(Path(place), class_list)
    elif kind == "shards" and place:
        found, cut = image_shards(place, test_shards, workers=workers, strict=strict)
    else:
        known = f"digits, {', '.join(DOWNLOADS)}, tiny-imagenet, imagenet, imagefolder:PATH or shards:PATTERN"
        raise ValueError(f"load: name expected {known}, got {name!r}")
    side = image_size or SIDES.get(name, SIDE)
    data = from_files(name, *found, side=side, resident=resident, workers=workers, strict=strict, gpu_decode=gpu_decode)
    files, labels = found[0]
    digest = hashlib.sha256(files.key() + labels.tobytes()).hexdigest()[:16]
    return replace(data, left_out=data.left_out + cut, digest=digest)
