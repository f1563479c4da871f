"""Images that stay in their files: worker processes read and decode them, each at its own size, batch by batch.

A resident set is a uint8 tensor (N, 3, H, W). A streamed one reads like such a tensor where some images are asked for,
and ``batches`` and ``squares`` give either kind to whoever does not care which it is. Order, views and boxes are keyed
by an image's number, so what the workers do, and how many they are, changes no result.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastproto.ops._dispatch import integers
from fastproto.train.data import jpeg
from fastproto.views import crop_resize
from fastproto.views.files import decode_image

# Images that a worker decodes at a time: several workers share a step, and little waits in shared memory.
PIECE = 32
# So many files in a row that do not decode are no accident.
GIVE_UP = 100
# Devices that decode JPEG themselves, if they are asked to.
DECODING = ("cuda",)

log = logging.getLogger("fastproto")
T = TypeVar("T")


class BrokenImage(ValueError):
    """A file that does not decode, where that is not to be passed over."""


class Files(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the image."""

    def read(self, index: int) -> tuple[bytes, str]:
        """What its file holds, and its name; raises ValueError or OSError where it cannot be read."""

    def take(self, ids: np.ndarray) -> Files:
        """Some of the images, numbered anew."""

    def key(self) -> bytes:
        """What tells these images, in this order, from others, wherever they lie."""


class Wanted(NamedTuple):
    """What a worker is asked for."""

    ids: list[int]
    leave_jpeg: bool  # whether the device decodes them


class Piece(NamedTuple):
    """Some images as a worker sends them: two tensors, as one for each would cost as many file descriptors."""

    pixels: Tensor  # (sum of H·W·3,) uint8, the decoded images one after the other, each (H, W, 3)
    encoded: Tensor  # (sum of L,) uint8, the files that the device is to decode
    sizes: Tensor  # (n, 2) int64, height and width, or 0 and L of a file; the last is 0, 0 where no image was found
    broken: list[tuple[int, str]]  # number of an image that does not decode, and why


