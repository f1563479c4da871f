"""What a warm start saves: clusters the features of one epoch cold, those of the next cold and from the last centres.

    python bench/try_warm_start.py imagefolder:PATH --epochs 3 --k 1000

trains the encoder of a PCL run for real, and prints distances computed, objective and seconds of each fit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from fastproto.cluster import KMeans
from fastproto.train.build import load_data
from fastproto.train.config import Config, config_parser, parse, resolve
from fastproto.train.loop import Interrupted, embed_all, train
from fastproto.train.run import load_run


def features_by_epoch(config: Config, epochs: int) -> list[Tensor]:
    """Features (N, D) of the training images after the last two of so many epochs."""
    dataset, found = load_data(config), []
    steps = len(dataset.train_images) // config.batch_size
    with tempfile.TemporaryDirectory() as folder:
        for epoch in (epochs - 1, epochs):
            stops = iter(range(steps * (epoch if not found else 1) - 1))
            try:
                # Asked after every step: stops after the last of the epoch.
                train(config, dataset, Path(folder), resume=bool(found), stop=lambda s=stops: next(s, None) is None)
            except Interrupted:
                method = load_run(folder).method
                found.append(method.cluster_space(embed_all(method.embed, dataset, torch.device("cpu"))).detach())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="as for fastproto train: digits, cifar10, imagefolder:PATH")
    parser.add_argument("--epochs", type=int, default=3, help="epochs before the second clustering")
    parser.add_argument("--k", type=int, default=1000, help="clusters")
    options, rest = parser.parse_known_args()
    settings = config_parser()
    run = ["--method", "pcl", "--data", options.data, "--epochs", str(options.epochs + 1)]
    config = resolve(settings, parse(settings, [*run, *rest]))
    before, after = features_by_epoch(config, options.epochs)
    print(f"{len(after)} x {after.shape[1]}, one epoch moves a row by {(after - before).norm(dim=1).mean():.3f} "
          f"of {after.norm(dim=1).mean():.3f}")  # fmt: skip
    centers = KMeans(options.k, n_iter=20).fit(before).cluster_centers_
    full = len(after) * options.k
    print("20 iterations and the last assignment without bounds: 21 x N K")
    fits: dict[str, dict] = {
        "cold, 20 iterations": {"n_iter": 20},
        "warm, 20 iterations": {"n_iter": 20, "init": centers},
        **{f"warm, {n} iterations": {"n_iter": n, "init": centers} for n in (2, 3, 5, 8)},
    }
    for name, settings in fits.items():
        begin = time.perf_counter()
        fit = KMeans(options.k, **settings).fit(after)
        seconds = time.perf_counter() - begin
        share = fit.n_distances_ / full
        print(f"{name:<22} objective {fit.inertia_:.6g}   distances {share:6.2f} x N K   {seconds:.2f} s")


if __name__ == "__main__":
    main()
