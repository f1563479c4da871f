"""The rows to be clustered, wherever they lie: streamed in chunks to one device, and summed over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastproto._check import expect, expect_tensor, expect_type, reads_data

Array = Tensor | np.ndarray

# Rows that have to be copied (from a file, from another device, to another type) come in pieces of about this size.
CHUNK_BYTES = 1 << 26


class Rows:
    """This rank's rows of one (total, D) matrix that lies over the ranks of ``group`` in rank order.

    Args:
        x: (N, D) tensor, array or memory map. Never copied as a whole.
        weights: (N,) float64 tensor on the CPU or on ``device``, or None.
        device: where chunks are computed on; None for where ``x`` lies.
        chunk_rows: rows in a chunk; None for all of them, or 64 MiB where they have to be copied.
    """

    def __init__(
        self,
        x: Array,
        weights: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        chunk_rows: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.x, self.weights, self.group = x, weights, group
        self.local: int = x.shape[0]
        self.dim: int = x.shape[1]
        self.home = x.device if isinstance(x, Tensor) else torch.device("cpu")
        self.device = self.home if device is None else torch.zeros(0, device=device).device
        self.dtype = torch.float64 if x.dtype.itemsize == 8 else torch.float32
        in_place = isinstance(x, Tensor) and self.home == self.device
        self.chunk_rows = chunk_rows or max(1, self.local if in_place else CHUNK_BYTES // (4 * self.dim))
        sizes = self.gather(torch.tensor(self.local, dtype=torch.float64, device=self.device)).long().tolist()
        self.total = sum(sizes)
        self.offset = sum(sizes[: self.rank])

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum(self, *tensors: Tensor) -> None:
        """Sums tensors over the ranks, in place."""
        if self.group is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def gather(self, value: Tensor) -> Tensor:
        """One float64 number of each rank, in rank order, the same on every rank."""
        if self.group is None:
            return value[None]
        values = torch.zeros(dist.get_world_size(self.group), dtype=torch.float64, device=value.device)
        values[self.rank] = value
        self.sum(values)
        return values

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Which rows, the rows (n, D) and their weights (n,) or None, both on ``device``."""
        for start in range(0, self.local, self.chunk_rows):
            here = slice(start, min(start + self.chunk_rows, self.local))
            weights = None if self.weights is None else self.weights[here].to(self.device)
            yield here, as_tensor(self.x[here]).to(self.device), weights

    def take(self, indices: np.ndarray) -> Tensor:
        """The rows of these indices into all ranks' rows, on every rank: (len(indices), D)."""
        taken = torch.zeros(len(indices), self.dim, dtype=self.dtype, device=self.device)
        mine = np.flatnonzero(self._is_mine(indices))
        if mine.size:
            rows = _pick(self.x, indices[mine] - self.offset)
            taken[torch.from_numpy(mine).to(self.device)] = rows.to(self.device, self.dtype)
        self.sum(taken)
        return taken

    def subset(self, indices: np.ndarray) -> Rows:
        """Only the rows of these indices into all ranks' rows, each still on its rank, copied to ``device``."""
        mine = indices[self._is_mine(indices)] - self.offset
        weights = None if self.weights is None else _pick(self.weights, mine)
        return Rows(_pick(self.x, mine).to(self.device), weights, group=self.group)

    def check_finite(self, op: str) -> None:
        """Raises ValueError, on every rank alike, if a row of any rank holds NaN or infinity."""
        count, first = 0, self.total
        for here, x, _ in self.chunks():
            bad = (~x.isfinite()).any(1)
            if bad.any():
                first = min(first, self.offset + here.start + int(bad.byte().argmax()))
                count += int(bad.sum())
        counts, firsts = (
            self.gather(torch.tensor(value, dtype=torch.float64, device=self.device)) for value in (count, first)
        )
        count, first = int(counts.sum()), int(firsts.min())
        expect(count == 0, op, "x", "finite rows", f"{count} with NaN or infinity, the first at index {first}")

    def _is_mine(self, indices: np.ndarray) -> np.ndarray:
        return (indices >= self.offset) & (indices < self.offset + self.local)


def check_rows(x: Array, op: str, dim: int | None = None) -> None:
    """Raises TypeError for what is no float tensor or array, ValueError for another shape than (N, D)."""
    expect_type(x, (Tensor, np.ndarray), op, "x", "a float tensor or array (N, D)")
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f" or x.dtype.itemsize not in (2, 4, 8):
            raise TypeError(f"{op}: x expected a float16, float32 or float64 array (N, D), got {x.dtype} {x.shape}")
        wanted = f"(N, {dim or 'D'})"
        expect(x.ndim == 2 and dim in (None, x.shape[1]), op, "x", wanted, f"{x.dtype} array {x.shape}")
    else:
        expect_tensor(x, op, "x", ("N", dim or "D"))
    expect(x.shape[1] >= 1, op, "x", "at least one dimension", f"shape {tuple(x.shape)}")


def check_weights(weights: Array | None, op: str, rows: int) -> Tensor | None:
    """The weights as a float64 tensor. ValueError for another length, and for negative or infinite ones."""
    if weights is None:
        return None
    expect_type(weights, (Tensor, np.ndarray), op, "sample_weight", f"a float tensor or array ({rows},)")
    weights = as_tensor(weights)
    expect_tensor(weights, op, "sample_weight", (rows,))
    weights = weights.double()
    if reads_data(weights):
        bad = int(((weights < 0) | ~weights.isfinite()).sum())
        expect(bad == 0, op, "sample_weight", "finite weights of at least 0", f"{bad} others")
    return weights


def block_sums(values: Tensor) -> np.ndarray:
    """Sums of 1024 values each, on the host. Unlike one long sum, their bits do not follow the number of threads."""
    padded = torch.nn.functional.pad(values.double(), (0, -values.numel() % 1024))
    return padded.view(-1, 1024).sum(1).cpu().numpy()


def as_tensor(x: Array) -> Tensor:
    """The array as a tensor, copied only where torch could not share it: read-only, strided backwards, byte-swapped."""
    if isinstance(x, Tensor):
        return x.detach()
    x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def _pick(x: Array, indices: np.ndarray) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()[torch.from_numpy(indices).to(x.device)]
    return as_tensor(x[indices])
