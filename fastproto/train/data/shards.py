"""Images in tar files, as WebDataset writes them: KEY.jpg or .png beside KEY.cls.

The headers are read once. After that an image is a place in a file: any of them can be read at any time, so images have
numbers that stay, as boxes and prototypes need, and every epoch has an order of its own over all shards.
"""

from __future__ import annotations

import glob
import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from fastproto._check import LONGEST, expect
from fastproto.train.data.dataset import Encoded
from fastproto.train.data.folders import IMAGE_SUFFIXES, Split
from fastproto.train.data.streamed import as_many_workers_as_asked, ignore_signals, started, unchanged

BLOCK = 512
# A number above is no class: so many would fill the memory.
MAX_LABEL = 10**6
# Types of headers: a file, what says more of the one that follows, and links, devices and folders: no content follows,
# whatever size their header gives.
FILE, PAX, LONG_NAME, MORE, BARE = (b"0", b"\0"), b"x", b"L", (b"g", b"K"), (b"1", b"2", b"3", b"4", b"5", b"6")

log = logging.getLogger("fastproto")


class ShardFiles:
    """Images at places in tar files."""

    def __init__(self, shards: Sequence[Path], shard: np.ndarray, start: np.ndarray, size: np.ndarray) -> None:
        self.shards, self.shard, self.start, self.size = shards, shard, start, size

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, index: int) -> str:
        return self._named(index, self._read(index, BLOCK))

    def read(self, index: int) -> tuple[bytes, str]:
        content = self._read(index, BLOCK + int(self.size[index]))
        return content[BLOCK:], self._named(index, content)

    def take(self, ids: np.ndarray) -> ShardFiles:
        return ShardFiles(self.shards, self.shard[ids], self.start[ids], self.size[ids])

    def key(self) -> bytes:
        return b"".join(column.tobytes() for column in (self.shard, self.start, self.size))

    def _read(self, index: int, size: int) -> bytes:
        """From the image's header on, which is the block before it."""
        with open(self.shards[self.shard[index]], "rb", buffering=0) as file:
            file.seek(int(self.start[index]) - BLOCK)
            return file.read(size)

    def _named(self, index: int, header: bytes) -> str:
        return f"{self.shards[self.shard[index]]}, {_text(header[:100])}"


def image_shards(
    pattern: str, test_pattern: str | None = None, *, workers: int = 0, strict: bool = False
) -> tuple[Split, int]:
    """The images of all shards of a pattern and those for testing, and how many shards lack their end.

    Raises as ``load`` does.
    """
    (files, labels), cut = _read_shards(pattern, workers, strict)
    if test_pattern is None:
        labelled = np.flatnonzero(labels >= 0)
        expect(len(labelled) >= 5, "load", "shards", "at least 5 images with a label", f"{len(labelled)} in {pattern}")
        tested = labelled[4::5]
        kept = np.delete(np.arange(len(labels)), tested)
        train, test = (files.take(kept), labels[kept]), (files.take(tested), labels[tested])
    else:
        train, ((files, labels), cut_tests) = (files, labels), _read_shards(test_pattern, workers, strict)
        cut += cut_tests
        expect(bool((labels >= 0).all()), "load", "test_shards", "a label for every image", f"fewer in {test_pattern}")
        test = files, labels
        found = bool((train[1] >= 0).any())
        expect(found, "load", "shards", "images with a label, KEY.cls", f"none in {pattern}")
    classes = 1 + max(int(train[1].max()), int(test[1].max()))
    return (train, test, tuple(str(label) for label in range(classes))), cut


def _read_shards(pattern: str, workers: int, strict: bool) -> tuple[Encoded, int]:
    shards = _expand(pattern)
    # A million images take a minute in one process.
    workers = workers if len(shards) > 1 else 0
    with as_many_workers_as_asked():
        indices: DataLoader[Index] = DataLoader(
            _Headers(shards), batch_size=None, num_workers=workers, collate_fn=unchanged, worker_init_fn=ignore_signals
        )
    found, cut = [], 0
    for path, index in zip(shards, started(indices), strict=True):
        expect(not index.problem, "load", "shards", "plain tar files of KEY.jpg and KEY.cls", index.problem)
        if index.cut is not None:
            # Some writers leave the mark out: what may be missing is for the user to say.
            missing = f"end-of-archive mark at its byte {index.cut}"
            expect(not strict, "load", "shards", "whole tar files", f"{path} without its {missing}")
            log.warning("skipped: what %s may have held: it has no %s", path, missing)
            cut += 1
        found.append(index)
    start, size, labels = (np.concatenate([index[column] for index in found]) for column in range(3))
    expect(len(labels) > 0, "load", "shards", "images", f"none in {pattern}")
    shard = np.repeat(np.arange(len(shards)), [len(index.labels) for index in found])
    return (ShardFiles(shards, shard, start, size), labels), cut


