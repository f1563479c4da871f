"""Losses over the batch of all processes: local anchors against gathered candidates.

Why the gradients come out right: with W ranks of n rows each, rank r computes L_r, the mean over its own rows, and
the loss of the whole batch is L = (1/W) Σ_r L_r. A row z of rank r is an anchor in L_r and a candidate in every L_s, so
the backward pass of the gather sums over ranks, and autograd gives rank r Σ_s dL_s/dz = W · dL/dz for its rows. DDP
averages parameter gradients: (1/W) Σ_r (W · dL/dz_r) · dz_r/dθ = dL/dθ, as in one process with all rows.
Nothing is to be scaled as long as every rank has as many rows. Where some rows do not count, the sum over the local
ones is divided by the count of all ranks and multiplied by W.
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from fastproto._check import describe, expect, reads_data


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, …) of all ranks in rank order (W·n, …), with a gradient. Every rank gives the same shape.

    Raises:
        ValueError: on every rank alike, where the numbers of rows, their shapes or dtypes differ (read on the CPU, on
            CUDA with ``fastproto.set_debug(True)``; a backend that meets them unchecked aborts, waits or misreads).
    """
    rank, world = rank_and_world()
    if world == 1:
        return rows
    if reads_data(rows):
        facts = torch.zeros(2, world, dtype=torch.int64, device=rows.device)
        facts[0, rank] = len(rows)
        facts[1, rank] = zlib.crc32(str((rows.dtype, rows.shape[1:])).encode())
        counts, kinds = sum_over_ranks(facts).tolist()
        op, argument = "gather_distributed", "the batch"
        expect(len(set(counts)) == 1, op, argument, "as many rows on every rank", str(counts))
        wanted = "rows of one shape and dtype on every rank"
        expect(len(set(kinds)) == 1, op, argument, wanted, f"{describe(rows)}, and others elsewhere")
    return _GatherRows.apply(rows)


def gather_dealt_rows(rows: Tensor) -> Tensor:
    """As ``gather_rows``, of rows that were dealt out to the ranks one by one, in the order that they had before."""
    return gather_rows(rows).unflatten(0, (rank_and_world()[1], -1)).transpose(0, 1).flatten(0, 1)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, without a gradient."""
    if rank_and_world()[1] == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def from_first_rank(value: Tensor) -> Tensor:
    """What rank 0 has, on every rank; written into ``value``."""
    if rank_and_world()[1] > 1:
        dist.broadcast(value, src=0)
    return value


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(rank_and_world()[1])]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        rank, world = rank_and_world()
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.tensor_split(world)[rank]
