"""k-means on a GPU, float32 rows: the nearest of many centres, a whole fit, and PCL's three prototype sets.

Operations of an assignment: 2 N K D, at the rate of a bfloat16 product, which is float16's too. Of the peers,
flash-kmeans takes rows and centres rounded to float16 and draws its own start; eager PyTorch and faiss multiply
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Suite, Work, peer
from torch import Tensor

from fastproto.cluster import KMeans, PrototypeBank, kmeans_assign
from fastproto.ops.update import update

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # what peers have to say
DEVICE = "cuda"
N, D, K = 1_280_000, 128, 30_000  # ImageNet's images, PCL's embedding
SETS = (25_000, 50_000, 100_000)  # PCL's prototypes
ITERATIONS = 20


def rows(kind: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows and centres: independent, or unit rows of 1000 classes with the means of some 40 of them as centres."""
    if kind == "gaussian":
        return torch.randn(n, D, device=DEVICE), torch.randn(k, D, device=DEVICE)
    classes = F.normalize(torch.randn(1000, D, device=DEVICE))

    def drawn(count: int, spread: float) -> Tensor:
        return classes[torch.randint(1000, (count,), device=DEVICE)] + spread * torch.randn(count, D, device=DEVICE)

    return F.normalize(drawn(n, 0.05)), drawn(k, 0.05 / 40**0.5)


def eager(x: Tensor, centers: Tensor) -> Tensor:
    """Chunks of rows against all centres, as one writes it: not exact, float32 products."""
    half = centers.square().sum(1) / 2
    return torch.cat([torch.addmm(half, part, centers.T, alpha=-1).argmin(1) for part in x.split(1 << 14)])


def faiss_index(centers: Tensor) -> Any:
    """The centres in faiss's flat index on the GPU, or None."""
    resources, flat = peer("faiss", "StandardGpuResources"), peer("faiss", "GpuIndexFlatL2")
    if not resources or not flat or not peer("faiss.contrib.torch_utils", "torch"):
        return None
    index = flat(resources(), D)
    index.add(centers)
    return index


@pytest.mark.parametrize("kind", ["gaussian", "classes"])
def test_assign(suite: Suite, benchmark, kind: str) -> None:
    x, centers = rows(kind, N, K)
    half, half_centers = x.half(), centers.half()
    methods: dict[str, Callable[[], object]] = {
        "fastproto": lambda: kmeans_assign(x, centers),
        "fastproto, float16": lambda: kmeans_assign(half, half_centers),
        "eager": lambda: eager(x, centers),
    }
    if flash := peer("flash_kmeans.assign_euclid_triton", "euclid_assign_triton"):
        squares = x.square().sum(1)
        methods["flash-kmeans, float16"] = lambda: flash(half[None], half_centers[None], squares[None])
    if index := faiss_index(centers):
        methods["faiss-gpu"] = lambda: index.search(x, 1)
    work = Work(
        f"assign, {kind}", f"{N} x {D} to {K}", "float32", DEVICE, bytes=4 * D * (N + K) + 12 * N, flop=2 * N * K * D
    )
    suite.compare(work, methods)
    benchmark.pedantic(methods["fastproto"], rounds=5, warmup_rounds=1)


def test_update(suite: Suite, benchmark) -> None:
    """The sums of every cluster: rows are read once."""
    x, labels = torch.randn(N, D, device=DEVICE), torch.randint(K, (N,), device=DEVICE)

    def ours() -> object:
        return update(x, labels, K)

    def index_add() -> Tensor:
        """In float32, in an order that changes from run to run."""
        return torch.zeros(K, D, device=DEVICE).index_add_(0, labels, x)

    work = Work("update", f"{N} x {D} into {K}", "float64", DEVICE, bytes=4 * D * N + 8 * N + 8 * D * K)
    suite.compare(work, {"fastproto": ours, "eager index_add": index_add})
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


def test_fit(suite: Suite, benchmark) -> None:
    """PCL's smallest set: the same iterations for all, each method from a start of the same kind."""
    x, _ = rows("classes", N, 1)
    k = SETS[0]

    def ours() -> object:
        return KMeans(k, n_iter=ITERATIONS).fit(x)

    methods: dict[str, Callable[[], object]] = {"fastproto": ours}
    if flash := peer("flash_kmeans", "batch_kmeans_Euclid"):
        half = x.half()[None]
        methods["flash-kmeans, float16"] = lambda: flash(half, k, max_iters=ITERATIONS)
    if fast := peer("fast_pytorch_kmeans", "KMeans"):
        methods["fast-pytorch-kmeans"] = lambda: fast(n_clusters=k, max_iter=ITERATIONS, tol=0).fit_predict(x)
    if faiss_index(x[:1]) is not None:
        host, faiss = x.cpu().numpy(), import_module("faiss")
        limits = {"max_points_per_centroid": N, "min_points_per_centroid": 1}
        methods["faiss-gpu"] = lambda: faiss.Kmeans(D, k, niter=ITERATIONS, gpu=True, **limits).train(host)
    work = Work("fit", f"{N} x {D}, K {k}, {ITERATIONS} iterations", "float32", DEVICE,
                bytes=4 * D * N * ITERATIONS, flop=2 * N * k * D * (ITERATIONS + 1))  # fmt: skip
    suite.compare(work, methods)
    benchmark.pedantic(ours, rounds=1)


def test_three_sets_of_prototypes(suite: Suite, benchmark) -> None:
    """What PCL does once an epoch, from one start for each set where its script takes five."""
    x, _ = rows("classes", N, 1)
    bank = PrototypeBank(N, D, SETS, n_iter=ITERATIONS).to(DEVICE)

    def ours() -> None:
        bank.update(x)

    shape = f"{N} x {D}, K {' + '.join(map(str, SETS))}, {ITERATIONS} iterations"
    flop = 2 * N * sum(SETS) * D * (ITERATIONS + 1)
    suite.compare(Work("prototypes of PCL", shape, "float32", DEVICE, flop=flop), {"fastproto": ours})
    benchmark.pedantic(ours, rounds=1)
