"""Pieces of a matrix that lies elsewhere, one after the other on the device where they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray


class _Slot(NamedTuple):
    """One of the two places that pieces pass through on their way to a GPU."""

    pinned: Tensor  # on the host
    buffer: Tensor  # on the device
    copied: torch.cuda.Event
    computed: torch.cuda.Event


class Stream:
    """``x[slice]`` (n, D) on ``device``, slice by slice, in each pass over the stream anew.

    A piece may be overwritten by the next. Tensors on ``device``, and arrays that torch can share, are not copied;
    the buffers for others are made once. No slice may be longer than the first.
    """

    def __init__(self, x: Array, slices: list[slice], device: torch.device) -> None:
        self.x, self.slices, self.device = x, slices, device

    def __iter__(self) -> Iterator[Tensor]:
        if not self.slices:
            return
        if self.device.type == "cuda" and not (isinstance(self.x, Tensor) and self.x.is_cuda):
            yield from self._to_cuda()
        elif isinstance(self.x, Tensor) or _shareable(self.x):
            for here in self.slices:
                yield as_tensor(self.x[here]).to(self.device)
        else:
            for here in self.slices:
                yield _fill(self._buffer, self.x[here])

    def _to_cuda(self) -> Iterator[Tensor]:
        """While one piece is computed, the next is read into the other pinned buffer and copied to the device."""
        computing = torch.cuda.current_stream(self.device)
        # The device buffers may still be in use by work that was queued before.
        self._copying.wait_stream(computing)
        piece = self._send(0)
        for index in range(len(self.slices)):
            slot = self._slots[index % 2]
            computing.wait_event(slot.copied)
            yield piece
            # By now the work on this piece is queued, and runs while the next is read.
            slot.computed.record(computing)
            if index + 1 < len(self.slices):
                piece = self._send(index + 1)

    def _send(self, index: int) -> Tensor:
        """Reads a piece, and queues its copy to the device."""
        slot = self._slots[index % 2]
        # The host waits for the last copy out of the pinned buffer, the copy for the last work on the device buffer.
        slot.copied.synchronize()
        self._copying.wait_event(slot.computed)
        piece = _fill(slot.pinned, self.x[self.slices[index]])
        with torch.cuda.stream(self._copying):
            sent = slot.buffer[: len(piece)].copy_(piece, non_blocking=True)
            slot.copied.record()
        return sent

    @cached_property
    def _buffer(self) -> Tensor:
        return self._room()

    @cached_property
    def _copying(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _slots(self) -> list[_Slot]:
        pinned = [self._room(pin_memory=True) for _ in range(2)]
        return [
            _Slot(room, torch.empty_like(room, device=self.device), torch.cuda.Event(), torch.cuda.Event())
            for room in pinned
        ]

    def _room(self, pin_memory: bool = False) -> Tensor:
        """For the longest piece, on the host."""
        longest = self.slices[0].stop - self.slices[0].start
        dtype = as_tensor(self.x[:0]).dtype
        return torch.empty(longest, self.x.shape[1], dtype=dtype, device="cpu", pin_memory=pin_memory)


def as_tensor(x: Array) -> Tensor:
    """The array as a tensor, copied only where torch could not share it: read-only, strided, not aligned, swapped."""
    if isinstance(x, Tensor):
        return x.detach()
    return torch.from_numpy(x if _shareable(x) else np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))


def _fill(buffer: Tensor, piece: Array) -> Tensor:
    """The piece, copied to the start of the buffer."""
    out = buffer[: len(piece)]
    if isinstance(piece, Tensor):
        return out.copy_(piece.detach())
    np.copyto(out.numpy(), piece)
    return out


def _shareable(x: np.ndarray) -> bool:
    # Of no rows or one NumPy calls any stride contiguous; those of a record's field torch may not take.
    whole = all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
    return x.flags.c_contiguous and x.flags.writeable and x.flags.aligned and x.dtype.isnative and whole
