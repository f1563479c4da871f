"""The rows to be clustered, wherever they lie: streamed in chunks to one device, and summed over ranks."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastproto._check import describe, expect, expect_tensor, expect_type, reads_data
from fastproto.cluster._stream import Array, Stream, as_tensor
from fastproto.ops.assign import assign
from fastproto.ops.search import search
from fastproto.ops.update import largest, round_to_grid, rounder, two_rounders

T = TypeVar("T")
# Rows that have to be copied (from a file, from another device, to another type) come in pieces of about this size.
CHUNK_BYTES = 1 << 26


class Rows:
    """This rank's rows of one (total, D) matrix that lies over the ranks of ``group`` in rank order.

    Args:
        x: (N, D) tensor, array or memory map. Never copied as a whole.
        weights: (N,) float64 tensor, or None.
        device: where chunks are computed on; None for where ``x`` lies.
        chunk_rows: rows in a chunk; None for all of them, or 64 MiB where they may have to be copied.
    """

    # Of the sums of w x and of w, (2, 2) float64; see ``two_rounders``. Set by ``survey``.
    rounders: Tensor

    def __init__(
        self,
        x: Array,
        weights: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        chunk_rows: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.x, self.group = x, group
        self.local: int = x.shape[0]
        self.dim: int = x.shape[1]
        self.home = x.device if isinstance(x, Tensor) else torch.device("cpu")
        self.device = self.home if device is None else torch.zeros(0, device=device).device
        self.dtype = torch.float64 if x.dtype.itemsize == 8 else torch.float32
        self.weights = None if weights is None else weights.to(self.device)
        in_place = isinstance(x, Tensor) and self.home == self.device
        fits = self.local if in_place else CHUNK_BYTES // (x.dtype.itemsize * self.dim)
        self.chunk_rows = chunk_rows or max(1, fits)
        starts = range(0, self.local, self.chunk_rows)
        slices = [slice(start, min(start + self.chunk_rows, self.local)) for start in starts]
        self.stream = Stream(x, slices, self.device)
        sizes = [self.local] if group is None else self.gather(torch.tensor(self.local, device=self.device)).tolist()
        self.total: int = sum(sizes)
        self.offset: int = sum(sizes[: self.rank])

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum(self, *tensors: Tensor) -> None:
        """Sums tensors of one dtype over the ranks, in place."""
        if self.group is not None:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(together, group=self.group)
            for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks of every element; NaN counts as infinity."""
        tensor = tensor.nan_to_num(nan=torch.inf, posinf=torch.inf)
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, value: Tensor) -> Tensor:
        """One number of each rank, in rank order, the same on every rank."""
        if self.group is None:
            return value[None]
        values = torch.zeros(dist.get_world_size(self.group), dtype=value.dtype, device=value.device)
        values[self.rank] = value
        self.sum(values)
        return values

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Which rows, the rows (n, D) and their weights (n,) or None, both on ``device``.

        The rows of a chunk may be overwritten by those of the next.
        """
        for here, x in zip(self.stream.slices, self.stream, strict=True):
            yield here, x, None if self.weights is None else self.weights[here]

    def survey(self, op: str) -> None:
        """Reads all rows once: refuses NaN and infinity, and learns how coarse a grid makes their sums exact."""
        most = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _, x, weights in self.chunks():
            most = torch.maximum(most, torch.stack(largest(x, weights)))
        most = self.max(most)
        if not bool(most.isfinite().all()):
            self.refuse(op)
        expect(bool(most[1] > 0), op, "sample_weight", "a sum above 0", 0.0)
        self.rounders = two_rounders(most, self.total)

    def rounder(self, values: Tensor) -> Tensor:
        """What makes sums of these values (N,) exact, of this and of all other ranks' rows: () float64."""
        return rounder(self.largest(values), self.total)

    def largest(self, values: Tensor) -> Tensor:
        """The largest magnitude of all ranks' values, () float64."""
        most = values.abs().max() if values.numel() else values.new_zeros(())
        return self.max(most.double())

    def weighted_sum(self, values: Tensor) -> Tensor:
        """Σ w_n v_n over the rows of all ranks, () float64: the same bits however the rows are spread."""
        values = values.double() if self.weights is None else values * self.weights
        total = round_to_grid(values, self.rounder(values)).sum()
        self.sum(total)
        return total

    def nearest(self, centers: Tensor, metric: str, op: str) -> tuple[Tensor, Tensor]:
        """Labels (N,) int64 and distances (N,) float32 of this rank's rows, where they lie. One pass over them.

        Raises ValueError for rows of NaN or infinity where data on that device is read.
        """
        centers = centers.to(self.device)
        return self._find(lambda x: assign(x, centers, metric), (), op)

    def nearest_few(self, vectors: Tensor, count: int, metric: str, op: str) -> tuple[Tensor, Tensor]:
        """As ``nearest``, of each row the ``count`` nearest, nearest first: (N, count)."""
        vectors = vectors.to(self.device)
        return self._find(lambda x: search(x, vectors, count, metric), (count,), op)

    def _find(
        self, find: Callable[[Tensor], tuple[Tensor, Tensor]], shape: tuple[int, ...], op: str
    ) -> tuple[Tensor, Tensor]:
        labels = torch.zeros(self.local, *shape, dtype=torch.int64, device=self.device)
        distance = torch.zeros(self.local, *shape, dtype=torch.float32, device=self.device)
        for here, x, _ in self.chunks():
            labels[here], distance[here] = find(x)
        labels, distance = labels.to(self.home), distance.to(self.home)
        # What is not finite in a row shows in its distance, so the rows need no pass of their own.
        if reads_data(distance) and not distance.isfinite().all():
            self.refuse(op)
        return labels, distance

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

    def refuse(self, op: str) -> NoReturn:
        """Says, on every rank alike, how many rows hold NaN or infinity, or that all are finite but too large."""
        count, first = 0, self.total
        for here, x, _ in self.chunks():
            bad = (~x.isfinite()).any(1)
            if bad.any():
                first = min(first, self.offset + here.start + int(bad.byte().argmax()))
                count += int(bad.sum())
        count, first = (
            int(number)
            for number in (
                self.gather(torch.tensor(count, device=self.device)).sum(),
                self.gather(torch.tensor(first, device=self.device)).min(),
            )
        )
        expect(count == 0, op, "x", "finite rows", f"{count} with NaN or infinity, the first at index {first}")
        raise ValueError(f"{op}: x expected distances that float32 can hold, got larger ones")

    def _is_mine(self, indices: np.ndarray) -> np.ndarray:
        return (indices >= self.offset) & (indices < self.offset + self.local)


