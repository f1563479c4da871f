"""The data sets that torchvision reads, and downloads where they are missing."""

from __future__ import annotations

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

    Raises:
        ValueError: the data are not in ``root``, or damaged, and cannot be downloaded.
    """
    from torchvision import datasets

    class_name, *selections = DOWNLOADS[name]
    make: Any = getattr(datasets, class_name)
    folder = root / make.base_folder
    missing = not folder.is_dir()
    try:
        parts = [make(root, download=missing, **selection) for selection in selections]
    # No network, no permission, a file cut short: torchvision and the network below it raise many kinds.
    except Exception as error:
        raise ValueError(
            f"load: {name} expected the folder {folder} of {make.url}, unpacked, "
            f"and it could not be {'downloaded' if missing else 'read'}: {error}"
        ) from error
    train, test = (_arrays(part) for part in parts)
    return train, test, tuple(parts[0].classes)


def _arrays(part: Any) -> Arrays:
    # CIFAR comes as (N, H, W, 3).
    images = part.data.transpose(0, 3, 1, 2) if part.data.shape[3] == 3 else part.data
    labels = part.targets if hasattr(part, "targets") else part.labels
    return np.ascontiguousarray(images), np.array(labels, dtype=np.int64)
