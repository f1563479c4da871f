"""torch's default dtype and device are for what names neither: no result depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.cluster import KMeans, PrototypeBank, concentration, faiss_compat, kmeans_assign, whiten
from fastproto.losses import functional


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}


def fitted(kmeans: KMeans, x: Any) -> list[Tensor]:
    kmeans.fit(x)
    return [kmeans.cluster_centers_, kmeans.labels_, kmeans.concentration_, kmeans.transform(x)]


def searched(x: np.ndarray) -> list[Tensor]:
    kmeans = faiss_compat.Kmeans(x.shape[1], 9, niter=4)
    kmeans.train(x)
    index = faiss_compat.IndexFlatL2(x.shape[1])
    index.add(x)
    pca = faiss_compat.PCAMatrix(x.shape[1], 4)
    pca.train(x)
    found = (kmeans.centroids, *kmeans.index.search(x[:50], 3), *index.search(x[:50], 5), pca.apply(x))
    return [torch.from_numpy(array) for array in found]


def updated(bank: PrototypeBank, x: Tensor) -> list[Tensor]:
    bank.update(x)
    return [tensor for part in bank.lookup(torch.arange(len(x), device="cpu")) for tensor in part]


def lost(x: Tensor) -> list[Tensor]:
    labels, generator = torch.arange(len(x), device="cpu") % 40, torch.Generator().manual_seed(3)
    return [
        functional.nt_xent(x[:100], x[100:200]),
        functional.info_nce(x[:100], x[100:200], x[200:]),
        functional.proto_nce(x, x[:40], labels, num_negatives=8, generator=generator),
        functional.siamese_metric_all_pairs(x, x.flip(0), labels, x[0], x[0, 0]),
        functional.uniformity(x),
        functional.cross_correlation(x, x.flip(0)),
    ]


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_same_bits_under_any_default(default: str) -> None:
    # Clusters, so that bounds skip what they may.
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(40, 16, generator=generator).repeat_interleave(50, 0)
    x = 2 * blobs + 0.3 * torch.randn(2000, 16, generator=generator)
    bank, columns = PrototypeBank(len(x), 16, (30, 60), n_iter=8), np.asfortranarray(x.numpy())

    def all_of_it() -> dict[str, list[Tensor]]:
        cases: dict[str, Callable[[], list[Tensor]]] = {
            "random": lambda: fitted(KMeans(150, seed=0, n_iter=3, empty="keep"), x),
            "plus": lambda: fitted(KMeans(60, init="k-means++", n_init=2, n_iter=6), x),
            "columns": lambda: fitted(KMeans(30, spherical=True, n_iter=6, max_points_per_cluster=40), columns),
            "half": lambda: fitted(KMeans(30, n_iter=6), x.half()),
            "assign": lambda: list(kmeans_assign(x, x[:70])),
            "concentration": lambda: [concentration(x, torch.arange(2000, device="cpu") % 70, x[:70]), whiten(x, 5)],
            "faiss": lambda: searched(x.numpy()),
            "bank": lambda: updated(bank, x),
            "losses": lambda: lost(x),
        }
        return {name: [tensor.clone() for tensor in case()] for name, case in cases.items()}

    expected = all_of_it()
    with DEFAULTS[default]():
        found = all_of_it()
    for name, tensors in expected.items():
        for tensor, other in zip(tensors, found[name], strict=True):
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name
