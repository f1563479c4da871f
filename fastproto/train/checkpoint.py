"""What a run leaves on disk, and how it is read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from fastproto.train.config import Config
    from fastproto.train.data import Dataset


@dataclass(frozen=True)
class Run:
    """A run read back from its folder by ``load_run``: its settings, data, trained parts and results, on the CPU."""

    path: Path
    config: Config
    dataset: Dataset
    method: nn.Module  # trained weights, eval mode; .encoder(x) -> (N, C), .encoder.feature_map(x) -> (N, C, h, w)
    views: nn.Module  # the ContrastiveCrop that made the views: (images, sample_ids, boxes=None, epoch=0) -> tuple of views
    boxes: Tensor  # (N, 4) fractions (h0, w0, h1, w1), one per training image; the whole image where none were found
    prototypes: list[Tensor]  # one (K, D) per prototype set; empty for methods without prototypes
    assignments: list[Tensor]  # one (N,) int64 per prototype set, -1 where an image has none
    log: list[dict[str, float]]  # one row per epoch, as in log.csv; the keys are its columns
    result: dict[str, Any]  # result.json; empty while the run has not ended
