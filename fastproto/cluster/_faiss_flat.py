"""The flat indexes and the vectors of faiss that scripts for k-means touch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastproto._check import describe, expect, expect_positive_ints, is_integer
from fastproto.cluster._rows import Rows, check_rows


class Vector:
    """A std::vector as faiss shows it: ``size()`` and ``at(i)``; ``vector_to_array`` makes an array of it."""

    def __init__(self, values: Any = ()) -> None:
        self.values = values

    def size(self) -> int:
        return len(self.values)

    def at(self, index: int) -> Any:
        return self.values[index]


def vector_to_array(vector: Vector | np.ndarray) -> np.ndarray:
    """A copy of the vector's numbers. Some of what is a vector of faiss is an array here."""
    return np.array(vector if isinstance(vector, np.ndarray) else vector.values)


vector_float_to_array = vector_to_array  # the name of older versions of faiss


def normalize_L2(x: np.ndarray) -> None:
    """Brings every vector (N, d) of a float array to length 1, in place; one of zeros stays."""
    check_rows(x, "faiss_compat.normalize_L2")
    length = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    x /= np.where(length > 0, length, 1)


def get_num_gpus() -> int:
    """How many CUDA devices torch finds."""
    return torch.cuda.device_count()


def copy_array_to_vector(array: np.ndarray, vector: Vector) -> None:
    """Fills the vector with the array's numbers."""
    vector.values = np.array(array).ravel()


class FlatIndex:
    """Vectors in the order in which they were added, and the search for the nearest ones.

    Args:
        d: dimension of the vectors.
        metric: "l2" for the smallest squared distance, "ip" for the largest inner product.
        device: where they are kept and searched.
    """

    is_trained = True

    def __init__(self, d: int, metric: str, device: torch.device | str = "cpu") -> None:
        expect_positive_ints("faiss_compat.IndexFlat", d=d)
        self.d, self.metric, self.device = int(d), metric, torch.device(device)
        self.reset()

    @property
    def ntotal(self) -> int:
        return len(self.vectors)

    def train(self, x: np.ndarray) -> None:
        """Does nothing: a flat index needs no training."""

    def reset(self) -> None:
        """Forgets all vectors."""
        self.vectors = torch.zeros(0, self.d, dtype=torch.float32, device=self.device)

    def add(self, x: np.ndarray) -> None:
        """Appends the vectors (N, d). ValueError for another shape, NaN or infinity."""
        op = "faiss_compat.IndexFlat.add"
        fresh = torch.from_numpy(float32(x, op, self.d).copy())
        if not fresh.isfinite().all():
            Rows(fresh).refuse(op)
        self.vectors = torch.cat([self.vectors, fresh.to(self.device)])

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances (N, k) float32 and indices (N, k) int64 of the nearest vectors, the nearest first.

        Ties go to the lowest index. Where there are fewer than ``k``, indices of -1 fill up, at the largest float32
        (for inner products the lowest).

        Raises:
            RuntimeError: there are no vectors yet.
            ValueError: ``k`` is no integer of at least 1, ``x`` is not (N, d), NaN or infinity in ``x``.
        """
        op = "faiss_compat.IndexFlat.search"
        expect_positive_ints(op, k=k)
        if not self.ntotal:
            raise RuntimeError(f"{op}: the index is empty: train or add first")
        x = float32(x, op, self.d)
        rows = Rows(x, device=self.device)
        if k == 1:
            labels, distance = rows.nearest(self.vectors, self.metric, op)
            return distance.numpy()[:, None], labels.numpy()[:, None]
        labels, distance = rows.nearest_few(self.vectors, min(int(k), self.ntotal), self.metric, op)
        missing = (0, max(0, int(k) - self.ntotal))
        worst = torch.finfo(torch.float32).max * (1 if self.metric == "l2" else -1)
        return pad(distance, missing, value=worst).numpy(), pad(labels, missing, value=-1).numpy()


METRIC_INNER_PRODUCT, METRIC_L2 = 0, 1  # faiss's numbers


class IndexFlat(FlatIndex):
    """Vectors by either metric."""

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        known = metric in (METRIC_L2, METRIC_INNER_PRODUCT)
        expect(known, "faiss_compat.IndexFlat", "metric", "METRIC_L2 or METRIC_INNER_PRODUCT", metric)
        super().__init__(d, "l2" if metric == METRIC_L2 else "ip")


class IndexFlatL2(FlatIndex):
    """Vectors by squared distance."""

    def __init__(self, d: int) -> None:
        super().__init__(d, "l2")


class IndexFlatIP(FlatIndex):
    """Vectors by inner product."""

    def __init__(self, d: int) -> None:
        super().__init__(d, "ip")


@dataclass
class GpuIndexFlatConfig:
    """Where a GPU index lies. ``useFloat16`` and ``indicesOptions`` change nothing: the search is exact."""

    device: int = 0
    useFloat16: bool = False
    indicesOptions: int = 0


class StandardGpuResources:
    """Nothing: torch looks after the GPU's memory."""

    def noTempMemory(self) -> None:
        """Does nothing."""

    def setTempMemory(self, size: int) -> None:
        """Does nothing."""


class GpuIndexFlatL2(FlatIndex):
    """Vectors by squared distance, on a CUDA device."""

    def __init__(self, resources: StandardGpuResources, d: int, config: GpuIndexFlatConfig | None = None) -> None:
        super().__init__(d, "l2", cuda(config or GpuIndexFlatConfig(), "faiss_compat.GpuIndexFlatL2"))


class GpuIndexFlatIP(FlatIndex):
    """Vectors by inner product, on a CUDA device."""

    def __init__(self, resources: StandardGpuResources, d: int, config: GpuIndexFlatConfig | None = None) -> None:
        super().__init__(d, "ip", cuda(config or GpuIndexFlatConfig(), "faiss_compat.GpuIndexFlatIP"))


def cuda(config: GpuIndexFlatConfig, op: str) -> torch.device:
    """The device of a configuration; ValueError where torch does not find it."""
    found = torch.cuda.device_count()
    here = is_integer(config.device) and 0 <= config.device < found
    expect(here, op, "config.device", f"one of the {found} CUDA devices found", describe(config.device))
    return torch.device("cuda", config.device)


def float32(x: np.ndarray, op: str, dim: int) -> np.ndarray:
    """Vectors (N, dim) as float32 in C order, copied only if they are not."""
    x = as_float32(x, op, "x", f"(N, {dim})")
    check_rows(x, op, dim)
    return x


def as_float32(values: Any, op: str, argument: str, shape: str) -> np.ndarray:
    """Numbers of any type, in an array, a tensor or lists, as float32 in C order. TypeError for anything else."""
    numbers = values.detach().cpu().float() if isinstance(values, Tensor) else values
    try:
        numbers = np.asarray(numbers)
        known = numbers.dtype.kind in "fiub"
    except (TypeError, ValueError):
        known = False
    if not known:
        raise TypeError(f"{op}: {argument} expected numbers {shape}, got {describe(values)}")
    return np.ascontiguousarray(numbers, dtype=np.float32)
