"""One rank of tests/cluster/test_ranks.py: clusters its share of the rows and saves what it found."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fastproto.cluster import KMeans, PrototypeBank


def attributes(kmeans: KMeans) -> dict:
    names = ("cluster_centers_", "labels_", "inertia_", "counts_", "concentration_", "history_")
    return {name: getattr(kmeans, name) for name in names}


def refused(run: Callable[[], object]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


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
        found.append(attributes(KMeans(**case, process_group=group).fit(rows, sample_weight=weights)))
    bank = PrototypeBank(len(cases["x"]), cases["x"].shape[1], **cases["bank"], process_group=group)
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
    torch.save(result, folder / f"found_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
