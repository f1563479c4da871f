"""What happens at which epoch: images and their order, crops, boxes, prototypes, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fastproto.train import loop
from fastproto.train.config import Config, OptimizerConfig, PrototypeConfig, ViewConfig
from fastproto.train.data import Dataset


def watch_views(monkeypatch: pytest.MonkeyPatch, what: Callable[[nn.Module, tuple[Any, ...]], Any]) -> list[Any]:
    """What there is to be seen of every call of the views, their module and its arguments, as a run goes on."""
    seen: list[Any] = []
    build_views = loop.build_views

    def watched(config: Config, dataset: Dataset) -> nn.Module:
        views = build_views(config, dataset)
        views.register_forward_pre_hook(lambda module, args: seen.append(what(module, args)))
        return views

    monkeypatch.setattr(loop, "build_views", watched)
    return seen


@pytest.mark.usefixtures("no_evaluation")
def test_every_epoch_sees_other_images_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    seen = watch_views(monkeypatch, lambda module, args: (args[3], args[1].tolist()))
    loop.train(replace(tiny_config, method="simclr", epochs=3), tiny_data, tmp_path)
    assert [epoch for epoch, _ in seen] == [0, 0, 1, 1, 2, 2]
    orders = [seen[2 * epoch][1] + seen[2 * epoch + 1][1] for epoch in range(3)]
    assert all(len(set(order)) == 32 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    for epoch, order in enumerate(orders):
        assert order == np.random.default_rng((0, epoch)).permutation(40)[:32].tolist()


@pytest.mark.usefixtures("no_evaluation")
def test_the_crops_of_a_run_are_uniform_until_there_are_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    seen = watch_views(monkeypatch, lambda module, args: (args[3], module.alpha))
    views = replace(tiny_config.views, alpha=0.3, box_warmup=2)
    loop.train(replace(tiny_config, method="simclr", views=views, epochs=3), tiny_data, tmp_path)
    assert seen == [(0, 1.0), (0, 1.0), (1, 1.0), (1, 1.0), (2, 0.3), (2, 0.3)]


def test_crops_are_uniform_until_there_are_boxes() -> None:
    views = ViewConfig(box_warmup=4, box_interval=3, alpha=0.1)
    config = Config(crop="contrastive", views=views)
    assert [loop.crop_alpha(config, epoch) for epoch in range(8)] == [1.0] * 6 + [0.1] * 2
    assert loop.crop_alpha(replace(config, crop="random"), 7) == 1.0
    assert loop.crop_alpha(replace(config, crop="simc"), 0) == 0.1


def test_boxes_and_prototypes_have_their_epochs() -> None:
    views = ViewConfig(box_warmup=4, box_interval=3)
    config = Config(crop="contrastive", views=views, prototypes=PrototypeConfig(warmup=2, interval=3))
    assert [epoch for epoch in range(14) if loop.locates(config, epoch)] == [6, 9, 12]
    assert [epoch for epoch in range(14) if loop.clusters(config, epoch)] == [2, 5, 8, 11]
    for crop in ("random", "simc"):
        assert not any(loop.locates(replace(config, crop=crop), epoch) for epoch in range(14))  # type: ignore[arg-type]
    # A random encoder finds no boxes.
    assert not loop.locates(replace(config, views=replace(views, box_warmup=0)), 0)


@pytest.mark.usefixtures("no_evaluation")
def test_what_never_begins_is_said(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    late = {"views": replace(tiny_config.views, box_warmup=5), "prototypes": replace(tiny_config.prototypes, warmup=2)}
    loop.train(replace(tiny_config, method="pcl", **late), tiny_data, tmp_path / "late")
    assert [record.getMessage() for record in caplog.records] == [
        "prototypes: none in this run of 2 epochs: they begin after 2",
        "views: no boxes in this run of 2 epochs: they begin after 5",
    ]
    caplog.clear()
    loop.train(replace(tiny_config, method="pcl"), tiny_data, tmp_path / "soon")
    assert not caplog.records


def test_the_learning_rate_rises_and_falls() -> None:
    config = OptimizerConfig(lr=2.0, warmup=2.0)
    rates = [loop.learning_rate(config, done, 10) for done in (0.5, 1.0, 2.0, 4.0, 6.0, 10.0)]
    expected = [0.5, 1.0, 2.0, 1 + math.cos(math.pi / 4), 1 + math.cos(math.pi / 2), 0.0]
    assert rates == pytest.approx(expected)
    assert loop.learning_rate(OptimizerConfig(lr=2.0, warmup=0.0), 5.0, 10) == pytest.approx(1.0)
    # A warm-up that outlasts the run never falls.
    assert loop.learning_rate(OptimizerConfig(lr=2.0, warmup=20.0), 10.0, 10) == pytest.approx(1.0)