class Decoder(torch.utils.data.Dataset[Piece]):
    """What runs in a worker."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __getitem__(self, wanted: Wanted) -> Piece:
        """The images of these numbers; in the place of a broken one stands the next that is whole."""
        broken: list[tuple[int, str]] = []
        pixels, encoded = ([torch.empty(0, dtype=torch.uint8)] for _ in range(2))
        sizes: list[tuple[int, int]] = []
        for index in wanted.ids:
            image = self._first_whole(index, wanted.leave_jpeg, broken)
            if isinstance(image, bytes):
                encoded.append(torch.frombuffer(bytearray(image), dtype=torch.uint8))
                sizes.append((0, len(image)))
            else:
                pixels.append(image.permute(1, 2, 0).flatten())
                sizes.append((image.shape[1], image.shape[2]))
                if not image.numel():
                    break
        return Piece(torch.cat(pixels), torch.cat(encoded), torch.tensor(sizes), broken)

    def _first_whole(self, index: int, leave_jpeg: bool, broken: list[tuple[int, str]]) -> Tensor | bytes:
        for tried in range(index, index + min(GIVE_UP, len(self.files))):
            try:
                content, name = self.files.read(tried % len(self.files))
                return content if leave_jpeg and jpeg.is_plain(content) else decode_image(content, name)
            except (ValueError, OSError) as error:
                broken.append((tried % len(self.files), str(error)))
        return torch.empty(3, 0, 0, dtype=torch.uint8)


class Streamed:
    """N images in files, decoded when they are asked for.

    Args:
        files: the encoded images.
        side: S of the squares that whole images are brought to, shorter side first, centre kept.
        workers: processes that decode for ``batches``; 0: this process does.
        strict: raise at the first file that does not decode. Otherwise the next whole image stands in for it, in every
            epoch the same, a warning names it once, and ``broken`` keeps its number.
        gpu_decode: a GPU decodes the JPEG files of its ``batches``.

    Raises:
        BrokenImage: from whatever reads images: a broken file where ``strict``; 100 of them in a row, or all, anyway.
    """

    def __init__(
        self, files: Files, side: int, *, workers: int = 0, strict: bool = False, gpu_decode: bool = False
    ) -> None:
        self.files, self.side, self.workers, self.strict, self.gpu_decode = files, side, workers, strict, gpu_decode
        self.broken: set[int] = set()
        self._decoder = Decoder(files)
        self._plan: list[Wanted] = []
        self._loader: DataLoader[Piece] | None = None
        self._turn = 0
        self._warned = False

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> torch.Size:
        """(N, 3, S, S), as of a tensor of all squares."""
        return torch.Size((len(self), 3, self.side, self.side))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Squares (3, S, S) or (n, 3, S, S) uint8, as a tensor of all squares would give them."""
        ids = torch.arange(len(self))[index]
        wanted = Wanted(ids.flatten().tolist(), leave_jpeg=False)
        found = self._unpack(self._decoder[wanted], wanted.ids, torch.device("cpu"))
        return square(found, self.side).view(*ids.shape, 3, self.side, self.side)

    def take(self, ids: Tensor) -> Streamed:
        """Some of the images, numbered anew."""
        files = self.files.take(ids.numpy())
        return Streamed(files, self.side, workers=self.workers, strict=self.strict, gpu_decode=self.gpu_decode)

    def to(self, device: torch.device) -> Streamed:
        """Itself: what goes to the device are the batches."""
        return self

    def batches(self, shares: Sequence[Tensor] | Tensor, device: torch.device) -> Iterator[list[Tensor]]:
        """For each share of numbers its images, (3, H, W) uint8 each, on the device. A new call ends the one before."""
        leave_jpeg = self.gpu_decode and device.type in DECODING
        # Of numbers that lie on a GPU every piece would have the host wait for it.
        shares = [ids.cpu() for ids in (shares.cpu() if isinstance(shares, Tensor) else shares)]
        self._plan[:] = [Wanted(piece.tolist(), leave_jpeg) for ids in shares for piece in ids.split(PIECE)]
        self._turn = turn = self._turn + 1
        pin_memory = device.type == "cuda"
        if self._loader is None or self._loader.pin_memory != pin_memory:
            self._loader = self._make_loader(pin_memory)
        pieces = started(self._loader)
        for ids in shares:
            images: list[Tensor] = []
            for piece in ids.split(PIECE):
                assert turn == self._turn
                images += self._unpack(next(pieces), piece.tolist(), device)
            yield images

    def _make_loader(self, pin_memory: bool) -> DataLoader[Piece]:
        with as_many_workers_as_asked():
            return DataLoader(
                self._decoder,
                sampler=self._plan,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=unchanged,
                pin_memory=pin_memory,
                persistent_workers=self.workers > 0,
                worker_init_fn=ignore_signals,
                # The loader draws a number at every epoch: not from the generator that the training draws from.
                generator=torch.Generator(),
            )

    def _unpack(self, piece: Piece, ids: list[int], device: torch.device) -> list[Tensor]:
        for index, reason in piece.broken:
            self._note(index, reason)
        sizes = piece.sizes.tolist()
        if sizes[-1:] == [[0, 0]]:
            last = self.files.name(piece.broken[-1][0])
            raise BrokenImage(f"data: expected images that decode, got {min(GIVE_UP, len(self))} in a row to {last}")
        try:
            files = iter(jpeg.decode(piece.encoded.split([length for height, length in sizes if not height]), device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # One of them is broken: this process finds out which, and what stands in for it.
            decoded = self._decoder[Wanted(ids, leave_jpeg=False)]
            if len(decoded.broken) == len(piece.broken) and not self._warned:
                self._warned = True
                log.warning("data: %s does not decode JPEG; this process does, and slowly: %s", device, error)
            return self._unpack(decoded, ids, device)
        lengths = [3 * height * width for height, width in sizes if height]
        pixels = iter(piece.pixels.to(device, non_blocking=True).split(lengths))
        return [next(pixels).view(*size, 3).permute(2, 0, 1) if size[0] else next(files) for size in sizes]

    def _note(self, index: int, reason: str) -> None:
        if self.strict:
            raise BrokenImage(f"data: expected images that decode, got {reason}")
        if index not in self.broken:
            self.broken.add(index)
            log.warning("skipped: %s", reason)


Images = Tensor | Streamed


def batches(
    images: Images, shares: Sequence[Tensor] | Tensor, device: torch.device
) -> Iterator[Tensor] | Iterator[list[Tensor]]:
    """For each share of numbers its images, uint8 on the device: a tensor (n, 3, H, W), or a list of (3, H, W)."""
    if isinstance(images, Streamed):
        return images.batches(shares, device)
    return (images[ids].to(device) for ids in shares)


def squares(
    images: Images, shares: Sequence[Tensor] | Tensor, device: torch.device, *, whole: bool = False
) -> Iterator[Tensor]:
    """For each share of numbers its images brought to one size, (n, 3, S, S) uint8 on the device.

    Args:
        images: a tensor is given as it is.
        shares: numbers of images.
        device: where to.
        whole: squeeze the whole image into the square instead of cutting off what exceeds it.
    """
    for batch in batches(images, shares, device):
        yield batch if isinstance(batch, Tensor) else square(batch, images.shape[2], whole=whole)


def square(images: Sequence[Tensor], side: int, *, whole: bool = False) -> Tensor:
    """Images (3, H, W) uint8 as one tensor (n, 3, S, S) uint8: the shorter side resized, the centre kept."""
    if not images:
        return torch.empty(0, 3, side, side, dtype=torch.uint8)
    crops = []
    for image in images:
        height, width = image.shape[1:]
        short = min(height, width)
        crops.append((0, 0, height, width) if whole else ((height - short) // 2, (width - short) // 2, short, short))
    # These std keep the values in 0…255.
    values = crop_resize(images, integers(crops, images[0].device).int(), side, std=(1 / 255,) * 3)
    return values.round_().to(torch.uint8)


def unchanged(item: T) -> T:
    """What a loader without batches makes of an item."""
    return item


def started(loader: DataLoader[T]) -> Iterator[T]:
    """What a loader yields, from workers that ``ignore_signals`` and yet end with this process, whatever ends it.

    An interpreter that an error ends asks its children to end too, by the signal that they ignore, and waits for them.
    """
    others = multiprocessing.active_children()
    with as_many_workers_as_asked():
        items = iter(loader)
    for worker in multiprocessing.active_children():
        if worker not in others:
            atexit.register(end, worker)
    return items


@contextmanager
def as_many_workers_as_asked() -> Iterator[None]:
    """A loader warns of more workers than cores whenever it is made or begun; their number was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def end(worker: BaseProcess) -> None:
    """Kills a worker at this process's end; torch, which watches all workers, would raise an error at that."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker.kill()


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the first one decides when to end, and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
