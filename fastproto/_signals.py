"""What SIGINT and SIGTERM do to a command: they end it as Ctrl-C does, or ask a training to stop after its step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Terminated(KeyboardInterrupt):
    """By SIGTERM, where Ctrl-C raises a plain one."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within the ``with`` block SIGTERM raises ``Terminated``, so that what is half written is removed."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    # Python lets no other thread change what signals do.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Within the ``with`` block SIGINT and SIGTERM raise a flag that the loop reads; a second one ends at once."""

    def __init__(self) -> None:
        self.signal: int = signal.SIGINT
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self.signal, self._asked = number, True
