"""k-means on the CPU: the nearest of many vectors, the nearest few, a whole fit; against faiss-cpu and eager PyTorch.

Operations of an assignment or a search: 2 N K D. The floor is that of float32 multiply-adds; a screen in narrower
numbers may pass it.
"""

from __future__ import annotations

import pytest
import torch
from harness import Suite, Work
from torch import Tensor
from torch.nn.functional import normalize

from fastproto.cluster import KMeans, faiss_compat, kmeans_assign

faiss = pytest.importorskip("faiss")

D = 128


def eager(x: Tensor, centers: Tensor) -> Tensor:
    """Chunks of rows against all centres, as one writes it: not exact, float32 products."""
    half = centers.square().sum(1) / 2
    return torch.cat([torch.addmm(half, part, centers.T, alpha=-1).argmin(1) for part in x.split(4096)])


def rows(kind: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows and centres; clustered ones lie three standard deviations of their cluster apart."""
    x, centers = torch.randn(n, D), torch.randn(k, D)
    match kind:
        case "gaussian":
            return x, centers
        case "unit":
            return normalize(x), normalize(centers)
        case "offset":
            return x + 100, centers + 100
        case "heavy tails":
            return x / torch.rand(n, 1), centers / torch.rand(k, 1)
        case "near-duplicates":
            centers = centers[: k // 64].repeat(64, 1) + 1e-4 * centers
            return centers[torch.randint(k, (n,))] + 1e-4 * x, centers
    return centers[torch.randint(k, (n,))] + 0.33 * x, centers + 0.1 * torch.randn(k, D)


@pytest.mark.parametrize("kind", ["gaussian", "clustered"])
def test_assign(suite: Suite, benchmark, kind: str) -> None:
    n, k = 100_000, 4096
    x, centers = rows(kind, n, k)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(D)
    index.add(centers.numpy())
    methods = {
        "fastproto": lambda: kmeans_assign(x, centers),
        "faiss-cpu": lambda: index.search(x.numpy(), 1),
        "eager": lambda: eager(x, centers),
    }
    work = Work(f"assign, {kind}", f"{n} x {D} to {k}", "float32", "cpu", bytes=4 * D * (n + k), flop=2 * n * k * D)
    suite.compare(work, methods, seconds=10)
    benchmark.pedantic(methods["fastproto"], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("kind", ["gaussian", "clustered", "unit", "offset", "heavy tails", "near-duplicates"])
def test_labels_are_those_of_float64(benchmark, kind: str) -> None:
    """Of rows all over a large assignment; where two distances are one as float32, of the lower index."""
    x, centers = rows(kind, 100_000, 4096)
    labels = benchmark.pedantic(lambda: kmeans_assign(x, centers)[0], rounds=3, warmup_rounds=1)
    wide = centers.double()
    for row, label in zip(x[::101].double(), labels[::101], strict=True):
        assert (row - wide).square().sum(1).float().argmin() == label


@pytest.mark.parametrize("count", [5, 20, 200])
def test_search(suite: Suite, benchmark, count: int) -> None:
    """Neighbours of embeddings of unit length, as for a graph or a vote."""
    n, k = 10_000, 50_000
    x, vectors = (normalize(torch.randn(size, D)) for size in (n, k))
    faiss.omp_set_num_threads(torch.get_num_threads())
    theirs, ours = faiss.IndexFlatL2(D), faiss_compat.IndexFlatL2(D)
    for index in (theirs, ours):
        index.add(vectors.numpy())

    def by_hand() -> None:
        half = vectors.square().sum(1) / 2
        for part in x.split(1024):
            torch.addmm(half, part, vectors.T, alpha=-1).topk(count, largest=False)

    methods = {
        "fastproto": lambda: ours.search(x.numpy(), count),
        "faiss-cpu": lambda: theirs.search(x.numpy(), count),
        "eager": by_hand,
    }
    shape = f"{n} x {D} among {k}"
    work = Work(f"search, nearest {count}", shape, "float32", "cpu", bytes=4 * D * (n + k), flop=2 * n * k * D)
    suite.compare(work, methods, seconds=10)
    benchmark.pedantic(methods["fastproto"], rounds=1)


@pytest.mark.parametrize("kind", ["gaussian", "clustered"])
def test_fit(suite: Suite, benchmark, kind: str) -> None:
    n, k, iterations = 50_000, 1000, 20
    x, _ = rows(kind, n, k)
    start = x[torch.randperm(n)[:k]].clone()
    faiss.omp_set_num_threads(torch.get_num_threads())

    def ours() -> float:
        return KMeans(k, n_iter=iterations, init=start).fit(x).history_[-1]

    def theirs() -> float:
        kmeans = faiss.Kmeans(D, k, niter=iterations, max_points_per_centroid=n, min_points_per_centroid=1)
        kmeans.train(x.numpy(), init_centroids=start.numpy())
        kmeans.index.search(x.numpy(), 1)
        return float(kmeans.obj[-1])

    assert ours() <= 1.001 * theirs()
    flop = 2 * n * k * D * (iterations + 1)
    work = Work(f"fit, {kind}", f"{n} x {D}, K {k}, 20 iterations", "float32", "cpu", bytes=4 * D * n, flop=flop)
    suite.compare(work, {"fastproto": ours, "faiss-cpu": theirs}, seconds=10)
    benchmark.pedantic(ours, rounds=1)
