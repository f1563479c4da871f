"""Clustering over ranks: gloo processes with unequal shares find the very bits of this process with all rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastproto.cluster import KMeans, PrototypeBank

ROWS, DIM = 1307, 6
CASES = [
    {"n_clusters": 9, "n_iter": 12, "tol": 1e-3},
    {"n_clusters": 9, "n_iter": 3, "init": "k-means++", "n_init": 2, "weighted": True, "seed": 1},
    {"n_clusters": 20, "n_iter": 3, "init": "k-means++", "chunk_rows": 200, "dtype": torch.float16},
    {"n_clusters": 9, "n_iter": 3, "init": "k-means++", "spherical": True, "dtype": torch.float64, "weighted": True},
    {"n_clusters": 9, "n_iter": 3, "max_points_per_cluster": 10, "chunk_rows": 33, "spherical": True, "seed": 3},
    # Most clusters are empty at first.
    {
        "n_clusters": 60,
        "n_iter": 5,
        "init": torch.cat([torch.linspace(-1, 1, 30).view(5, 6), torch.full((55, 6), 50.0)]),
    },
]


@pytest.mark.parametrize("bounds", [[0, ROWS], [0, 420, ROWS], [0, 0, 751, ROWS]])
def test_ranks_find_the_bits_of_one_process(
    tmp_path: Path, bounds: list[int], no_gloo_threads: dict[str, str]
) -> None:
    x, weights = torch.randn(ROWS, DIM) * torch.logspace(-2, 2, ROWS)[:, None], torch.rand(ROWS)
    broken = x.clone()
    broken[250] = torch.nan
    bank = {"num_prototypes": (4, 9), "n_iter": 3}
    torch.save({"x": x, "weights": weights, "broken": broken, "kmeans": CASES, "bank": bank}, tmp_path / "cases.pt")
    command = [sys.executable, str(Path(__file__).parent / "_ranks.py"), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), json.dumps(bounds)], env=no_gloo_threads, stderr=subprocess.PIPE, text=True
        )
        for rank in range(len(bounds) - 1)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    found = [torch.load(tmp_path / f"found_{rank}.pt") for rank in range(len(ranks))]

    for index, case in enumerate(CASES):
        options = {name: value for name, value in case.items() if name not in ("weighted", "dtype", "chunk_rows")}
        rows = x.to(case.get("dtype", torch.float32))
        single = KMeans(**options).fit(rows, sample_weight=weights if "weighted" in case else None)
        alike = [rank["kmeans"][index] for rank in found]
        assert torch.equal(torch.cat([one["labels_"] for one in alike]), single.labels_)
        for one in alike:
            assert torch.equal(one["cluster_centers_"], single.cluster_centers_)
            assert torch.equal(one["concentration_"], single.concentration_)
            assert torch.equal(one["counts_"], single.counts_)
            assert one["history_"] == single.history_
            assert one["inertia_"] == single.inertia_

    expected = PrototypeBank(ROWS, DIM, **bank)
    expected.update(x)
    expected.update(-x)
    for rank in found:
        for name, tensor in expected.state_dict().items():
            assert torch.equal(rank["bank"][name], tensor)
    for number, rank in enumerate(found):
        infinite, negative, narrow, double = rank["errors"]
        assert "got 1 with NaN or infinity, the first at index 250" in infinite
        last, alone = number == len(found) - 1, len(found) == 1
        assert ("finite weights of at least 0, got" if last else "others on another rank") in negative
        assert alone or "x expected as many dimensions on every rank, got 5 to 6" in narrow
        assert alone or "x expected as many bytes of a number on every rank, got 4 to 8" in double
        assert torch.equal(rank["some"]["cluster_centers_"], found[0]["some"]["cluster_centers_"])
        for name, message in rank["apart"]:
            assert alone or message.startswith(f"KMeans.fit: {name} expected the same on every rank, got ")
        assert not any(message for _, message in rank["alike"])
        features, banks = rank["updates"][:4], rank["updates"][4:]
        for message, own in zip(features, ("got float32", "got int64", "array", "got float32"), strict=True):
            assert message.startswith("PrototypeBank.update: features expected ")
            assert (own if last else "others on another rank") in message
        for message, name in zip(banks, ("num_samples", "num_prototypes", "temperature"), strict=True):
            assert alone or message.startswith(f"PrototypeBank.update: {name} expected the same on every rank, got ")