def _expand(pattern: str) -> list[Path]:
    """The files of a pattern, in its order: ``{000..127}`` and ``{a,b}`` first, then ``*``, ``?`` and ``[…]``."""
    paths: list[str] = []
    for name in _braces(pattern):
        # A name may itself hold brackets.
        matches = [name] if Path(name).is_file() else sorted(glob.glob(name))
        expect(bool(matches), "load", "shards", "tar files", f"nothing at {name}")
        paths += matches
    return [Path(path) for path in paths]


def _braces(pattern: str) -> Iterator[str]:
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        yield pattern
        return
    expect("{" not in pattern[: brace.start()], "load", "shards", "braces one after the other", pattern)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    choices = brace[1].split(",")
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1
        # As the shell does it: all are as long as the longer end where one begins with a 0 too many.
        padded = any(len(end) > 1 and end.startswith("0") for end in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        choices = [str(n).zfill(width) for n in range(first, last + step, step)]
    for choice in choices:
        yield from _braces(pattern[: brace.start()] + choice + pattern[brace.end() :])


class Index(NamedTuple):
    """Where the images of one shard are."""

    start: np.ndarray  # (n,) int64
    size: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64, -1 = none
    cut: int | None = None  # length of a shard that has no end-of-archive mark
    problem: str = ""


class _Headers(Dataset[Index]):
    """The index of each shard, for worker processes; what is wrong with one comes back as a text."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Index:
        path = self.shards[number]
        try:
            with open(path, "rb") as file:
                return _index(file)
        except (ValueError, OSError) as error:
            none = np.empty(0, np.int64)
            return Index(none, none, none, problem=f"{path}: {error}")


def _index(file: BinaryIO) -> Index:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    members, cut = _members(file)
    for name, start, size in members:
        folder, _, base = name.rpartition("/")
        key, _, suffix = base.partition(".")
        suffix = suffix.lower()
        if f".{suffix}" in IMAGE_SUFFIXES:
            images[f"{folder}/{key}"] = start, size
        elif suffix == "cls":
            file.seek(start)
            text = _text(file.read(size)).strip()
            try:
                labels[f"{folder}/{key}"] = label = int(text)
            except ValueError:
                label = -1
            if not 0 <= label <= MAX_LABEL:
                raise ValueError(f"{name} holds {text[:LONGEST]!r}")
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    numbers = np.array([labels.get(key, -1) for key in images], dtype=np.int64)
    return Index(places[:, 0], places[:, 1], numbers, cut)


def _members(file: BinaryIO) -> tuple[list[tuple[str, int, int]], int | None]:
    """Name, start and size of the files in a tar, and the tar's length where the zeros are missing that end it.

    The standard library's tarfile takes four times as long, which is minutes where there are a million images.
    """
    length = file.seek(0, io.SEEK_END)
    position = 0
    found: list[tuple[str, int, int]] = []
    more: dict[str, str] = {}
    while position < length:
        file.seek(position)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            return found, None
        start, size, kind = position + BLOCK, _number(header[124:136]), header[156:157]
        # The checksum's own eight bytes count as spaces.
        checksum = sum(header) - sum(header[148:156]) + 8 * 32
        if len(header) == BLOCK and (size < 0 or checksum != _number(header[148:156])):
            raise ValueError(f"no header at byte {position}")
        if kind in BARE:
            size = 0
        if start + size > length:
            raise ValueError(f"cut short at byte {length}")
        if kind == PAX:
            more |= _pax(file.read(size))
        elif kind == LONG_NAME:
            more["path"] = _text(file.read(size))
        elif kind not in MORE:
            if kind in FILE:
                prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
                found.append((more.get("path", f"{prefix}/{_text(header[:100])}".lstrip("/")), start, size))
            more = {}
        position = start + -(-size // BLOCK) * BLOCK
    if position > length:
        raise ValueError(f"cut short at byte {length}")
    return found, length


def _pax(records: bytes) -> dict[str, str]:
    """The entries of a pax header, each "length key=value" and a line end."""
    found = {}
    while records:
        length = int(records.split(b" ", 1)[0])
        if length < 1:
            raise ValueError("a pax entry without a length")
        key, _, value = records[:length].partition(b" ")[2].rstrip(b"\n").decode(errors="replace").partition("=")
        found[key], records = value, records[length:]
    return found


def _number(field: bytes) -> int:
    """An octal number, or -1."""
    digits = field.strip(b" \0") or b"0"
    return int(digits, 8) if re.fullmatch(b"[0-7]+", digits) else -1


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")
