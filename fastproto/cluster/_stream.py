"""Pieces of a matrix that lies elsewhere, one after the other on the device where they are computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray


def stream(x: Array, slices: list[slice], device: torch.device) -> Iterator[Tensor]:
    """``x[slice]`` (n, D) on ``device``, slice by slice. A piece may be overwritten by the next.

    No slice may be longer than the first. Tensors on ``device``, and arrays that torch can share, are not copied.
    """
    if not slices:
        return
    if device.type == "cuda" and not (isinstance(x, Tensor) and x.is_cuda):
        yield from _to_cuda(x, slices, device)
    elif isinstance(x, Tensor) or _shareable(x):
        for here in slices:
            yield as_tensor(x[here]).to(device)
    else:
        buffer = _buffer(x, slices)
        for here in slices:
            yield _fill(buffer, x[here])


def as_tensor(x: Array) -> Tensor:
    """The array as a tensor, copied only where torch could not share it: read-only, strided, byte-swapped."""
    if isinstance(x, Tensor):
        return x.detach()
    return torch.from_numpy(x if _shareable(x) else np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))


def _to_cuda(x: Array, slices: list[slice], device: torch.device) -> Iterator[Tensor]:
    """Two pinned and two device buffers: while one piece is computed, the next is read and copied."""
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    staged = [_buffer(x, slices, pinned=True) for _ in range(2)]
    arrived = [torch.empty_like(buffer, device=device) for buffer in staged]
    copied, computed = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
    # The memory of the device buffers may still be in use by work that was queued before.
    copying.wait_stream(computing)

    def send(index: int) -> Tensor:
        slot = index % 2
        # Waits on the host for the copy out of this pinned buffer, on the device for the work on this device buffer.
        copied[slot].synchronize()
        copying.wait_event(computed[slot])
        piece = _fill(staged[slot], x[slices[index]])
        with torch.cuda.stream(copying):
            sent = arrived[slot][: len(piece)].copy_(piece, non_blocking=True)
            copied[slot].record()
        return sent

    piece = send(0)
    for index in range(len(slices)):
        computing.wait_event(copied[index % 2])
        yield piece
        # By now the work on this piece is queued, and runs while the next is read.
        computed[index % 2].record(computing)
        if index + 1 < len(slices):
            piece = send(index + 1)


def _buffer(x: Array, slices: list[slice], pinned: bool = False) -> Tensor:
    """Room for the longest slice."""
    return torch.empty(slices[0].stop - slices[0].start, x.shape[1], dtype=as_tensor(x[:0]).dtype, pin_memory=pinned)


def _fill(buffer: Tensor, piece: Array) -> Tensor:
    """The piece, copied to the start of the buffer."""
    out = buffer[: len(piece)]
    if isinstance(piece, Tensor):
        return out.copy_(piece.detach())
    np.copyto(out.numpy(), piece)
    return out


def _shareable(x: np.ndarray) -> bool:
    return x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative and min(x.strides) >= 0
