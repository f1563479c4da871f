"""KMeans, the estimator, and kmeans_assign, its nearest-centre search alone."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastproto._check import (
    describe,
    expect,
    expect_flags,
    expect_positive_ints,
    expect_tensor,
    is_integer,
    is_number,
    reads_data,
)
from fastproto.cluster import init as start
from fastproto.cluster._faiss import faiss_lloyd
from fastproto.cluster._fit import Report, fit_centers
from fastproto.cluster._lloyd import Assignment, assign_all, lloyd, unit
from fastproto.cluster._progress import progress
from fastproto.cluster._rows import Rows, check_rows, check_weights, deep_copy, expect_alike
from fastproto.cluster._stream import Array
from fastproto.cluster.bounds import Search
from fastproto.cluster.concentration import EXACT
from fastproto.ops.assign import METRICS, assign

PRECISIONS = ("exact", "fast")
ENGINES = ("fastproto", "faiss")
EMPTY = ("split", "keep")
# What decides on the result, so that ranks that cluster together have one value of each.
SHARED = (
    "n_clusters", "n_iter", "n_init", "init", "spherical", "max_points_per_cluster", "empty", "seed", "precision",
)  # fmt: skip
# Distances that ``transform`` computes at a time.
TRANSFORM_ELEMENTS = 1 << 20


def parameters_of(estimator: type) -> dict[str, inspect.Parameter]:
    """The constructor's arguments by name; where it hands on ``**options``, those of the class that takes them too."""
    found: dict[str, inspect.Parameter] = {}
    for base in (base for base in estimator.__mro__ if "__init__" in vars(base)):
        _, *given = inspect.signature(vars(base)["__init__"]).parameters.values()
        found |= {p.name: p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in found}
        if all(p.kind != p.VAR_KEYWORD for p in given):
            break
    return found


