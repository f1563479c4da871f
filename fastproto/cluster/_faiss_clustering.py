"""faiss.Clustering: its parameters, its train on an index, and what it leaves behind."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from fastproto._check import expect, expect_positive_ints, expect_type
from fastproto.cluster._faiss_flat import FlatIndex, Vector, as_float32, float32
from fastproto.cluster._rows import check_weights
from fastproto.cluster.init import given_centers
from fastproto.cluster.kmeans import KMeans

ClusteringInitMethod_RANDOM, ClusteringInitMethod_KMEANS_PLUS_PLUS = 0, 1
STARTS = {ClusteringInitMethod_RANDOM: "random", ClusteringInitMethod_KMEANS_PLUS_PLUS: "k-means++"}


@dataclass
class ClusteringParameters:
    """The parameters of faiss 1.15, with its defaults.

    Args:
        niter: iterations.
        nredo: fits from different starts, of which the best is kept.
        verbose: shows a progress bar.
        spherical: inner product, centroids of unit length.
        seed: of everything drawn, at least 0.
        min_points_per_centroid: fewer training vectors per centroid cause a warning.
        max_points_per_centroid: of more, that many per centroid are drawn for training.
        init_method: ``ClusteringInitMethod_RANDOM`` or ``ClusteringInitMethod_KMEANS_PLUS_PLUS``.
        early_stop_threshold: ends once the objective changes by no more than this share of it.
        update_index, decode_block_size, check_input_data_for_NaNs, use_faster_subsampling: change nothing here. A flat
            index needs no training, the vectors are not encoded, they are always checked, and subsets are drawn
            without duplicates.
        int_centroids, frozen_centroids, use_super_kmeans, afkmc2_chain_length: not supported; only the default is
            accepted.
    """

    niter: int = 25
    nredo: int = 1
    verbose: bool = False
    spherical: bool = False
    int_centroids: bool = False
    update_index: bool = False
    frozen_centroids: bool = False
    min_points_per_centroid: int = 39
    max_points_per_centroid: int = 256
    seed: int = 1234
    decode_block_size: int = 32768
    check_input_data_for_NaNs: bool = True
    use_faster_subsampling: bool = False
    init_method: int = ClusteringInitMethod_RANDOM
    afkmc2_chain_length: int = 50
    early_stop_threshold: float = 0.0
    use_super_kmeans: bool = False

    def kmeans(self, k: int, op: str, init: np.ndarray | None = None, **options: Any) -> KMeans:
        """The estimator of these parameters. ValueError for what it does not support."""
        default = ClusteringParameters()
        for name in ("int_centroids", "frozen_centroids", "use_super_kmeans", "afkmc2_chain_length"):
            value, only = getattr(self, name), getattr(default, name)
            expect(value == only, op, name, f"{only}, which is all that is supported", value)
        expect(self.init_method in STARTS, op, "init_method", "RANDOM (0) or KMEANS_PLUS_PLUS (1)", self.init_method)
        return KMeans(
            k,
            n_iter=self.niter,
            n_init=self.nredo,
            init=STARTS[self.init_method] if init is None else init,
            spherical=bool(self.spherical),  # of C++, where 1 is true
            tol=self.early_stop_threshold,
            max_points_per_cluster=self.max_points_per_centroid,
            seed=self.seed,
            progress=bool(self.verbose),
            **options,
        )


class ClusteringIterationStats(NamedTuple):
    """One iteration. faiss's ``time_search`` is missing: the search is not timed apart from the rest."""

    obj: float
    time: float  # seconds since the fit began
    imbalance_factor: float
    nsplit: int


class Clustering(ClusteringParameters):
    """k-means on an index, as the scripts of PCL and DeepCluster call it.

    Args:
        d: dimension of the vectors.
        k: number of centroids.
        parameters: copied; each is an attribute that may be set before ``train``.

    Attributes:
        centroids: the centroids one after the other, k·d float32; ``vector_to_array`` makes an array of them. If there
            are any before ``train``, they are the start.
        obj: the objective of each iteration of the kept fit, as older versions of faiss have it.
        iteration_stats: the same with time, imbalance and splits; fewer than ``niter`` where an iteration changed
            nothing.

    Example:
        >>> import numpy as np
        >>> import fastproto.cluster.faiss_compat as faiss
        >>> x = np.random.default_rng(0).random((1000, 16), dtype=np.float32)
        >>> clus = faiss.Clustering(16, 10)
        >>> clus.niter, clus.seed = 5, 1
        >>> index = faiss.IndexFlatL2(16)
        >>> clus.train(x, index)
        >>> D, I = index.search(x, 1)
        >>> D.shape, I.shape, faiss.vector_to_array(clus.centroids).reshape(10, 16).shape
        ((1000, 1), (1000, 1), (10, 16))
    """

    def __init__(self, d: int, k: int, parameters: ClusteringParameters | None = None) -> None:
        super().__init__(**asdict(parameters) if parameters else {})
        expect_positive_ints("faiss_compat.Clustering", d=d, k=k)
        self.d, self.k = int(d), int(k)
        self.centroids = Vector(np.zeros(0, dtype=np.float32))
        self.obj, self.iteration_stats = Vector(), Vector()

    def train(self, x: np.ndarray, index: FlatIndex, weights: np.ndarray | None = None) -> None:
        """Finds the centroids of ``x`` (N, d), and leaves them in ``index``, on whose device it computes.

        Args:
            x: at least ``k`` vectors, taken as float32.
            index: ``IndexFlatIP`` or ``GpuIndexFlatIP`` if ``spherical``, else one of L2.
            weights: (N,), at least 0. Unlike in faiss they count in the objective too.

        Raises:
            TypeError: ``x`` or ``weights`` are not numbers, ``index`` is not one of faiss_compat's.
            ValueError: sizes or parameters do not fit, NaN or infinity in ``x``, negative weights.
        """
        op = "faiss_compat.Clustering.train"
        x = float32(x, op, self.d)
        expect_type(index, FlatIndex, op, "index", "one of faiss_compat's")
        expect(index.d == self.d, op, "index", f"dimension {self.d}", f"dimension {index.d}")
        metric = "ip" if self.spherical else "l2"
        expect(index.metric == metric, op, "index", f'metric "{metric}" for spherical={self.spherical}', index.metric)
        if len(x) < self.k * self.min_points_per_centroid:
            wanted = f"{self.k * self.min_points_per_centroid} training vectors for {self.k} centroids"
            warnings.warn(f"{op}: please provide at least {wanted}, got {len(x)}", stacklevel=2)
        start = None
        if self.centroids.size():
            numbers, held = self.k * self.d, self.centroids.size()
            expect(held == numbers, op, "centroids", f"{numbers} numbers, or none", str(held))
            start = np.asarray(self.centroids.values, dtype=np.float32).reshape(self.k, self.d)
            given_centers(start, op, self.k, self.d, "centroids")
        if weights is not None:
            weights = as_float32(weights, op, "weights", f"({len(x)},)")
            check_weights(weights, op, len(x), "weights")
        centers, reports = self.kmeans(self.k, op, start, device=index.device).find_centers(x, weights, op)
        self.centroids.values = centers.cpu().numpy().ravel()
        self.obj.values = [report.objective for report in reports]
        self.iteration_stats.values = [
            ClusteringIterationStats(report.objective, report.time, report.imbalance, report.empty)
            for report in reports
        ]
        index.reset()
        index.add(centers.cpu().numpy())
