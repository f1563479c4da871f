"""A run read back from its folder: all of it, or its encoder alone, for which the data may be gone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproto._check import expect
from fastproto.train import data
from fastproto.train.build import build_state, build_views, configured_encoder, configured_origin, inputs_of, load_data
from fastproto.train.checkpoint import expect_origin, is_run, read_checkpoint, read_latest
from fastproto.train.config import Config, read_config
from fastproto.train.encoders import Encoder
from fastproto.train.files import read_log, read_result
from fastproto.train.methods import Method
from fastproto.views import ContrastiveCrop


@dataclass(frozen=True)
class Run:
    """A run read back from its folder by ``load_run``: its settings, data, trained parts and results, on the CPU."""

    path: Path
    checkpoint: Path  # that was read
    config: Config
    dataset: data.Dataset
    method: Method  # trained weights, eval mode; .encoder(x) -> (N, C), .encoder.feature_map(x) -> (N, C, h, w)
    views: ContrastiveCrop  # what made the views: (images, sample_ids, boxes=None, epoch=0) -> tuple of views
    boxes: Tensor  # (N, 4) fractions (h0, w0, h1, w1), one per training image; the whole image where none were found
    prototypes: list[Tensor]  # one (K, D) per prototype set; empty for methods without prototypes
    assignments: list[Tensor]  # one (N,) int64 per prototype set, -1 where an image has none
    log: list[dict[str, float]]  # one row per epoch, as in log.csv; the keys are its columns
    result: dict[str, Any]  # result.json; empty while the run has not ended


def load_run(folder: Path | str, checkpoint: Path | None = None, dataset: data.Dataset | None = None) -> Run:
    """Reads a run back from its folder, on the CPU, at its last checkpoint or another.

    Its data are read again, unless they are given: what ``load_data`` made of the run's configuration.

    Raises:
        ValueError: the folder holds no run, or none with a checkpoint; the data it was trained on is gone; the
            checkpoint is not there, is damaged, or is of another method, encoder or data set; log.csv
            or result.json is damaged.
        OSError: the checkpoint cannot be read.
    """
    folder = Path(folder)
    checkpoint, saved = _read(folder, checkpoint)
    config = read_config(folder / "config.yaml")
    dataset = load_data(config) if dataset is None else dataset
    # Reading draws weights and loads a random state, neither of which is to be felt outside.
    with torch.random.fork_rng():
        state = build_state(config, dataset, torch.device("cpu"))
        state.load(checkpoint, saved)
    prototypes: list[Tensor] = []
    assignments: list[Tensor] = []
    if state.prototypes is not None and state.prototypes.ready:
        prototypes, assignments, _ = state.prototypes.lookup(torch.arange(len(dataset.train_images)))
    return Run(
        path=folder,
        checkpoint=checkpoint,
        config=config,
        dataset=dataset,
        method=state.method.eval(),
        views=build_views(config, dataset),
        boxes=state.boxes.boxes,
        prototypes=prototypes,
        assignments=assignments,
        log=read_log(folder),
        result=read_result(folder),
    )


@dataclass(frozen=True)
class Trained:
    """A run's encoder, and what its folder says of it where the run's data may be gone: what ``load_trained`` reads."""

    path: Path
    config: Config
    encoder: Encoder  # trained weights, eval mode, on the CPU: (N, 3, H, W) -> (N, C)
    data: str  # name of the data set
    size: tuple[int, int]  # (H, W) of its images
    mean: tuple[float, ...]  # of its pixels divided by 255, one value per channel
    std: tuple[float, ...]
    epoch: int  # complete ones
    scores: dict[str, tuple[float, float]]  # accuracies of random and of these weights, where both are known


def load_trained(folder: Path | str, checkpoint: Path | None = None) -> Trained:
    """Reads a run's encoder at its last checkpoint or another, without the data.

    Raises:
        ValueError: the folder holds no run, or none with a checkpoint; the checkpoint is not there, is damaged, or is
            of another method, encoder or data set; result.json is damaged.
        OSError: the checkpoint cannot be read.
    """
    folder = Path(folder)
    checkpoint, saved = _read(folder, checkpoint)
    config = read_config(folder / "config.yaml")
    expect_origin(checkpoint, saved, configured_origin(config))
    # Checkpoints did not always say it.
    inputs = saved["inputs"] if "inputs" in saved else inputs_of(load_data(config))
    height, width = inputs["size"]
    with torch.random.fork_rng():
        encoder = configured_encoder(config, height)
    own = "encoder."
    weights = {name.removeprefix(own): value for name, value in saved["method"].items() if name.startswith(own)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {checkpoint} does not fit the run's encoder {config.encoder.name}") from error
    before, log, result = saved["before"], saved["log"], read_result(folder)
    # Neighbours may have been asked at the end of an epoch; all metrics are known of the last.
    after = result.get("after", {}) if is_own(folder, checkpoint) and saved["epoch"] == config.epochs else {}
    after = after or (log[-1] if log and saved["step"] == 0 else {})
    return Trained(
        path=folder,
        config=config,
        encoder=encoder.eval(),
        data=inputs["data"],
        size=(height, width),
        mean=tuple(inputs["mean"]),
        std=tuple(inputs["std"]),
        epoch=saved["epoch"],
        scores={metric: (before[metric], score) for metric, score in after.items() if metric in before},
    )


def is_own(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is one that the run itself keeps."""
    return checkpoint.parent.resolve() == (folder / "checkpoints").resolve()


def _read(folder: Path, checkpoint: Path | None) -> tuple[Path, dict[str, Any]]:
    """That checkpoint of a run, or its last, and what it holds. Once: a training may remove it meanwhile.

    Raises:
        ValueError: the folder holds no run, or none with a checkpoint; ``checkpoint`` is no file.
    """
    if checkpoint is None:
        return read_latest(folder)
    expect(is_run(folder), "run", "folder", "one that holds a run", str(folder))
    kept = ", ".join(map(str, sorted(folder.glob("checkpoints/*.pt")))) or "those that a training writes"
    expect(checkpoint.is_file(), "run", "checkpoint", f"a file, such as {kept}", f"{checkpoint}, which is not one")
    return checkpoint, read_checkpoint(checkpoint)
