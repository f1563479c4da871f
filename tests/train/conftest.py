"""Data and settings so small that a run takes a second."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("jsonargparse")

from fastproto.train import data, loop
from fastproto.train.config import (
    Config,
    EncoderConfig,
    HeadConfig,
    OptimizerConfig,
    PrototypeConfig,
    TargetConfig,
    ViewConfig,
)
from fastproto.train.data import Dataset


@pytest.fixture
def tiny_data() -> Dataset:
    """52 noisy images of 4 classes: 4 x 13, each class a bright patch in its own corner."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (52, 3, 20, 20), dtype=torch.uint8, generator=generator)
    labels = torch.arange(52) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = divmod(label, 2)
        image[:, 10 * top : 10 * top + 8, 10 * left : 10 * left + 8] += 140
    return Dataset("made", images[:40], labels[:40], images[40:], labels[40:], tuple("abcd"), (0.3,) * 3, (0.25,) * 3)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tiny_data: Dataset) -> Dataset:
    """Every data set there is."""
    monkeypatch.setattr(data, "load", lambda name, root=None, **options: tiny_data)
    return tiny_data


@pytest.fixture
def tiny_config() -> Config:
    """Two steps an epoch, boxes and prototypes from the second epoch on."""
    return Config(
        crop="contrastive",
        epochs=2,
        batch_size=16,
        device="cpu",
        encoder=EncoderConfig("resnet-tiny", 8),
        head=HeadConfig(hidden=16, dim=8),
        views=ViewConfig(size=16, box_warmup=1, box_interval=1),
        prototypes=PrototypeConfig(num=(5,), warmup=1, n_iter=3, whiten_dim=12),
        target=TargetConfig(momentum=0.9, momentum_end=1.0, queue=40),
        optimizer=OptimizerConfig(lr=0.05, warmup=0.5),
    )


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What stands for every evaluation of the loop."""
    scores = {"knn20": 0.25, "knn200": 0.25, "linear": 0.25}
    monkeypatch.setattr(loop, "evaluate", lambda encode, dataset, *, device: dict(scores))
    return scores
