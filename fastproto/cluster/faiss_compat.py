"""k-means with the names of faiss.Kmeans: change the import, keep the code. faiss itself is not needed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto._check import expect
from fastproto.cluster._rows import Rows, check_rows
from fastproto.cluster.kmeans import KMeans


class FlatIndex:
    """The centroids, as the index that faiss keeps beside them: search for the nearest one."""

    def __init__(self, d: int, metric: str, device: torch.device) -> None:
        self.d, self.metric, self.device = d, metric, device
        self.vectors: Tensor | None = None

    @property
    def ntotal(self) -> int:
        return 0 if self.vectors is None else len(self.vectors)

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances (N, 1) float32 and indices (N, 1) int64 of the nearest vector: squared L2, or inner product.

        Raises:
            RuntimeError: before ``train``.
            ValueError: ``k`` is not 1, or ``x`` is not (N, d).
        """
        op = "faiss_compat.Kmeans.index.search"
        expect(k == 1, op, "k", "1", k)
        if self.vectors is None:
            raise RuntimeError(f"{op}: call train first")
        labels, distance = Rows(_float32(x, op, self.d), device=self.device).nearest(self.vectors, self.metric, op)
        return distance.numpy()[:, None], labels.numpy()[:, None]


class Kmeans:
    """fastproto's k-means behind the interface of ``faiss.Kmeans``: numpy float32 in, numpy out.

    The same iterations and the same splitting of empty clusters as faiss: from the same ``init_centroids`` come the
    same centroids up to rounding. Rows that are drawn (the start, subsets) are others than faiss draws from the
    same seed, and redos are compared by their final centroids.

    Args:
        d: dimension of the vectors.
        k: number of centroids.
        niter: iterations.
        nredo: fits from different starts, of which the best is kept.
        verbose: shows a progress bar.
        spherical: inner product, centroids of unit length.
        gpu: False for the CPU; True, -1 or a number for the current CUDA device (one, whatever the number).
        seed: of everything drawn.
        min_points_per_centroid: fewer training vectors per centroid cause a warning.
        max_points_per_centroid: of more, that many per centroid are drawn for training.

    Attributes:
        centroids: (k, d) float32, None before ``train``.
        obj: objective of each iteration of the kept fit, None before ``train``. There are fewer than ``niter`` where
            the last one changed nothing.
        index: the centroids, with ``index.search(x, 1)``.

    Raises:
        ValueError: an option out of range; ``gpu`` where there is no CUDA device.

    Example:
        >>> import numpy as np
        >>> from fastproto.cluster.faiss_compat import Kmeans
        >>> x = np.random.default_rng(0).random((1000, 16), dtype=np.float32)
        >>> kmeans = Kmeans(16, 10, niter=5, seed=1)
        >>> bool(kmeans.train(x) == kmeans.obj[-1])
        True
        >>> D, I = kmeans.index.search(x, 1)
        >>> D.shape, I.shape, kmeans.centroids.shape
        ((1000, 1), (1000, 1), (10, 16))

    Source: Johnson, Douze and Jégou, "Billion-scale similarity search with GPUs" (arXiv 1702.08734); interface and
    defaults of faiss 1.15.
    """

    def __init__(
        self,
        d: int,
        k: int,
        *,
        niter: int = 25,
        nredo: int = 1,
        verbose: bool = False,
        spherical: bool = False,
        gpu: bool | int = False,
        seed: int = 1234,
        min_points_per_centroid: int = 39,
        max_points_per_centroid: int = 256,
    ) -> None:
        op = "faiss_compat.Kmeans"
        expect(d >= 1, op, "d", "at least 1", d)
        available = not gpu or torch.cuda.is_available()
        expect(available, op, "gpu", "False where torch finds no CUDA device", gpu)
        self.d, self.k, self.gpu = int(d), int(k), gpu
        self.min_points_per_centroid = min_points_per_centroid
        self.options: dict[str, Any] = {
            "n_iter": niter,
            "n_init": nredo,
            "progress": verbose,
            "spherical": spherical,
            "seed": seed,
            "max_points_per_cluster": max_points_per_centroid,
            "device": "cuda" if gpu else "cpu",
        }
        KMeans(self.k, **self.options)
        self.index = FlatIndex(self.d, "ip" if spherical else "l2", torch.device(self.options["device"]))
        self.centroids: np.ndarray | None = None
        self.obj: np.ndarray | None = None

    def train(
        self,
        x: np.ndarray,
        weights: np.ndarray | None = None,
        init_centroids: np.ndarray | None = None,
    ) -> float:
        """Finds the centroids of ``x`` (N, d), and returns the objective of the last iteration.

        Args:
            x: at least ``k`` vectors, taken as float32.
            weights: (N,), at least 0. Unlike in faiss they count in the objective too.
            init_centroids: (k, d) to start from; there is one fit from them, whatever ``nredo``.

        Raises:
            ValueError: sizes do not fit, NaN or infinity in ``x``, negative weights.
        """
        op = "faiss_compat.Kmeans.train"
        x = _float32(x, op, self.d)
        if len(x) < self.k * self.min_points_per_centroid:
            wanted = f"{self.k * self.min_points_per_centroid} training vectors for {self.k} centroids"
            warnings.warn(f"{op}: please provide at least {wanted}, got {len(x)}", stacklevel=2)
        weights = None if weights is None else np.asarray(weights, dtype=np.float32)
        init = "random" if init_centroids is None else np.asarray(init_centroids, dtype=np.float32)
        centers, reports = KMeans(self.k, init=init, **self.options).find_centers(x, weights, op)
        history = [report.objective for report in reports]
        self.centroids, self.obj = centers.cpu().numpy(), np.array(history)
        self.index.vectors = centers
        return history[-1]

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances (N,) float32 and indices (N,) int64 of the nearest centroids."""
        distances, labels = self.index.search(x, 1)
        return distances[:, 0], labels[:, 0]


def _float32(x: np.ndarray, op: str, dim: int) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    check_rows(x, op, dim)
    return x
