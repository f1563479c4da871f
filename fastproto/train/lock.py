"""One training at a time in a folder, one change of a file at a time: the system's locks, which end with a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, made if need be. Not where its file system knows no locks, as some of other machines.

    Raises:
        BlockingIOError: another process of this machine holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        _lock(descriptor, fcntl.LOCK_EX, folder)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Holds a file or folder for a moment, after whoever holds it now. Not where its file system knows no locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder. Any number may ask at a time."""
    if fcntl is None or not folder.is_dir():
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_SH, folder)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another training writes it", str(folder)) from error
    except OSError:  # no locks here
        return


def _let_go() -> None:
    """A process that decodes images may outlive its parent for seconds, and is not to keep the lock."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
