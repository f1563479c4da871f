"""PrototypeBank: the prototypes of a data set at several granularities, and which of them each sample belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproto._check import (
    INTEGERS,
    INTS,
    describe,
    expect,
    expect_index,
    expect_positive_ints,
    expect_tensor,
    expect_type,
    is_integer,
)
from fastproto.cluster._rows import Rows, deep_copy, expect_alike
from fastproto.cluster.concentration import TEMPERATURE, expect_temperature
from fastproto.cluster.init import given_centers
from fastproto.cluster.kmeans import KMeans


class PrototypeBank(nn.Module):
    """Prototype sets of one data set, clustered anew by ``update`` and read batch by batch by ``lookup``.

    Args:
        num_samples: rows of the data set, M.
        dim: dimension of the features, D.
        num_prototypes: K of each of the G sets, or one K.
        temperature: mean of the concentration of each set.
        warm_start: each update but the first starts from the centres of the last instead of new ones. Where features
            move little between updates, few iterations then do (``n_iter``, ``tol``), and bounds save most distances.
        **kmeans: options of ``KMeans``. Set g is clustered with ``seed`` + g. With a ``process_group`` every rank
            gives ``update`` its own rows, which in rank order make up the data set.

    Everything is a buffer, moves with ``.to`` and is saved by ``state_dict``. With ``warm_start`` the centres are saved
    too, as ``centers_0`` and so on: the state of a bank with it does not load into one without, nor the other way.
    Before the first update all assignments are -1, which losses ignore, and the prototypes are 0.

    Raises:
        TypeError: an option that ``KMeans`` does not have, num_prototypes that are neither a number nor several.
        ValueError: a size that is not an integer of at least 1, more prototypes than samples, an unknown value of an
            option.

    Example:
        >>> import torch
        >>> from fastproto.cluster import PrototypeBank
        >>> bank = PrototypeBank(100, 8, num_prototypes=(4, 10), n_iter=5)
        >>> bank.update(torch.randn(100, 8))
        >>> prototypes, assignments, concentration = bank.lookup(torch.tensor([3, 14, 15]))
        >>> [tuple(p.shape) for p in prototypes], [tuple(a.shape) for a in assignments]
        ([(4, 8), (10, 8)], [(3,), (3,)])

    Source: Li et al., "Prototypical Contrastive Learning of Unsupervised Representations" (arXiv 2005.04966), section
    3.2 and algorithm 1.
    """

    num_updates: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        num_prototypes: int | tuple[int, ...] | list[int],
        temperature: float = TEMPERATURE,
        *,
        warm_start: bool = False,
        **kmeans: Any,
    ) -> None:
        super().__init__()
        op = "PrototypeBank"
        expect_positive_ints(op, num_samples=num_samples, dim=dim)
        given = num_prototypes.tolist() if isinstance(num_prototypes, (Tensor, np.ndarray)) else num_prototypes
        expect_type(given, (*INTS, tuple, list), op, "num_prototypes", "an int, or several")
        sizes = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        expect(bool(sizes), op, "num_prototypes", "at least one size", sizes)
        for size in sizes:
            fits = is_integer(size) and 1 <= size <= num_samples
            expect(fits, op, "num_prototypes", f"1 ... num_samples = {num_samples}", describe(size))
        expect_temperature(temperature, op)
        expect(isinstance(warm_start, (bool, np.bool_)), op, "warm_start", "True or False", warm_start)
        seed, init = kmeans.pop("seed", 0), kmeans.get("init", "random")
        expect(is_integer(seed) and seed >= 0, op, "seed", "an integer of at least 0", seed)
        if "n_clusters" in kmeans:
            got = describe(kmeans["n_clusters"])
            raise TypeError(f"{op}: n_clusters expected none, as there is num_prototypes, got {got}")
        if isinstance(init, (Tensor, np.ndarray)):
            for size in sizes:
                given_centers(init, op, size, dim)
        self.num_samples, self.dim, self.num_prototypes, self.temperature = num_samples, dim, sizes, temperature
        self.warm_start, self.seed, self.kmeans_options = warm_start, seed, kmeans
        for index in range(len(sizes)):
            self._kmeans(index)

        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        for index, size in enumerate(sizes):
            self.register_buffer(f"prototypes_{index}", torch.zeros(size, dim))
            self.register_buffer(f"centers_{index}", torch.zeros(size, dim) if warm_start else None)
            self.register_buffer(f"assignments_{index}", torch.full((num_samples,), -1))
            self.register_buffer(f"concentration_{index}", torch.full((size,), float(temperature)))

    def __deepcopy__(self, memo: dict[int, Any]) -> PrototypeBank:
        return deep_copy(self, memo, self.kmeans_options.get("process_group"))

    @property
    def ready(self) -> bool:
        """Whether there was an update, here or in the state that was loaded. Reads one number from the device."""
        return bool(self.num_updates > 0)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,  # (M, D) float
    ) -> None:
        """Clusters the features of the whole data set, row i those of sample i, once per set.

        Raises:
            TypeError: ``features`` is not a float tensor.
            ValueError: ``features`` is not (num_samples, dim), or a row holds NaN or infinity; or another rank of the
                process group refuses its own, or has other options.
        """
        op = "PrototypeBank.update"
        self._expect_alike(features, op)
        rows = Rows(features, group=self.kmeans_options.get("process_group"))
        expect(rows.total == self.num_samples, op, "features", f"{self.num_samples} rows in all", f"{rows.total}")
        for index in range(len(self.num_prototypes)):
            # All 0 before the first update, and where a bank without centres gave its state.
            known = self.warm_start and bool(self._buffer("centers", index).any())
            warm = {"init": self._buffer("centers", index)} if known else {}
            try:
                kmeans = self._kmeans(index, **warm).fit(features)
            except ValueError as error:
                raise ValueError(str(error).replace("KMeans.fit: x ", f"{op}: features ", 1)) from error
            if self.warm_start:
                self._buffer("centers", index).copy_(kmeans.cluster_centers_)
            assignments = torch.zeros(rows.total, dtype=torch.int64, device=features.device)
            assignments[rows.offset : rows.offset + rows.local] = kmeans.labels_
            rows.sum(assignments)
            self._buffer("assignments", index).copy_(assignments)
            self._buffer("prototypes", index).copy_(F.normalize(kmeans.cluster_centers_, dim=1))
            # Concentration is proportional to its temperature.
            self._buffer("concentration", index).copy_(kmeans.concentration_ * (self.temperature / TEMPERATURE))
        self.num_updates += 1

    def lookup(
        self,
        sample_ids: Tensor,  # (N,) int64 or int32
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Prototypes (K, D), assignments (N,) of these samples and concentration (K,), each a list over the sets.

        Prototypes and concentration are the bank's own buffers, not copied for each batch: the next ``update`` changes
        them in place. Clone what has to outlast it, and do not write to them.

        Raises:
            TypeError: ``sample_ids`` is no integer tensor.
            ValueError: ``sample_ids`` is not (N,) on the bank's device, or (where data is read) out of range.
        """
        op = "PrototypeBank.lookup"
        expect_tensor(sample_ids, op, "sample_ids", ("N",), INTEGERS, self.num_updates.device)
        expect_index(sample_ids, op, "sample_ids", self.num_samples)
        sets = range(len(self.num_prototypes))
        return (
            [self._buffer("prototypes", index) for index in sets],
            [self._buffer("assignments", index)[sample_ids] for index in sets],
            [self._buffer("concentration", index) for index in sets],
        )

    def extra_repr(self) -> str:
        return f"{self.num_samples}, {self.dim}, num_prototypes={self.num_prototypes}, temperature={self.temperature}"

    def _expect_alike(self, features: Tensor, op: str) -> None:
        """Refuses features (M, D) of another kind. What one rank refuses, every rank refuses: none waits for it."""
        refused, group = None, self.kmeans_options.get("process_group")
        try:
            expect_tensor(features, op, "features", ("M", self.dim))
        except (TypeError, ValueError) as error:
            refused = error
        if group is not None:
            device = features.device if isinstance(features, Tensor) else self.num_updates.device
            names = ("num_samples", "num_prototypes", "temperature")
            options = {name: getattr(self, name) for name in names}
            expect_alike(features, None, refused, options, op, group, device, "features")
        if refused is not None:
            raise refused

    def _kmeans(self, index: int, **options: Any) -> KMeans:
        return KMeans(self.num_prototypes[index], **{"seed": self.seed + index, **self.kmeans_options, **options})

    def _buffer(self, name: str, index: int) -> Tensor:
        return self.get_buffer(f"{name}_{index}")
