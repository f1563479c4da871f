"""What prototypes and boxes add to an epoch of MoCo: clustering and loss at several K, and the searches for boxes.

    python bench/try_overheads.py imagefolder:PATH --image_size 32 --limit 5120 --encoder.width 16

trains one epoch of each with the prototypes' and the boxes' work in it, and writes MoCo's epoch with what each adds to
it, bench/results/MACHINE/overheads.json. Clustering includes the embedding of all training images, which has a row of
its own too: one forward pass beside an epoch's four, and its two backward ones, each of which costs two.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import Row, Suite, device_name
from report import EPOCH
from torch import Tensor

from fastproto.train import loop
from fastproto.train.build import load_data
from fastproto.train.config import Config, PrototypeConfig, ViewConfig, config_parser, parse, resolve
from fastproto.train.data import Dataset
from fastproto.train.files import read_log

STEP = ("views", "forward", "loss", "backward")


def last_epoch(config: Config, dataset: Dataset) -> dict[str, float]:
    """Seconds by phase of the last epoch of a run."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, dataset, Path(folder))
        row = read_log(Path(folder))[-1]
    return {name.removeprefix("time/"): value for name, value in row.items() if name.startswith("time/")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="as for fastproto train: digits, cifar10, imagefolder:PATH")
    parser.add_argument("--k", type=int, nargs="+", default=[250, 500, 1000], help="prototypes")
    parser.add_argument("--methods", nargs="+", default=["pcl", "pauc", "spcl"], help="beside moco")
    options, rest = parser.parse_known_args()
    settings = config_parser()
    config = resolve(settings, parse(settings, ["--data", options.data, *rest]))
    config = replace(config, epochs=2, crop="random", views=ViewConfig(box_warmup=1, box_interval=1))
    dataset = load_data(config)
    embed_all, embedding = loop.embed_all, 0.0

    def timed(*args: Any, **options: Any) -> Tensor:
        nonlocal embedding
        began = time.perf_counter()
        found = embed_all(*args, **options)
        embedding = time.perf_counter() - began
        return found

    loop.embed_all = timed
    loop.evaluate = lambda encode, dataset, **options: {"knn20": 0.0, "knn200": 0.0}  # type: ignore[assignment]

    moco = last_epoch(replace(config, method="moco"), dataset)
    epoch = sum(moco[name] for name in STEP)
    # Seconds an epoch, with more than MoCo's.
    seconds = {"moco": epoch}
    boxes = last_epoch(replace(config, method="moco", crop="contrastive"), dataset)["clustering"]
    # CIFAR's schedule: boxes before epochs 100, 200, 300 and 400 of 500 (ContrastiveCrop, arXiv 2202.03278, section 4).
    seconds["boxes 4 times in 500 epochs"] = epoch + 4 * boxes / 500
    for method in options.methods:
        for k in options.k:
            chosen = PrototypeConfig(num=(k,), warmup=1)
            of = last_epoch(replace(config, method=method, prototypes=chosen), dataset)
            seconds[f"clustering and loss of {method}, K {k}"] = epoch - moco["loss"] + of["clustering"] + of["loss"]
    seconds["the embedding of all images alone"] = epoch + embedding
    suite = Suite("overheads")
    encoder = f"{config.encoder.name} of width {config.encoder.width}"
    shape = f"{len(dataset.train_images)} x 3 x {config.image_size}^2, {encoder}"
    for name, value in seconds.items():
        row = Row(
            work=EPOCH, method=name, shape=shape, dtype=config.precision, device=device_name("cpu"),
            median_ms=1e3 * value, ours_is_faster=value / epoch,
        )  # fmt: skip
        suite.rows.append(row)
        print(f"{name:<40}{value:8.2f} s   {value / epoch - 1:+.2%}")
    suite.write()


if __name__ == "__main__":
    main()
