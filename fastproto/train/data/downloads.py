"""The data sets that torchvision reads, and downloads where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastproto.train.data.dataset import Arrays

# Class of torchvision.datasets, and what selects its training and its testing part.
DOWNLOADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    # torchvision gives the unlabelled images the label -1.
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}),
}


def download(name: str, root: Path) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Images and labels for training, the same for testing, and the names of the classes.

    Of several processes one downloads what is missing; the others wait, then read.

    Raises:
        ValueError: the data are not in ``root``, or damaged, and cannot be downloaded.
    """
    from torchvision import datasets

    class_name, *selections = DOWNLOADS[name]
    make: Any = getattr(datasets, class_name)
    folder, mark = root / make.base_folder, root / f".{name}.download"
    missing = not folder.is_dir() or mark.exists()
    try:
        if missing:
            root.mkdir(parents=True, exist_ok=True)
            _fetch(lambda: make(root, download=True, **selections[0]), mark)
        parts = [make(root, **selection) for selection in selections]
    # No network, no permission, a file cut short: torchvision and the network below it raise many kinds.
    except Exception as error:
        if not folder.is_dir():
            mark.unlink(missing_ok=True)  # nothing lies there that could be half a data set
        raise ValueError(
            f"load: {name} expected the folder {folder} of {make.url}, unpacked, "
            f"and it could not be {'downloaded' if missing else 'read'}: {error}"
        ) from error
    train, test = (_arrays(part) for part in parts)
    return train, test, tuple(parts[0].classes)


def _fetch(make: Callable[[], object], mark: Path) -> None:
    """Calls ``make`` in the first process that comes, and has the others wait.

    The file ``mark`` is there from before the download until after it: left over, it says that one was cut short.
    """
    import fcntl

    with open(mark, "w") as file:
        # Some file systems have no locks.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if mark.exists():
            make()
            mark.unlink(missing_ok=True)


def _arrays(part: Any) -> Arrays:
    # CIFAR comes as (N, H, W, 3).
    images = part.data.transpose(0, 3, 1, 2) if part.data.shape[3] == 3 else part.data
    labels = part.targets if hasattr(part, "targets") else part.labels
    return np.ascontiguousarray(images), np.array(labels, dtype=np.int64)