def kmeans_assign(
    x: Tensor,  # (N, D) float
    centers: Tensor,  # (K, D) float
    *,
    metric: str = "l2",
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:
    """The nearest centre of every row; the N x K matrix of distances is never held at once.

    Args:
        x: rows of float32, float64, float16 or bfloat16, computed in at least float32.
        centers: on the device of ``x``.
        metric: "l2" for the smallest squared distance, "ip" for the largest inner product.
        precision: "exact": a label differs from the float64 one only where two distances differ by less than float32
            rounding. "fast" trusts the 16-bit screen: the squared distance to the centre may exceed the smallest by
            2^-9 of the product of both lengths, measured from a point amid the centres (D up to 256; beyond, by
            √(D / 256) times that), an inner product fall short of the largest by half as much. The distance that is
            returned is that of the label in either case.

    Returns:
        Labels (N,) int64, ties to the lowest index, and distances (N,) float32: squared L2 or the inner product.
        Not differentiable.

    Raises:
        TypeError: ``x`` or ``centers`` is not a float tensor.
        ValueError: shapes, devices or options do not fit, or (where data is read) a row holds NaN or infinity.

    Example:
        >>> import torch
        >>> from fastproto.cluster import kmeans_assign
        >>> kmeans_assign(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([[1.0], [4.0]]))
        (tensor([0, 0, 1]), tensor([1., 1., 1.]))

    Source: Lloyd, "Least squares quantization in PCM", 1982, section 2: the assignment step.
    """
    op = "kmeans_assign"
    expect(metric in METRICS, op, "metric", '"l2" or "ip"', metric)
    expect(precision in PRECISIONS, op, "precision", '"exact" or "fast"', precision)
    expect_tensor(x, op, "x", ("N", "D"))
    expect_tensor(centers, op, "centers", ("K", x.shape[1]), device=x.device)
    expect(centers.numel() > 0, op, "centers", "at least one centre of at least one dimension", centers)
    if reads_data(x):
        expect(bool(centers.isfinite().all()), op, "centers", "finite centres", "NaN or infinity")
    labels, distance = assign(x, centers, metric, precision == "exact")
    if reads_data(x) and not distance.isfinite().all():
        Rows(x).refuse(op)
    return labels, distance


class KMeans:
    """k-means by Lloyd's iterations, as an estimator.

    Each iteration assigns every row to its nearest centre and moves every centre to the mean of its rows:
        minimise  J = Σ_n w_n ||x_n - c_label(n)||²,    or with ``spherical`` maximise  J = Σ_n w_n <x_n, c_label(n)>
    over unit centres. The N x K matrix of distances is never held at once. The same seed gives the same bits, whatever
    the run and however the rows are divided over chunks, threads and ranks: every sum over rows is exact, of numbers
    rounded to some 2^-102 N² of the largest first. A fit reads its rows once to refuse what is not finite, once for
    each iteration, and once to assign them in the end.

    Args:
        n_clusters: K.
        n_iter: iterations at most. Fitting ends early where an iteration leaves every centre as it was.
        n_init: fits from different starts; the one with the best objective over the training rows is kept.
        init: "random" (rows without replacement, weights not regarded), "k-means++", or centres (K, D), from which
            there is one fit whatever ``n_init``.
        spherical: inner product instead of squared distance, centres normalised after each iteration. The rows are
            taken as they are; normalise them for cosine similarity.
        tol: ends a fit once the objective changes by no more than this share of it from one iteration to the next. On
            a GPU the host learns of it while the next iteration runs, which is then dropped.
        max_points_per_cluster: trains on that many rows per cluster, drawn without replacement, if there are more.
            All rows are assigned afterwards.
        empty: "split" gives a cluster without rows half of a large one, as faiss does; "keep" leaves its centre.
        seed: of everything drawn, at least 0.
        precision: "exact", or "fast", which permits an approximate search, as in :func:`kmeans_assign`.
        engine: "fastproto", or "faiss" to run the same iterations on an installed faiss: on the GPU of the rows where
            it finds one (this path has not been run yet), else on the CPU; all training rows in the host's memory as
            float32, ``empty="split"``, no process group. Starts and subsets are fastproto's either way. Weights do not
            count in faiss's objective.
        chunk_rows: rows computed at a time; by default all, or 64 MiB where they have to be copied to be computed.
        device: where to compute; by default where the rows lie. Rows elsewhere (a CPU tensor larger than the memory of
            a GPU, a memory map) are streamed there chunk by chunk; the next is read and copied while a GPU computes.
        process_group: ranks that cluster together. Each keeps its rows, which in rank order make up the whole; sums
            and counts, and the rows that are starts, cross. Every rank gets the bits of one process on all rows. All
            have the same options but ``chunk_rows``, ``device`` and ``progress``.
        progress: shows a tqdm bar, of several ranks on the first.

    Attributes:
        cluster_centers_: (K, D) float32, or float64 for float64 rows, on the device of the computation.
        labels_: (N,) int64, ties to the lowest index, where the rows lie. Of this rank's rows.
        inertia_: objective J of all rows and the final centres.
        counts_: (K,) int64, rows of each cluster.
        concentration_: (K,), see ``fastproto.cluster.concentration``, at its default temperature: of the rows,
            whatever their weights, as ``counts_``.
        n_iter_: iterations of the kept fit.
        n_distances_: pairs of a row of this process and a centre whose distance was computed, over all fits: N · K an
            iteration, and as many to assign the rows in the end. In exact fits with float32 or half precision rows on
            the CPU bounds exclude some of them; for these each pass but a fit's first computes the distance to the
            row's own centre beside, so that where nothing can be excluded it is N · (K + 1).
        history_: list of the objective that each of its iterations found, before moving the centres; training rows.

    Raises:
        TypeError: rows that are not a float tensor or array.
        ValueError: an unknown value of an option, or ranks with different ones, more clusters than rows, rows of NaN
            or infinity, negative weights.

    Example:
        >>> import torch
        >>> from fastproto.cluster import KMeans
        >>> x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 100])
        >>> kmeans = KMeans(2, n_init=3).fit(x)
        >>> kmeans.counts_
        tensor([50, 50])
        >>> kmeans.predict(torch.tensor([[99.0, 101.0]])) == kmeans.labels_[-1]
        tensor([True])

    Source: Lloyd, "Least squares quantization in PCM", 1982; starts by Arthur and Vassilvitskii, SODA 2007; defaults
    and empty clusters as in faiss.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        n_iter: int = 20,
        n_init: int = 1,
        init: str | Array = "random",
        spherical: bool = False,
        tol: float = 0.0,
        max_points_per_cluster: int | None = None,
        empty: str = "split",
        seed: int = 0,
        precision: str = "exact",
        engine: str = "fastproto",
        chunk_rows: int | None = None,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> None:
        op = "KMeans"
        expect_positive_ints(op, n_clusters=n_clusters, n_iter=n_iter, n_init=n_init)
        if max_points_per_cluster is not None:
            expect_positive_ints(op, max_points_per_cluster=max_points_per_cluster)
        if chunk_rows is not None:
            expect_positive_ints(op, chunk_rows=chunk_rows)
        expect(is_integer(seed) and seed >= 0, op, "seed", "an integer of at least 0", seed)
        expect(is_number(tol) and tol >= 0, op, "tol", "a number of at least 0", tol)
        expect_flags(op, spherical=spherical, progress=progress)
        try:
            wanted = torch.device("cpu" if device is None else device)
        except (RuntimeError, TypeError):
            expect(False, op, "device", 'None or a device such as "cpu" or "cuda:0"', device)
        expect(wanted.type in ("cpu", "cuda"), op, "device", "the CPU or a CUDA device", str(device))
        if wanted.type == "cuda":
            found = torch.cuda.device_count()
            expect((wanted.index or 0) < found, op, "device", f"one of the {found} CUDA devices found", str(device))
        grouped = process_group is None or (dist.is_available() and isinstance(process_group, dist.ProcessGroup))
        expect(grouped, op, "process_group", "None or a group of torch.distributed", process_group)
        if isinstance(init, str):
            expect(init in start.METHODS, op, "init", '"random", "k-means++" or centres (K, D)', init)
        else:
            start.given_centers(init, op, n_clusters, "D")
        expect(empty in EMPTY, op, "empty", '"split" or "keep"', empty)
        expect(precision in PRECISIONS, op, "precision", '"exact" or "fast"', precision)
        expect(engine in ENGINES, op, "engine", '"fastproto" or "faiss"', engine)
        if engine == "faiss":
            expect(empty == "split", op, "empty", '"split" for engine "faiss"', empty)
            expect(process_group is None, op, "process_group", 'None for engine "faiss"', process_group)
        self.n_clusters, self.n_iter, self.n_init, self.init = n_clusters, n_iter, n_init, init
        self.spherical, self.tol, self.max_points_per_cluster = spherical, tol, max_points_per_cluster
        self.empty, self.seed, self.precision, self.engine = empty, seed, precision, engine
        self.chunk_rows, self.device, self.process_group, self.progress = chunk_rows, device, process_group, progress

    def __deepcopy__(self, memo: dict[int, Any]) -> KMeans:
        return deep_copy(self, memo, self.process_group)

    def fit(self, x: Array, y: object = None, *, sample_weight: Array | None = None) -> KMeans:
        """Finds the centres of ``x`` (N, D), then assigns all rows to them.

        Args:
            x: float tensor, array or memory map; float16 and bfloat16 are computed in float32 at least.
            y: not looked at: scikit-learn's pipelines and searches hand on labels.
            sample_weight: (N,) float, at least 0: a row of weight 2 counts as two rows.
        """
        op = "KMeans.fit"
        rows = self._rows(x, op, sample_weight)
        training = self._training_rows(rows, op)
        searches: list[Search] = []
        self.cluster_centers_, reports, found = self._train(training, op, searches)
        self._fitted_metric = self._metric
        self.history_ = [report.objective for report in reports]
        self.n_iter_ = len(reports)
        if training is not rows:
            searches[-1].forget()
            searches.append(self._search())
            found = None
        self.labels_, self.inertia_, self.counts_, self.concentration_ = found or assign_all(
            rows, self.cluster_centers_, searches[-1]
        )
        self.n_distances_ = sum(search.tried for search in searches)
        return self

    def predict(self, x: Array) -> Tensor:
        """Labels (N,) int64 of the nearest centres, where ``x`` (N, D) lies."""
        op = "KMeans.predict"
        return self._nearest(self._fitted_rows(x, op), op)[0]

    def fit_predict(self, x: Array, y: object = None, *, sample_weight: Array | None = None) -> Tensor:
        """``fit``, then ``labels_``."""
        return self.fit(x, sample_weight=sample_weight).labels_

    def fit_transform(self, x: Array, y: object = None, *, sample_weight: Array | None = None) -> Tensor:
        """``fit``, then ``transform`` of the same rows."""
        return self.fit(x, sample_weight=sample_weight).transform(x)

    def score(self, x: Array, y: object = None, *, sample_weight: Array | None = None) -> float:
        """How well the centres fit this process's ``x`` (N, D): larger is better, as scikit-learn's searches want it.

        Minus the sum of squared distances; spherical, the sum of inner products. Rows count by ``sample_weight`` (N,).
        """
        op = "KMeans.score"
        rows = self._fitted_rows(x, op)
        weights = check_weights(sample_weight, op, x.shape[0])
        found = self._nearest(rows, op)[1].double()
        total = float((found if weights is None else found * weights.to(found.device)).sum())
        return total if self._fitted_metric == "ip" else -total

    def transform(self, x: Array) -> Tensor:
        """Euclidean distances (N, K) from every row to every centre, where ``x`` (N, D) lies.

        Of float32 rows they are computed in float64 and right to about 1e-7 of the spread of rows and centres, of
        float64 rows from the differences, and right to the last digits.
        """
        op = "KMeans.transform"
        rows = self._fitted_rows(x, op)
        dtype = torch.promote_types(rows.dtype, self.cluster_centers_.dtype)
        centers = self.cluster_centers_.to(rows.device).double()
        count = len(centers)
        # Everything relative to the middle of the centres: a common offset takes no digits, nor does one far centre.
        origin = centers.sort(0).values[count // 2]
        mode = EXACT if dtype == torch.float64 else "use_mm_for_euclid_dist"
        distances = torch.zeros(rows.local, count, dtype=dtype, device=rows.home)
        finite = torch.ones((), dtype=torch.bool, device=rows.device)
        for here, chunk, _ in rows.chunks():
            size = max(1, TRANSFORM_ELEMENTS // max(count, rows.dim))
            for part, out in zip(chunk.split(size), distances[here].split(size), strict=True):
                found = torch.cdist(part.double() - origin, centers - origin, compute_mode=mode)
                finite &= found.isfinite().all()
                out.copy_(found)
        if reads_data(distances) and not finite:
            rows.refuse(op)
        return distances

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name, as scikit-learn asks for them; ``deep`` adds none."""
        return {name: getattr(self, name) for name in parameters_of(type(self))}

    def set_params(self, **params: Any) -> KMeans:
        """Changes some of the constructor's arguments, all or none; what was fitted stays until the next fit."""
        known = self.get_params()
        for name in params:
            expect(name in known, "KMeans.set_params", "parameters", f"some of {', '.join(known)}", name)
        type(self).__init__(self, **known | params)
        return self

    def __sklearn_clone__(self) -> KMeans:
        group = self.process_group  # has no copies
        return type(self)(**copy.deepcopy(self.get_params(), {id(group): group}))

    def __sklearn_tags__(self) -> Any:
        # scikit-learn alone asks, so that it is there.
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags("clusterer", TargetTags(required=False), TransformerTags())

    def __repr__(self) -> str:
        defaults = {name: parameter.default for name, parameter in parameters_of(type(self)).items()}
        shown = {name: value for name, value in self.get_params().items() if value is not defaults[name]}
        texts = {name: describe(x) if isinstance(x, (Tensor, np.ndarray)) else repr(x) for name, x in shown.items()}
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in texts.items())})"

    def find_centers(self, x: Array, sample_weight: Array | None, op: str) -> tuple[Tensor, list[Report]]:
        """``fit`` without the assignment of all rows: the centres, and what the host learnt of each iteration."""
        centers, reports, _ = self._train(self._training_rows(self._rows(x, op, sample_weight), op), op, [])
        return centers, reports

    def _rows(self, x: Array, op: str, sample_weight: Array | None) -> Rows:
        weights = self._checked_alike(x, op, sample_weight)
        rows = Rows(x, weights, device=self.device, chunk_rows=self.chunk_rows, group=self.process_group)
        expect(rows.total >= self.n_clusters, op, "x", f"at least n_clusters = {self.n_clusters} rows", f"{rows.total}")
        rows.survey(op)
        return rows

    def _checked_alike(self, x: Array, op: str, sample_weight: Array | None) -> Tensor | None:
        """The weights. What one rank refuses, or what does not fit to the others', every rank refuses."""
        refused, weights = None, None
        try:
            check_rows(x, op)
            weights = check_weights(sample_weight, op, x.shape[0])
        except (TypeError, ValueError) as error:
            refused = error
        if self.process_group is not None:
            device = self.device or (x.device if isinstance(x, Tensor) else "cpu")
            options = {name: getattr(self, name) for name in SHARED} | {"tol": float(self.tol)}
            weighted = expect_alike(x, weights, refused, options, op, self.process_group, device)
            weights = torch.ones(len(x), dtype=torch.float64, device="cpu") if weighted and weights is None else weights
        if refused is not None:
            raise refused
        return weights

    def _fitted_rows(self, x: Array, op: str) -> Rows:
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError(f"{op}: call fit first")
        check_rows(x, op, self.cluster_centers_.shape[1])
        return Rows(x, device=self.device, chunk_rows=self.chunk_rows)

    def _nearest(self, rows: Rows, op: str) -> tuple[Tensor, Tensor]:
        return rows.nearest(self.cluster_centers_, self._fitted_metric, op)

    @property
    def _metric(self) -> str:
        return "ip" if self.spherical else "l2"

    def _training_rows(self, rows: Rows, op: str) -> Rows:
        most = rows.total if self.max_points_per_cluster is None else self.n_clusters * self.max_points_per_cluster
        if rows.total <= most:
            return rows
        drawn = np.random.default_rng([self.seed, 0]).choice(rows.total, size=most, replace=False)
        training = rows.subset(np.sort(drawn))
        if training.weights is not None:
            total = training.weights.sum()
            training.sum(total)
            wanted = f"a sum above 0 over the {most} rows drawn for training (max_points_per_cluster)"
            expect(bool(total > 0), op, "sample_weight", wanted, "0")
        training.survey(op)
        return training

    def _search(self) -> Search:
        return Search(self._metric, self.precision == "exact")

    def _train(self, rows: Rows, op: str, searches: list[Search]) -> tuple[Tensor, list[Report], Assignment | None]:
        """The best centres of ``n_init`` fits to the rows, the way there, and of several fits where the rows belong.

        Each fit adds what it searched the rows by to ``searches``.
        """
        # faiss would take as many rows as clusters for the centres, whatever it is to start from.
        by_faiss = self.engine == "faiss" and rows.total > self.n_clusters
        theirs = faiss_lloyd(rows, self.spherical, op) if by_faiss else None
        runs = self.n_init if isinstance(self.init, str) else 1
        best: tuple[Tensor, list[Report], Assignment | None] | None = None
        lowest = math.inf
        with progress(runs * self.n_iter, self.n_clusters, shown=self.progress and rows.rank == 0) as show:

            def watch(report: Report) -> None:
                if not math.isfinite(report.objective):
                    rows.refuse(op)
                show(report)

            for run in range(runs):
                searches.append(self._search())
                centers, reports = fit_centers(
                    theirs or lloyd(rows, self.spherical, searches[-1]),
                    self._start(rows, run, op),
                    n_iter=self.n_iter,
                    tol=self.tol,
                    spherical=self.spherical,
                    split=rows.total if self.empty == "split" else None,
                    ahead=rows.device.type == "cuda" and self.engine == "fastproto",
                    watch=watch,
                )
                if theirs is not None:
                    searches[-1].add_tried(rows.local * self.n_clusters * len(reports))
                found = None
                if runs > 1:
                    found = assign_all(rows, centers, searches[-1])
                    searches[-1].forget()
                height = 0.0 if found is None else -found.objective if self.spherical else found.objective
                if best is None or height < lowest:
                    best, lowest = (centers, reports, found), height
        assert best is not None
        return best

    def _start(self, rows: Rows, run: int, op: str) -> Tensor:
        rng = np.random.default_rng([self.seed, 1 + run])
        if not isinstance(self.init, str):
            centers = start.given_centers(self.init, op, self.n_clusters, rows.dim).to(rows.device, rows.dtype)
        elif self.init == "random":
            centers = start.random_centers(rows, self.n_clusters, rng)
        else:
            centers = start.plus_plus_centers(rows, self.n_clusters, rng, self.spherical)
        return unit(centers) if self.spherical else centers
