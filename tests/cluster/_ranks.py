"""One rank of tests/cluster/test_ranks.py: clusters its share of the rows and saves what it found."""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sklearn.base import clone

from fastproto.cluster import KMeans, PrototypeBank

CENTERS = torch.linspace(-1, 1, 12).view(2, 6)
# Options of the other ranks, and of the last: refused.
APART: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"n_clusters": 3}),
    ({}, {"n_iter": 3}),
    ({}, {"n_init": 2}),
    ({}, {"init": "k-means++"}),
    ({}, {"init": CENTERS}),
    ({"init": CENTERS}, {"init": CENTERS + 1e-6}),
    ({"init": CENTERS}, {"init": CENTERS[:, :5]}),
    ({}, {"spherical": True}),
    ({}, {"tol": 1e-9}),
    ({}, {"max_points_per_cluster": 5}),
    ({"max_points_per_cluster": 9}, {"max_points_per_cluster": 5}),
    ({}, {"empty": "keep"}),
    ({}, {"seed": 1}),
    ({}, {"precision": "fast"}),
]
# Accepted.
ALIKE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"init": CENTERS}, {"init": CENTERS.double().numpy()}),
    ({"seed": 1, "tol": 0}, {"seed": np.int64(1), "tol": 0.0, "spherical": np.bool_(False)}),
    ({}, {"chunk_rows": 7, "device": "cpu"}),
]


def attributes(kmeans: KMeans) -> dict:
    names = ("cluster_centers_", "labels_", "inertia_", "counts_", "concentration_", "history_")
    return {name: getattr(kmeans, name) for name in names}


def refused(run: Callable[[], object]) -> str:
    try:
        run()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def options_refused(cases: list[tuple[dict, dict]], x: torch.Tensor, last: bool) -> list[tuple[str, str]]:
    """Of each case an option of the last rank, and the message that its fit ended in."""
    found = []
    for others, own in cases:
        options = {"n_clusters": 2, "n_iter": 2, **(own if last else others)}
        kmeans = KMeans(**options, process_group=dist.group.WORLD)
        found.append((next(iter(own)), refused(lambda kmeans=kmeans: kmeans.fit(x))))
    return found


def updates_refused(x: torch.Tensor, total: int, last: bool) -> list[str]:
    """The messages that updates ended in: of features, then of banks, that only the last rank has."""
    options = {"num_samples": total, "dim": x.shape[1], "num_prototypes": (2, 3), "n_iter": 2}

    def bank(**own: Any) -> PrototypeBank:
        return PrototypeBank(**options | (own if last else {}), process_group=dist.group.WORLD)

    return [
        refused(lambda: bank().update(x[:, :5] if last else x)),
        refused(lambda: bank().update(x.long() if last else x)),
        refused(lambda: bank().update(x.numpy() if last else x)),
        refused(lambda: bank().update(x.flatten() if last else x)),
        refused(lambda: bank(num_samples=total + 1).update(x)),
        refused(lambda: bank(num_prototypes=(2, 3, 4)).update(x)),
        refused(lambda: bank(temperature=0.1).update(x)),
    ]


def main(folder: Path, rank: int, bounds: list[int]) -> None:
    torch.set_num_threads(1 + rank % 2)
    world = len(bounds) - 1
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    fit_all(folder, rank, bounds)
    dist.destroy_process_group()
    # Gloo's threads end with the last reference to the group: one that outlives the interpreter aborts the process.
    gc.collect()


def fit_all(folder: Path, rank: int, bounds: list[int]) -> None:
    world, group = len(bounds) - 1, dist.group.WORLD
    cases = torch.load(folder / "cases.pt")
    mine = slice(bounds[rank], bounds[rank + 1])
    found = []
    for case in cases["kmeans"]:
        weights = cases["weights"][mine] if case.pop("weighted", False) else None
        rows = cases["x"][mine].to(case.pop("dtype", torch.float32))
        # Copies, as others make of a model that holds one, share its group.
        kmeans = clone(copy.deepcopy(KMeans(**case, process_group=group)))
        found.append(attributes(kmeans.fit(rows, sample_weight=weights)))
    bank = copy.deepcopy(PrototypeBank(len(cases["x"]), cases["x"].shape[1], **cases["bank"], process_group=group))
    bank.update(cases["x"][mine])
    bank.update(-cases["x"][mine])
    x, last = cases["x"][mine], rank == world - 1
    kmeans = KMeans(2, max_points_per_cluster=50, process_group=group)
    errors = [
        refused(lambda: kmeans.fit(cases["broken"][mine])),
        # What only the last rank gives.
        refused(lambda: kmeans.fit(x, sample_weight=-torch.ones(len(x)) if last else None)),
        refused(lambda: kmeans.fit(x[:, :5] if last else x)),
        refused(lambda: kmeans.fit(x.double() if last else x)),
    ]
    some = KMeans(**cases["kmeans"][4], process_group=group).fit(x, sample_weight=torch.ones(len(x)) if last else None)
    result = {"kmeans": found, "bank": bank.state_dict(), "errors": errors, "some": attributes(some)}
    result["updates"] = updates_refused(x, len(cases["x"]), last)
    result |= {"apart": options_refused(APART, x, last), "alike": options_refused(ALIKE, x, last)}
    torch.save(result, folder / f"found_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
