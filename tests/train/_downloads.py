"""Processes of tests/train/test_downloads.py: load cifar10, which a slow downloader brings, and say what they got."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10

from fastproto.train.data import load

PARTS = {"train_file": [0, 2, 1], "test_file": [1, 0]}


def download(self: Any) -> None:
    """In the place of torchvision's: file after file, where they are not all there; each time leaves a line."""
    folder = Path(self.root, self.base_folder)
    if all((folder / file).exists() for file in (*PARTS, "meta_file")):
        return
    with open(Path(self.root, "downloads"), "a") as file:
        file.write("once\n")
    folder.mkdir(exist_ok=True)
    (folder / "meta_file").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}))
    for file, labels in PARTS.items():
        time.sleep(0.5)
        pixels = np.full((len(labels), 3072), 7, dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))


def without_network(patch: Any) -> None:
    """Has torchvision download so, and ask for no checksums."""
    patch(CIFAR10, "download", download)
    patch(CIFAR10, "train_list", [["train_file", None]])
    patch(CIFAR10, "test_list", [["test_file", None]])
    patch(CIFAR10, "meta", {"filename": "meta_file", "key": "label_names", "md5": None})


def load_and_say(root: Path) -> None:
    data = load("cifar10", root)
    print(f"{data.train_labels.tolist()} {data.test_labels.tolist()} {data.train_images.unique().tolist()}\n", end="")


if __name__ == "__main__":
    without_network(setattr)
    # Forked, as the imports take longer than the test.
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=load_and_say, args=(Path(sys.argv[1]),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
