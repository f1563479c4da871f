"""k-means with faiss's names: ``import fastproto.cluster.faiss_compat as faiss``, and keep the code.

``Kmeans`` is faiss's Python class; ``Clustering`` on an index is what the scripts of PCL and DeepCluster call, and
``PCAMatrix`` what DeepCluster's whiten features by. faiss itself is not needed. The iterations and the splitting of
empty clusters are faiss's: from the same start come the same centroids up to rounding. Rows that are drawn (the start,
subsets) are others than faiss draws from the same seed, redos are compared by their final centroids, and weights count
in the objective and, scaled to a mean of 1, in the choice of the cluster that is split. As many vectors as centroids
are clustered like any others; faiss takes them for the centroids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastproto._check import expect, expect_positive_ints
from fastproto.cluster import _faiss_clustering as clustering
from fastproto.cluster import _faiss_flat as flat
from fastproto.cluster import _faiss_pca as pca
from fastproto.cluster.init import given_centers

Clustering = clustering.Clustering
ClusteringIterationStats = clustering.ClusteringIterationStats
ClusteringParameters = clustering.ClusteringParameters
ClusteringInitMethod_KMEANS_PLUS_PLUS = clustering.ClusteringInitMethod_KMEANS_PLUS_PLUS
ClusteringInitMethod_RANDOM = clustering.ClusteringInitMethod_RANDOM
GpuIndexFlatConfig = flat.GpuIndexFlatConfig
GpuIndexFlatIP = flat.GpuIndexFlatIP
GpuIndexFlatL2 = flat.GpuIndexFlatL2
IndexFlat = flat.IndexFlat
IndexFlatIP = flat.IndexFlatIP
IndexFlatL2 = flat.IndexFlatL2
METRIC_INNER_PRODUCT = flat.METRIC_INNER_PRODUCT
METRIC_L2 = flat.METRIC_L2
PCAMatrix = pca.PCAMatrix
StandardGpuResources = flat.StandardGpuResources
copy_array_to_vector = flat.copy_array_to_vector
get_num_gpus = flat.get_num_gpus
normalize_L2 = flat.normalize_L2
vector_float_to_array = flat.vector_float_to_array
vector_to_array = flat.vector_to_array


class Kmeans:
    """fastproto's k-means behind the interface of ``faiss.Kmeans``: numpy float32 in, numpy out.

    Args:
        d: dimension of the vectors.
        k: number of centroids.
        gpu: False for the CPU; True, -1 or a number for the current CUDA device (one, whatever the number).
        **parameters: fields of ``ClusteringParameters``: niter=25, nredo=1, verbose, spherical, seed=1234,
            min_points_per_centroid=39, max_points_per_centroid=256, init_method, early_stop_threshold, ...

    Attributes:
        centroids: (k, d) float32, None before ``train``.
        obj: objective of each iteration of the kept fit, None before ``train``. There are fewer than ``niter`` where
            the last one changed nothing.
        iteration_stats: for each of them a dict of obj, time, imbalance_factor and nsplit, None before ``train``.
        index: the centroids, with ``index.search(x, k)``.
        cp: the parameters, which may be set before ``train``, but for ``spherical``, which the index is made for.

    Raises:
        TypeError: a parameter that faiss does not have.
        ValueError: a parameter out of range or not supported; ``gpu`` where there is no CUDA device.

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

    def __init__(self, d: int, k: int, *, gpu: bool | int = False, **parameters: Any) -> None:
        op = "faiss_compat.Kmeans"
        expect_positive_ints(op, d=d, k=k)
        steps = parameters.pop("progressive_dim_steps", None)
        expect(steps is None, op, "progressive_dim_steps", "None: it is not supported", steps)
        expect(not gpu or torch.cuda.is_available(), op, "gpu", "False where torch finds no CUDA device", gpu)
        self.gpu, self.cp = gpu, ClusteringParameters(**parameters)
        self.cp.kmeans(k, op)
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.index = flat.FlatIndex(d, "ip" if self.cp.spherical else "l2", device)
        self.d, self.k = int(d), int(k)
        self.reset()

    def reset(self, k: int | None = None) -> None:
        """Forgets what was trained; ``k`` changes the number of centroids."""
        if k is not None:
            expect_positive_ints("faiss_compat.Kmeans.reset", k=k)
            self.k = int(k)
        self.centroids: np.ndarray | None = None
        self.obj: np.ndarray | None = None
        self.iteration_stats: list[dict[str, float]] | None = None
        self.index.reset()

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
            TypeError: an argument that is no numbers.
            ValueError: sizes do not fit, NaN or infinity in ``x``, negative weights.
        """
        fit = Clustering(self.d, self.k, self.cp)
        if init_centroids is not None:
            op, name = "faiss_compat.Kmeans.train", "init_centroids"
            start = flat.as_float32(init_centroids, op, name, f"({self.k}, {self.d})")
            given_centers(start, op, self.k, self.d, name)
            copy_array_to_vector(start, fit.centroids)
        fit.train(x, self.index, weights)
        self.centroids = vector_to_array(fit.centroids).reshape(self.k, self.d)
        self.obj = vector_to_array(fit.obj)
        self.iteration_stats = [stats._asdict() for stats in fit.iteration_stats.values]
        return fit.obj.at(-1)

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances (N,) float32 and indices (N,) int64 of the nearest centroids."""
        distances, labels = self.index.search(x, 1)
        return distances[:, 0], labels[:, 0]
