"""Training in tests: stopped where a test wants it, and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastproto.train.build import build_state
from fastproto.train.checkpoint import State, latest_checkpoint
from fastproto.train.config import Config
from fastproto.train.data import Dataset


def stop_after(steps: int) -> Callable[[], bool]:
    """Says True at the so many-th asking."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) == steps


def at_the_end(folder: Path, config: Config, dataset: Dataset) -> State:
    """The state of a run's last checkpoint."""
    state = build_state(config, dataset, torch.device("cpu"))
    state.load(latest_checkpoint(folder))
    return state
