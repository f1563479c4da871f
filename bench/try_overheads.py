"""What prototypes and boxes add to an epoch: PCL beside MoCo at several K, one search for boxes beside an epoch.

    python bench/try_overheads.py imagefolder:PATH --image_size 32 --limit 5120 --encoder.width 16

trains one epoch of each with the prototypes' and the boxes' work in it, and prints their seconds and shares of it.
Clustering includes the embedding of all training images.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

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
    options, rest = parser.parse_known_args()
    settings = config_parser()
    config = resolve(settings, parse(settings, ["--data", options.data, *rest]))
    config = replace(config, epochs=2, crop="random", views=ViewConfig(box_warmup=1, box_interval=1))
    dataset = load_data(config)
    loop.evaluate = lambda encode, dataset, **options: {"knn20": 0.0, "knn200": 0.0}  # type: ignore[assignment]

    moco = last_epoch(replace(config, method="moco"), dataset)
    epoch = sum(moco[name] for name in STEP)
    print(f"moco, an epoch of {len(dataset.train_images)}: {epoch:.2f} s, of which loss {moco['loss']:.2f} s")
    boxes = last_epoch(replace(config, method="moco", crop="contrastive"), dataset)["clustering"]
    # CIFAR's schedule: boxes before epochs 100, 200, 300 and 400 of 500 (ContrastiveCrop, arXiv 2202.03278, section 4).
    print(f"boxes of all images: {boxes:.2f} s; 4 times in 500 epochs {4 * boxes / (500 * epoch):.2%} of the run")
    for k in options.k:
        chosen = PrototypeConfig(num=(k,), warmup=1)
        pcl = last_epoch(replace(config, method="pcl", prototypes=chosen), dataset)
        more = pcl["clustering"] + pcl["loss"] - moco["loss"]
        print(
            f"pcl, K {k}: clustering {pcl['clustering']:.2f} s, loss {pcl['loss']:.2f} s, "
            f"together {more / epoch:.1%} of moco's epoch more"
        )


if __name__ == "__main__":
    main()