def check_rows(x: Array, op: str, dim: int | None = None) -> None:
    """Raises TypeError for what is not a float tensor or array, ValueError for another shape than (N, D)."""
    expect_type(x, (Tensor, np.ndarray), op, "x", "a float tensor or array (N, D)")
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f" or x.dtype.itemsize not in (2, 4, 8):
            raise TypeError(f"{op}: x expected a float16, float32 or float64 array (N, D), got {describe(x)}")
        wanted = f"(N, {dim or 'D'})"
        expect(x.ndim == 2 and dim in (None, x.shape[1]), op, "x", wanted, x)
    else:
        expect_tensor(x, op, "x", ("N", dim or "D"))
    expect(x.shape[1] >= 1, op, "x", "at least one dimension", f"shape {tuple(x.shape)}")


def check_weights(weights: Array | None, op: str, rows: int, name: str = "sample_weight") -> Tensor | None:
    """The weights as a float64 tensor. ValueError for another length, and for negative or infinite ones."""
    if weights is None:
        return None
    expect_type(weights, (Tensor, np.ndarray), op, name, f"a float tensor or array ({rows},)")
    weights = as_tensor(weights)
    expect_tensor(weights, op, name, (rows,))
    weights = weights.double()
    if reads_data(weights):
        bad = int(((weights < 0) | ~weights.isfinite()).sum())
        expect(bad == 0, op, name, "finite weights of at least 0", f"{bad} others")
    return weights


def expect_alike(
    x: Array,
    weights: Tensor | None,
    refused: Exception | None,
    options: dict[str, Any],
    op: str,
    group: dist.ProcessGroup,
    device: torch.device | str | None,
    argument: str = "x",
) -> bool:
    """Raises ValueError on every rank where one has ``refused`` its rows, or where theirs do not fit together.

    Without it the others would wait for the one that is not there. ``options``, which every rank names in one order,
    must have one value on all of them. Returns whether any rank has weights.
    """
    fine = refused is None
    sizes = (x.shape[1], max(4, x.dtype.itemsize)) if fine else (0, 0)
    facts = [fine, weights is not None, *sizes, *map(_digest, options.values())]
    ends = torch.tensor([facts, [-fact for fact in facts]], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    high, low = ends[0].tolist(), (-ends[1]).tolist()
    if not low[0]:
        expect(not fine, op, argument, "rows, with weights if any, that every rank accepts", "others on another rank")
        return False
    for name, least, most in zip(("dimensions", "bytes of a number"), low[2:4], high[2:4], strict=True):
        expect(least == most, op, argument, f"as many {name} on every rank", f"{least} to {most}")
    for (name, value), least, most in zip(options.items(), low[4:], high[4:], strict=True):
        expect(least == most, op, name, "the same on every rank", f"{describe(value)}, and another elsewhere")
    return bool(high[1])


def deep_copy(of: T, memo: dict[int, Any], group: dist.ProcessGroup | None) -> T:
    """What ``copy.deepcopy`` makes of an object with a process group, which has no copies: both share it."""
    memo[id(group)] = group
    copied = memo[id(of)] = type(of).__new__(type(of))
    copied.__dict__.update(copy.deepcopy(of.__dict__, memo))
    return copied


def _digest(value: Any) -> int:
    """32 bits that are the same in every process where the value is, unlike Python's own hash of a string."""
    if isinstance(value, (Tensor, np.ndarray)):
        numbers = as_tensor(value).detach().to("cpu", torch.float64)
        return zlib.crc32(numbers.contiguous().numpy().data)
    return zlib.crc32(repr(value.item() if isinstance(value, np.generic) else value).encode())


def _pick(x: Array, indices: np.ndarray) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()[torch.from_numpy(indices).to(x.device)]
    return as_tensor(x[indices])
