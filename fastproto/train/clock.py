"""Seconds by phase of the training loop, on the device's own clock: asynchronous work counts where it runs."""

from __future__ import annotations

import time

import torch

PHASES = ("views", "forward", "loss", "backward", "clustering", "evaluation")


class Clock:
    """A stop watch with one hand per phase, of which one runs at a time.

    Example:
        >>> clock = Clock(torch.device("cpu"))
        >>> clock.start("views")
        >>> clock.start("forward")  # ends "views"
        >>> clock.stop()
        >>> seconds = clock.take()
        >>> sorted(seconds) == sorted(PHASES) and seconds["views"] > 0 and seconds["loss"] == 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: list[tuple[str | None, torch.cuda.Event | float]] = []

    def start(self, phase: str) -> None:
        """From now on time belongs to this phase."""
        self._mark(phase)

    def stop(self) -> None:
        """From now on time belongs to no phase."""
        self._mark(None)

    def add(self, seconds: dict[str, float]) -> None:
        """Counts what was measured elsewhere: before an interruption."""
        for phase in seconds:
            self._seconds[phase] += seconds[phase]

    def take(self) -> dict[str, float]:
        """The seconds of all phases since the last ``take``. Waits for the device."""
        self.stop()
        if self._cuda:
            torch.cuda.synchronize()
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                self._seconds[phase] += _between(begin, end)
        taken, self._seconds, self._marks = self._seconds, dict.fromkeys(PHASES, 0.0), []
        return taken

    def _mark(self, phase: str | None) -> None:
        if not self._cuda:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))


def _between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
